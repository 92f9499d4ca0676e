# vcot on NVIDIA GPUs: vLLM's own image, and beside its vLLM and torch what vcot needs. Valid for BuildKit and the builder
# before it.
ARG BASE=vllm/vllm-openai:v0.32.0

FROM ${BASE} AS package
WORKDIR /src
COPY requirements/bootstrap.txt requirements/bootstrap.txt
RUN python3 -m pip install --quiet --no-cache-dir --require-hashes --target /opt/uv -r requirements/bootstrap.txt
COPY . .
RUN /opt/uv/bin/uv build --no-cache --wheel --python "$(command -v python3)" --build-constraints requirements/gpu.txt --out-dir /dist

FROM ${BASE}
USER root
WORKDIR /vcot
COPY pyproject.toml requirements/bootstrap.txt requirements/gpu.txt requirements/
COPY services/images/check_base.py /tmp/
# What the image has at the lock's version stays; what it lacks comes with the lock's version and hash. vLLM and torch must
# be the lock's from the start: another base image is refused, not half replaced.
RUN python3 /tmp/check_base.py requirements/gpu.txt vllm torch torchvision \
    && python3 -m pip install --quiet --no-cache-dir --require-hashes --target /tmp/uv -r requirements/bootstrap.txt \
    && /tmp/uv/bin/uv pip install --no-cache --no-progress --python "$(command -v python3)" --break-system-packages \
        --constraints requirements/gpu.txt -r requirements/pyproject.toml --extra train --extra ray --extra wandb \
    && rm -rf /tmp/uv \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin vcot \
    && install -d -o vcot -g vcot /vcot /vcot/runs /cache
COPY --from=package /dist /tmp/dist
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --no-cache-dir --no-deps --no-index /tmp/dist/*.whl
# The base's packages may have no bytecode, and a normal user cannot put it beside them: once into the cache volume.
ENV PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/cache PYTHONPYCACHEPREFIX=/cache/pycache
# What vLLM's processes say to each other stays inside the container; else gloo and NCCL listen on its outer address.
ENV VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo
USER vcot
VOLUME ["/vcot/runs", "/cache"]
ENTRYPOINT ["vcot"]
CMD ["doctor"]

"""The cpu profiles on a real Docker Engine: up, sampled, trained, swapped, killed, down. Minutes; `make test-compose`.

Where the defaults can't be reached, VCOT_CPU_BASE names the images' base and VCOT_BUILD_NETWORK the build's network.
VCOT_TEST_COMPOSE may name the compose client (docker-compose); otherwise the first that is installed is taken.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.engine import ROOT, Project, check, compose_clients, docker_clients, succeeds, until
from tests.compose.test_compose_file import SERVICES

IMAGES = {size: SERVICES[f"{name}-cpu"]["image"] for size, name in (("core", "gateway"), ("cpu", "vllm"))}
pytestmark = [pytest.mark.compose, pytest.mark.timeout(1800)]

LISTENING = """
import glob
for table in glob.glob("/proc/net/tcp*"):
    for line in open(table).readlines()[1:]:
        address, state = line.split()[1], line.split()[3]
        if state == "0A" and not address.split(":")[0].endswith("7F"):
            print(int(address.split(":")[1], 16))
"""
ROUTES = "print(open('/proc/net/route').read())"
ENGINE_STATUS = "import urllib.request as r; print(r.urlopen('http://vllm:8000/health', timeout=5).status)"
FIND_ENGINE = """
import socket
try:
    print(socket.getaddrinfo("vllm", 8000))
except socket.gaierror:
    print("unknown")
"""
TRY_GATEWAY = """
import errno, socket
rows = [line.split() for line in open("/proc/net/route").readlines()[1:]]
(gateway,) = [socket.inet_ntoa(bytes.fromhex(row[2])[::-1]) for row in rows if row[1] == "00000000"]
print(errno.errorcode[socket.socket().connect_ex((gateway, 9))])
"""
WRITE_RUNS = """
try:
    open("/vcot/runs/nano/x", "w")
except OSError as error:
    print(error.strerror)
"""
VCOT, VLLM = "/opt/vcot/bin/vcot", "vllm.entrypoints.launchers.api_server.entry"
IS_TRAINING = """
import glob
print(any('"running"' in open(path).read() for path in glob.glob("/vcot/runs/*/training/*/status.json")))
"""


@pytest.fixture(scope="module")
def docker() -> str:
    """A docker client that an engine answers."""
    client = next((client for client in docker_clients() if succeeds([client, "info"])), None)
    if client is None:
        pytest.skip("no Docker Engine answers")
    if "VCOT_TEST_COMPOSE" not in os.environ:
        pytest.skip("it builds images, gigabytes from a registry; ask for it with `make test-compose`")
    return client


@pytest.fixture(scope="module")
def project(docker: str) -> Iterator[Project]:
    """The cpu profile, up and healthy, and gone afterwards with its volumes."""
    asked = shlex.split(os.environ["VCOT_TEST_COMPOSE"])
    clients = compose_clients() if asked == ["1"] else [tuple(asked)]
    if not clients:
        pytest.skip("neither docker compose nor docker-compose is installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key = secrets.token_hex(16)
    keys = {"VCOT_ADMIN_KEY": secrets.token_hex(16), "VCOT_API_KEYS": key, "VCOT_API_KEY": key}
    # docker-compose asks the engine what vLLM's health is; on a busy machine an answer was seen to take over 60 s.
    environment = os.environ | keys | {"VCOT_PORT": str(port), "COMPOSE_HTTP_TIMEOUT": "300"}
    for size, image in IMAGES.items():
        build = [docker, "build", "--network", os.environ.get("VCOT_BUILD_NETWORK", "default"), "-t", image]
        if base := os.environ.get("VCOT_CPU_BASE"):
            build += ["--build-arg", f"BASE={base}"]
        check([*build, "--target", size, "-f", "services/images/cpu.Dockerfile", "."], environment, 1500)
    name = f"vcot-test-{os.getpid()}"
    project = Project(docker, (*clients[0], "-p", name), environment, f"http://127.0.0.1:{port}")
    try:
        project.up()
        yield project
    finally:
        project.run("down", "-v", "--timeout", "40", profile="train-cpu")
    assert not check([docker, "ps", "-aq", "--filter", f"label=com.docker.compose.project={name}"], environment, 60)


def test_nothing_runs_as_root_and_only_the_gateway_is_published(project: Project) -> None:
    for service, port in (("gateway-cpu", "8100"), ("vllm-cpu", "8000")):
        assert project.python(service, "import os; print(os.getuid())") != "0"
        assert set(project.python(service, LISTENING).split()) == {port}
    published = project.engine("port", project.container("gateway-cpu"))
    assert published == f"8100/tcp -> 127.0.0.1:{project.url.rpartition(':')[2]}"
    assert project.engine("port", project.container("vllm-cpu")) == ""
    for image in IMAGES.values():
        assert project.environment["VCOT_ADMIN_KEY"] not in project.engine("history", "--no-trunc", image)


def test_the_engine_is_reached_by_the_gateway_alone(project: Project) -> None:
    """Its development endpoints allow arbitrary calls."""
    assert project.python("gateway-cpu", ENGINE_STATUS) == "200"
    stranger = ["run", "--rm", "--no-deps", "--entrypoint", "python3", "loop-cpu", "-c", FIND_ENGINE]
    assert project.run(*stranger, profile="train-cpu").strip() == "unknown"
    address = project.inspect("vllm-cpu", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")
    assert has_route(address, project.python("gateway-cpu", ROUTES))
    assert not has_route(address, Path("/proc/net/route").read_text("ascii")), "this machine's processes reach it"
    assert project.python("vllm-cpu", TRY_GATEWAY) == "EHOSTUNREACH", "the engine has a way out"


def has_route(address: str, table: str) -> bool:
    """Whether a kernel's table has a route to the address, other than the default one."""
    wanted = int(ipaddress.ip_address(address))
    rows = (line.split() for line in table.splitlines()[1:])
    pairs = ((int.from_bytes(bytes.fromhex(row[at]), "little") for at in (1, 7)) for row in rows)
    return any(mask and wanted & mask == network for network, mask in pairs)


def test_the_engine_holds_no_key_and_cannot_write_a_checkpoint(project: Project) -> None:
    environment = project.inspect("vllm-cpu", "{{.Config.Env}}")
    assert not any(project.environment[name] in environment for name in ("VCOT_ADMIN_KEY", "VCOT_API_KEY"))
    assert project.python("vllm-cpu", WRITE_RUNS) == "Read-only file system"


def test_the_host_samples_through_it(project: Project, tmp_path: Path) -> None:
    said = project.vcot("sample", "--run", str(tmp_path), "--set", f"serve.url={project.url}", "tasks.num_tasks=4")
    assert "32 requested = 32 ok" in said
    assert project.stamp("policy").startswith("base@")


def test_the_loop_has_the_worker_train_and_its_policy_goes_live(project: Project, tmp_path: Path) -> None:
    """The worker is killed on the way, and goes on."""
    settings = ["tasks.num_tasks=40", "eval.num_tasks=12", "train.epochs=6"]
    loop = [*project.compose, "--profile", "train-cpu", "run", "--rm", "loop-cpu", "run", "--run", "runs/nano"]
    log = tmp_path / "loop.log"
    with log.open("w") as output:
        running = subprocess.Popen(
            [*loop, "--save", "--set", *settings], env=project.environment, cwd=ROOT, stdout=output, stderr=output
        )
    until(lambda: project.python("gateway-cpu", IS_TRAINING) == "True" or running.poll() is not None, 400)
    project.kill("worker-cpu", VCOT)
    assert running.wait(400) == 0, log.read_text()
    assert project.inspect("worker-cpu", "{{.RestartCount}}") == "1"
    policy = project.stamp("policy").split("@")[0]
    assert policy.startswith("dpo-")

    # From the host, by a run that has never heard of that checkpoint.
    target = ["--run", str(tmp_path / "run"), "--recipe", "nano", "--set", f"serve.url={project.url}"]
    project.vcot("swap", "policy", "base", *target)
    assert project.stamp("policy").startswith("base@")
    project.vcot("swap", "policy", policy, *target)
    assert project.stamp("policy").startswith(f"{policy}@")

    page = tmp_path / "report"
    project.engine("cp", f"{project.container('gateway-cpu')}:/vcot/runs/nano/report", str(page))
    assert policy in (page / "index.html").read_text("utf-8")


def test_the_admin_routes_want_the_key(project: Project, tmp_path: Path) -> None:
    stranger = {name: value for name, value in project.environment.items() if name != "VCOT_ADMIN_KEY"}
    command = [
        sys.executable,
        "-m",
        "vcot.services.cli",
        "swap",
        "policy",
        "base",
        "--run",
        str(tmp_path),
        "--recipe",
        "nano",
    ]
    command += ["--set", f"serve.url={project.url}"]
    done = subprocess.run(command, env=stranger, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "VCOT_ADMIN_KEY" in done.stderr


def test_who_asks_needs_a_key(project: Project) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{project.url}/v1/models", timeout=60)
    with refused.value as answer:
        assert answer.code == 401


@pytest.mark.parametrize(("service", "victim"), [("vllm-cpu", VLLM), ("gateway-cpu", VCOT)])
def test_what_is_killed_comes_back_with_the_policy(project: Project, service: str, victim: str) -> None:
    """vLLM comes back with the base's weights: the gateway loads the policy's, verified, before it answers."""
    before = project.stamp("policy")
    assert before.startswith("dpo-")
    project.kill(service, victim)
    until(lambda: not project.is_live(), 30)
    until(project.is_live, 300)
    assert project.stamp("policy") == before
    assert project.inspect(service, "{{.RestartCount}}") == "1"


def test_containers_that_are_killed_by_hand_are_brought_back_by_up(project: Project) -> None:
    """After `docker kill` Docker itself starts nothing again."""
    before = project.stamp("policy")
    for service in ("vllm-cpu", "gateway-cpu"):
        project.engine("kill", project.container(service))
        assert project.inspect(service, "{{.State.Running}} {{.State.ExitCode}}") == "false 137"
    project.up()
    assert project.stamp("policy") == before


def test_it_stops_at_once(project: Project) -> None:
    began = time.monotonic()
    project.run("stop")
    assert time.monotonic() - began < 30
    assert project.inspect("gateway-cpu", "{{.State.ExitCode}}") == "0"

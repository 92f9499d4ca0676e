"""The cpu profile on a real Docker Engine: up, sampled, taught, swapped, killed, down. Minutes; `make test-compose`.

Where the defaults can't be reached, VCOT_CPU_BASE names the image's base and VCOT_BUILD_NETWORK the build's network.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
IMAGE = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))["services"]["server-cpu"]["image"]
pytestmark = [pytest.mark.compose, pytest.mark.timeout(1800)]

KILL = """
import os, signal
for pid in filter(str.isdigit, os.listdir("/proc")):
    words = open(f"/proc/{pid}/cmdline").read().split("\\0")
    if %r in words[:3] and int(pid) not in (1, os.getpid()):
        os.kill(int(pid), signal.SIGKILL)
        print("killed")
"""
LISTENING = """
import glob
for table in glob.glob("/proc/net/tcp*"):
    for line in open(table).readlines()[1:]:
        address, state = line.split()[1], line.split()[3]
        if state == "0A" and not address.split(":")[0].endswith("7F"):
            print(int(address.split(":")[1], 16))
"""


@dataclass(frozen=True)
class Project:
    """A compose project that is up."""

    docker: str
    compose: tuple[str, ...]
    environment: dict[str, str]
    url: str

    def run(self, *arguments: str, timeout_s: float = 600) -> str:
        """A compose command's standard output."""
        return check([*self.compose, "--profile", "cpu", *arguments], self.environment, timeout_s)

    def python(self, code: str) -> str:
        """What a program prints inside the server's container."""
        return check([self.docker, "exec", self.container, "python3", "-c", code], self.environment, 60)

    @property
    def container(self) -> str:
        """The server's container."""
        return self.run("ps", "-q", "server-cpu").strip()

    def inspect(self, template: str) -> str:
        """A field of the server's container."""
        return check([self.docker, "inspect", "-f", template, self.container], self.environment, 60).strip()

    def vcot(self, *arguments: str) -> str:
        """A vcot command on the host; what it printed."""
        command = [sys.executable, "-m", "services.cli", *arguments]
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def stamp(self, model: str) -> str:
        """Who answers to `model`."""
        body = {"model": model, "messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 4}
        headers = {"content-type": "application/json", "authorization": f"Bearer {self.environment['VCOT_API_KEY']}"}
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["model"]

    def is_live(self) -> bool:
        """Whether the gateway says that it serves."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return json.load(response)["status"] == "live"
        except OSError:
            return False


def check(command: list[str], environment: dict[str, str], timeout_s: float) -> str:
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"{command}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def until(condition: Callable[[], bool], timeout_s: float) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s} s"
        time.sleep(0.5)
    return time.monotonic() - began


def succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="module")
def docker() -> str:
    """A docker client that an engine answers."""
    found = [shutil.which("docker", path=folder) for folder in os.environ["PATH"].split(os.pathsep)]
    for client in dict.fromkeys(filter(None, found)):
        if succeeds([client, "info"]):
            break
    else:
        pytest.skip("no Docker Engine answers")
    if "VCOT_TEST_COMPOSE" not in os.environ:
        pytest.skip(f"it builds {IMAGE}, gigabytes from a registry; ask for it with `make test-compose`")
    return client


@pytest.fixture(scope="module")
def project(docker: str) -> Iterator[Project]:
    """The cpu profile, up and healthy, and gone afterwards with its volumes."""
    if succeeds([docker, "compose", "version"]):
        compose = [docker, "compose"]
    elif shutil.which("docker-compose"):
        compose = ["docker-compose"]
    else:
        pytest.skip("neither docker compose nor docker-compose is installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key = secrets.token_hex(16)
    keys = {"VCOT_ADMIN_KEY": secrets.token_hex(16), "VCOT_API_KEYS": key, "VCOT_API_KEY": key}
    environment = os.environ | keys | {"VCOT_PORT": str(port)}
    build = [docker, "build", "--network", os.environ.get("VCOT_BUILD_NETWORK", "default"), "-t", IMAGE]
    if base := os.environ.get("VCOT_CPU_BASE"):
        build += ["--build-arg", f"BASE={base}"]
    check([*build, "-f", "services/images/cpu.Dockerfile", "."], environment, 1500)
    name = f"vcot-test-{os.getpid()}"
    project = Project(docker, (*compose, "-p", name), environment, f"http://127.0.0.1:{port}")
    try:
        project.run("up", "-d")
        until(lambda: project.inspect("{{.State.Health.Status}}") == "healthy", 300)
        yield project
    finally:
        project.run("down", "-v", "--timeout", "40")
    assert not check([docker, "ps", "-aq", "--filter", f"label=com.docker.compose.project={name}"], environment, 60)


def test_only_the_gateway_is_reachable_and_nothing_runs_as_root(project: Project):
    assert project.python("import os; print(os.getuid())").strip() != "0"
    assert set(project.python(LISTENING).split()) == {"8100"}
    assert {binding.split(":")[0] for binding in _bindings(project)} == {"127.0.0.1"}
    assert project.environment["VCOT_ADMIN_KEY"] not in check(
        [project.docker, "history", "--no-trunc", IMAGE], project.environment, 60
    )


def _bindings(project: Project) -> list[str]:
    ports = check([project.docker, "port", project.container], project.environment, 60)
    return re.findall(r"-> (\S+)", ports)


def test_the_host_samples_through_it(project: Project, tmp_path: Path):
    said = project.vcot("sample", "--run", str(tmp_path), "--set", f"serve.url={project.url}", "tasks.num_tasks=4")
    assert "32 requested = 32 ok" in said
    assert project.stamp("policy").startswith("base@")


def test_the_loop_runs_in_a_container_and_its_policy_goes_live(project: Project, tmp_path: Path):
    settings = ["serve.url=http://server-cpu:8100", "tasks.num_tasks=40", "eval.num_tasks=12"]
    project.run("run", "--rm", "loop-cpu", "run", "--recipe", "nano", "--set", *settings)
    policy = project.stamp("policy").split("@")[0]
    assert policy.startswith("dpo-")

    # From the host, by a run that has never heard of that checkpoint.
    target = ["--run", str(tmp_path), "--recipe", "nano", "--set", f"serve.url={project.url}"]
    project.vcot("swap", "policy", "base", *target)
    assert project.stamp("policy").startswith("base@")
    project.vcot("swap", "policy", policy, *target)
    assert project.stamp("policy").startswith(f"{policy}@")

    page = tmp_path / "report"
    check([project.docker, "cp", f"{project.container}:/vcot/runs/nano/report", str(page)], project.environment, 60)
    assert policy in (page / "index.html").read_text("utf-8")


def test_the_admin_routes_want_the_key(project: Project, tmp_path: Path):
    stranger = {name: value for name, value in project.environment.items() if name != "VCOT_ADMIN_KEY"}
    command = [sys.executable, "-m", "services.cli", "swap", "policy", "base", "--run", str(tmp_path)]
    command += ["--set", f"serve.url={project.url}"]
    done = subprocess.run(command, env=stranger, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "VCOT_ADMIN_KEY" in done.stderr


def test_who_asks_needs_a_key(project: Project):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{project.url}/v1/models", timeout=60)
    with refused.value as answer:
        assert answer.code == 401


@pytest.mark.parametrize("victim", ["vllm.entrypoints.openai.api_server", "/opt/vcot/bin/vcot"])
def test_what_is_killed_comes_back_with_the_policy(project: Project, victim: str):
    before = project.stamp("policy")
    assert before.startswith("dpo-")
    assert "killed" in project.python(KILL % victim)
    until(lambda: not project.is_live(), 30)
    until(project.is_live, 300)
    assert project.stamp("policy") == before


def test_it_stops_at_once(project: Project):
    began = time.monotonic()
    project.run("stop")
    assert time.monotonic() - began < 30
    assert project.inspect("{{.State.ExitCode}}") == "0"

"""The Docker Engine of this machine, and a compose project on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
KILL = """
import os, signal
for pid in filter(str.isdigit, os.listdir("/proc")):
    words = open(f"/proc/{pid}/cmdline").read().split("\\0")
    if %r in words[:4] and int(pid) not in (1, os.getpid()):
        print("killed", flush=True)
        os.kill(int(pid), signal.SIGKILL)
"""


@dataclass(frozen=True)
class Project:
    """A compose project that is up."""

    docker: str
    compose: tuple[str, ...]
    environment: dict[str, str]
    url: str

    def run(self, *arguments: str, profile: str = "cpu", timeout_s: float = 600) -> str:
        """A compose command's standard output."""
        return check([*self.compose, "--profile", profile, *arguments], self.environment, timeout_s)

    def up(self) -> None:
        """Bring it up, until the gateway is healthy; where that fails, what the containers said is shown."""
        try:
            self.run("up", "-d")
            until(lambda: self.inspect("gateway-cpu", "{{.State.Health.Status}}") == "healthy", 300)
        except (AssertionError, subprocess.TimeoutExpired):
            sys.stdout.write(self.run("logs", "--tail=40"))
            raise

    def engine(self, *arguments: str) -> str:
        """A docker command's standard output."""
        return check([self.docker, *arguments], self.environment, 60).strip()

    def container(self, service: str) -> str:
        """The service's container."""
        return self.run("ps", "-a", "-q", service, profile="train-cpu").strip()

    def python(self, service: str, code: str) -> str:
        """What a program prints inside the service's container."""
        return self.engine("exec", self.container(service), "python3", "-c", code)

    def kill(self, service: str, word: str) -> None:
        """Kill -9 the container's process whose command line begins with `word` in it; the container ends with it."""
        command = [self.docker, "exec", self.container(service), "python3", "-c", KILL % word]
        assert "killed" in subprocess.run(command, capture_output=True, text=True, timeout=60).stdout

    def inspect(self, service: str, template: str) -> str:
        """A field of the service's container."""
        return self.engine("inspect", "-f", template, self.container(service))

    def vcot(self, *arguments: str) -> str:
        """A vcot command on the host; what it printed."""
        command = [sys.executable, "-m", "vcot.services.cli", *arguments]
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


def until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.5)


def succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except OSError:
        return False


def docker_clients() -> list[str]:
    """The docker commands on the path: the first need not be the one that an engine answers."""
    found = [shutil.which("docker", path=folder) for folder in os.environ["PATH"].split(os.pathsep)]
    return list(dict.fromkeys(filter(None, found)))


def compose_clients() -> list[tuple[str, ...]]:
    """`docker compose` and docker-compose, where they are installed."""
    commands = [*((docker, "compose") for docker in docker_clients()), ("docker-compose",)]
    return [command for command in commands if succeeds([*command, "version"])]

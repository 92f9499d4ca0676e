"""The services of compose.yaml as processes of this machine: prepare, engine, gateway, worker, and a real Prometheus."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.engine import make_variant
from tests.compose.engine import until
from tests.compose.test_observe import FOLDER, PANELS
from vcot.services.engine.lifeline import keeper_command
from vcot.training.protocol.job import JOB, PROGRESS, TrainJob, read_record, read_status

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]
VCOT = (sys.executable, "-m", "vcot.services.cli")
KEYS = {"VCOT_API_KEYS": "a-key", "VCOT_API_KEY": "a-key", "VCOT_ADMIN_KEY": "another"}
QUIET = {"Refused by reason", "Retries and faults", "Swaps and their pause", "Prefix cache of vLLM"}
"""Panels that may have nothing to show: nothing was refused, retried, swapped or asked twice."""


class Services:
    """Processes that end with the test, however it ends; each is found at its URL."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine, self.gateway, self.prometheus = (f"http://127.0.0.1:{free_port()}" for _ in range(3))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                keeper_command(command, 20.0),
                cwd=self.folder,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ | KEYS,
                start_new_session=True,
            )

    def start_engine(self) -> None:
        self.start("engine", *VCOT, "engine", "--run", "runs/nano", "--port", port_of(self.engine))

    def start_gateway(self) -> None:
        """Returns once it answers."""
        self.start("gateway", *VCOT, "serve", "--run", "runs/nano")
        self.wait_for("gateway", self.gateway)

    def wait_for(self, name: str, url: str) -> None:
        until(lambda: answers(f"{url}/health") or self.processes[name].poll() is not None, 300)
        assert self.processes[name].poll() is None, self.log(name)

    def vcot(self, *arguments: str) -> None:
        done = subprocess.run(
            [*VCOT, *arguments], cwd=self.folder, env=os.environ | KEYS, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def send(self, name: str, number: signal.Signals) -> None:
        keeper = self.processes[name]
        (pid,) = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text("ascii").split()
        os.kill(int(pid), number)

    def kill(self, name: str) -> None:
        self.send(name, signal.SIGKILL)
        self.processes.pop(name).communicate()

    def ask(self, url: str | None = None) -> str:
        """The stamp of an answer."""
        body = {"model": "policy", "messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 8}
        return json.loads(get(f"{url or self.gateway}/v1/chat/completions", body))["model"]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text("utf-8", "replace")[-3000:]

    def stop(self) -> None:
        for keeper in self.processes.values():
            keeper.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def port_of(url: str) -> str:
    return url.rpartition(":")[2]


def get(url: str, body: dict[str, Any] | None = None, key: str = KEYS["VCOT_API_KEY"]) -> bytes:
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    data = json.dumps(body).encode() if body else None
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as response:
        return response.read()


def answers(url: str) -> bool:
    try:
        return bool(get(url)) or True
    except OSError:
        return False


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """Prepared, and up as compose.yaml has it: an engine on TCP, and a gateway that did not start it."""
    services = Services(tmp_path_factory.mktemp("services"))
    upstreams = f"serve.upstreams=['{services.engine}']"
    settings = [upstreams, f"serve.port={port_of(services.gateway)}", f"serve.url={services.gateway}"]
    services.vcot("prepare", "--recipe", "nano", "--set", *settings)
    try:
        services.start_engine()
        services.start_gateway()
        yield services
    finally:
        services.stop()


def test_the_gateway_serves_what_it_did_not_start(services: Services) -> None:
    assert services.ask().startswith("base@")


def test_an_engine_that_sleeps_is_woken_by_a_gateway_that_is_started_anew(services: Services) -> None:
    """By vLLM's own calls; on a CPU it keeps its memory, and answers nobody."""
    before = services.ask()
    rested = get(f"{services.gateway}/admin/rest", {"way": "stop", "lease_s": 600}, KEYS["VCOT_ADMIN_KEY"])
    assert set(json.loads(rested)["ways"].values()) == {"sleep"}, "it is not the gateway's to stop"
    assert json.loads(get(f"{services.engine}/is_sleeping"))["is_sleeping"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        services.ask()
    assert json.loads(refused.value.read())["error"]["code"] == "resting"
    services.kill("gateway")
    services.start_gateway()
    assert services.ask() == before
    assert not json.loads(get(f"{services.engine}/is_sleeping"))["is_sleeping"]


def test_an_engine_that_starts_again_gets_the_policy_before_a_request(services: Services) -> None:
    """It comes back as it was started, with the base's weights."""
    services.vcot("checkpoints", "add", str(make_variant(services.folder, "moved", 0.2)), "--run", "runs/nano")
    services.vcot("swap", "policy", "moved", "--run", "runs/nano")
    before = services.ask()
    assert before.startswith("moved@")
    services.kill("engine")
    until(lambda: not answers(f"{services.gateway}/health"), 60)
    services.start_engine()
    stamps: list[str] = []

    def is_back() -> bool:
        try:
            stamps.append(services.ask())
        except urllib.error.HTTPError as error:
            error.close()
        return bool(stamps)

    until(is_back, 300)
    assert stamps == [before]


def test_of_two_gateways_over_one_engine_only_its_owner_answers(services: Services) -> None:
    """The second is refused while the first lives, takes the engine while it is halted, and swaps; the first is told."""
    mine, second = services.ask(), f"http://127.0.0.1:{free_port()}"
    run, other = ("--run", "runs/second"), make_variant(services.folder, "other", 0.4)
    settings = [f"serve.upstreams=['{services.engine}']", f"serve.port={port_of(second)}", f"serve.url={second}"]
    services.vcot("prepare", "--recipe", "nano", *run, "--set", *settings)
    services.start("second", *VCOT, "serve", *run)
    refused = services.processes.pop("second")
    assert refused.wait(120) != 0
    refused.communicate()
    assert f"the engine belongs to the gateway at {services.gateway}" in services.log("second")
    assert services.ask() == mine

    services.send("gateway", signal.SIGSTOP)
    try:
        services.start("second", *VCOT, "serve", *run)
        services.wait_for("second", second)
        get(f"{second}/admin/checkpoints", {"path": str(other)}, KEYS["VCOT_ADMIN_KEY"])
        get(f"{second}/admin/swap", {"alias": "policy", "checkpoint": "other"}, KEYS["VCOT_ADMIN_KEY"])
        with ThreadPoolExecutor() as pool:
            waiting = [pool.submit(stamps_within, services, 0.0) for _ in range(8)]  # before it knows of the second
            time.sleep(1)
            services.send("gateway", signal.SIGCONT)
            stale = sum((asked.result() for asked in waiting), stamps_within(services, 10.0))
    finally:
        services.send("gateway", signal.SIGCONT)
    assert stale == [], "it stamps another's weights as its own"
    assert services.ask(second).startswith("other@")

    services.send("second", signal.SIGTERM)
    services.processes.pop("second").communicate()
    until(lambda: answers(f"{services.gateway}/health"), 120)
    assert services.ask() == mine


def stamps_within(services: Services, seconds: float) -> list[str]:
    """Of whatever the first gateway answers meanwhile, asked once at least."""
    stamps, end = list[str](), time.monotonic() + seconds
    while True:
        with contextlib.suppress(urllib.error.HTTPError):
            stamps.append(services.ask())
        if time.monotonic() >= end:
            return stamps
        time.sleep(0.1)


def test_every_panel_has_something_to_show(services: Services, tmp_path: Path) -> None:
    """A real Prometheus scrapes the gateway and vLLM as services/observe has it, addresses apart."""
    if (prometheus := shutil.which("prometheus")) is None:
        pytest.skip("prometheus is not installed (Debian has it)")
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s"}
    here = {"gateway": services.gateway, "vllm": services.engine}
    config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] in here]
    for job in config["scrape_configs"]:
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [here[job["job_name"]].removeprefix("http://")]}]
        if "authorization" in job:
            job["authorization"]["credentials_file"] = str(tmp_path / "key")
    (tmp_path / "key").write_text(KEYS["VCOT_API_KEY"])
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    listen = f"--web.listen-address={services.prometheus.removeprefix('http://')}"
    storage = f"--storage.tsdb.path={tmp_path / 'data'}"
    services.start("prometheus", prometheus, f"--config.file={tmp_path / 'prometheus.yml'}", storage, listen)
    until(lambda: answers(f"{services.prometheus}/-/ready"), 30)
    empty = {panel["title"] for panel in PANELS} - QUIET

    def all_show() -> bool:
        services.ask()
        for panel in PANELS:
            if all(query(services, target["expr"]) for target in panel["targets"]):
                empty.discard(panel["title"])
        return not empty

    try:
        until(all_show, 60)
    except AssertionError:
        pytest.fail(f"nothing in {empty}")


def query(services: Services, expression: str) -> list[Any]:
    asked = urllib.parse.urlencode({"query": expression.replace("$__rate_interval", "10s")})
    return json.loads(get(f"{services.prometheus}/api/v1/query?{asked}"))["data"]["result"]


def test_a_worker_that_is_killed_goes_on_where_it_was(make_job, tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "one" / "training" / "key"
    directory.parent.mkdir(parents=True)
    submitted = make_job("train.worker=remote", "train.epochs=4", num_train=46, num_validation=6)
    shutil.move(submitted, directory)
    services = Services(tmp_path)
    try:
        services.start("worker", *VCOT, "worker")
        until(lambda: (directory / PROGRESS).is_file(), 120)
        services.kill("worker")
        assert read_status(directory).state == "running"
        services.start("worker", *VCOT, "worker")
        until(lambda: read_status(directory).state in ("done", "failed"), 200)
    finally:
        services.stop()
    assert read_status(directory).state == "done", services.log("worker")
    merged = read_record(directory / JOB, TrainJob).merged_path(directory)
    assert (merged / "checkpoint.json").is_file()

"""What compose.yaml promises that can be read off it, without a Docker Engine."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.compose.engine import ROOT, compose_clients
from vcot.services.recipes.recipe import load_recipe

IMAGES = sorted((ROOT / "services/images").glob("*.Dockerfile"))
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
BUILT = {name: service for name, service in SERVICES.items() if "build" in service}
PROFILES = sorted({profile for service in SERVICES.values() for profile in service["profiles"]})
SECRET = re.compile(r"(?i)\b\w*(key|token|secret|password)\w*\b")
INNER = {name for name, network in COMPOSE["networks"].items() if network.get("internal")}


def networks(name: str) -> set[str]:
    return set(SERVICES[name]["networks"])


def interpolated(words: list[str], **variables: str) -> list[str]:
    """As Compose would with those variables, and no others, in the environment."""
    return [re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: variables.get(m[1]) or m[2], word) for word in words]


def in_profile(profile: str) -> set[str]:
    return {name for name, service in SERVICES.items() if profile in service["profiles"]}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_that_answers_has_a_health_check_and_one_that_ends_is_not_restarted(name: str) -> None:
    service = SERVICES[name]
    assert (service["restart"] == "no") == name.startswith(("prepare", "loop", "judge-model"))
    assert ("healthcheck" in service) == name.startswith(
        ("vllm", "gateway", "prometheus", "grafana")
    ) or name == "judge"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_contained(name: str) -> None:
    service = SERVICES[name]
    assert service["init"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["read_only"] is True
    assert {"/tmp", "/tmp:exec"} & set(service["tmpfs"])
    assert service["mem_limit"]
    assert 0 < service["pids_limit"] <= 4096
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert not {"privileged", "network_mode", "user", "cap_add", "pid"} & set(service)


def test_an_image_of_others_can_be_pinned_by_its_digest() -> None:
    for name in ("prometheus", "grafana"):
        assert re.fullmatch(rf"\$\{{VCOT_{name.upper()}_IMAGE:-[\w./-]+:v?[\d.]+\}}", SERVICES[name]["image"])
    for service in BUILT.values():
        assert re.fullmatch(r"\$\{VCOT_[CG]PU_BASE:-[\w./-]+:\S+\}", service["build"]["args"]["BASE"])


@pytest.mark.parametrize("name", SERVICES)
def test_no_key_is_written_in_the_file(name: str) -> None:
    variables = SERVICES[name].get("environment", [])
    if isinstance(variables, dict):
        assert not any(SECRET.search(variable) for variable in variables if not variable.endswith("_CREATION"))
    else:
        assert not any("=" in variable for variable in variables)
    assert not any(SECRET.search(argument) for argument in SERVICES[name].get("build", {}).get("args", ()))


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu", "judge"])
def test_vllm_is_reached_by_an_inner_network_only_and_holds_no_key(name: str) -> None:
    assert networks(name) <= INNER
    assert "ports" not in SERVICES[name]
    assert not isinstance(SERVICES[name].get("environment", {}), list)
    assert "runs:/vcot/runs:ro" in SERVICES[name]["volumes"]


def test_only_the_gateway_and_prometheus_reach_the_engines() -> None:
    """Its development endpoints allow arbitrary calls."""
    members = {name for name in SERVICES if "engine" in networks(name)}
    assert members == {"vllm", "vllm-cpu", "gateway", "gateway-cpu", "prometheus"}
    for name in INNER:
        options = COMPOSE["networks"][name]["driver_opts"]
        assert options == {"com.docker.network.bridge.inhibit_ipv4": "true"}, "else this machine's processes reach it"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_waits_for_what_it_needs_in_each_of_its_profiles(name: str) -> None:
    for needed, how in SERVICES[name].get("depends_on", {}).items():
        ends, answers = SERVICES[needed]["restart"] == "no", "healthcheck" in SERVICES[needed]
        expected = "completed_successfully" if ends else "healthy" if answers else "started"
        assert how["condition"] == f"service_{expected}"
        assert set(SERVICES[name]["profiles"]) <= set(SERVICES[needed]["profiles"])


@pytest.mark.parametrize(("recipe", "suffix"), [("paper", ""), ("nano", "-cpu")])
def test_the_containers_of_a_run_are_told_how_to_find_each_other(recipe: str, suffix: str) -> None:
    command = SERVICES[f"prepare{suffix}"]["command"]
    assert command[:5] == ["prepare", "--save", "--recipe", recipe, "--set"]
    resolved = load_recipe(recipe, interpolated(command[5:]))
    assert resolved.serve.devices == ()
    assert resolved.serve.upstreams == ("http://vllm:8000",)
    assert resolved.serve.url == "http://gateway:8100"
    assert resolved.train.worker == "remote"
    # The worker has the same GPU, which the gateway elsewhere cannot know.
    assert resolved.serve.while_training == ("auto" if suffix else "sleep")
    assert SERVICES[f"vllm{suffix}"]["networks"] == (["engine"] if not suffix else {"engine": {"aliases": ["vllm"]}})
    assert SERVICES[f"gateway{suffix}"]["networks"]["outer"] == {"aliases": ["gateway"]}
    for name in ("vllm", "gateway", "loop"):
        command = SERVICES[name + suffix]["command"]
        assert command[1:3] == ["--run", f"runs/{recipe}"]


def test_a_server_gets_several_gpus_where_they_are_named() -> None:
    """Docker joins the list with commas, so that one entry may hold several; inside they are counted from 0."""
    for name in ("vllm", "worker"):
        (devices,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert interpolated(devices["device_ids"], VCOT_GPU="2,3") == ["2,3"]
    command = interpolated(SERVICES["prepare"]["command"], VCOT_DEVICES='["0,1"]')
    assert load_recipe("paper", command[5:]).serve.devices_of(0) == "0,1"


def test_the_judge_is_started_as_vllm_documents_it() -> None:
    judge = SERVICES["judge"]
    assert judge["entrypoint"][:2] == ["vllm", "serve"]
    assert not judge["command"][0].startswith("-"), "the model comes by its place"


def test_images_are_pinned() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    ours = {service["image"] for service in BUILT.values()}
    assert ours == {f"vcot-{size}:{version}" for size in ("core", "cpu", "gpu")}
    for name in SERVICES.keys() - BUILT.keys():
        assert re.fullmatch(r"(?:\$\{\w+:-)?[\w/-]+:v?\d+\.\d+\.\d+\}?", SERVICES[name]["image"])
    for text in [(ROOT / "compose.yaml").read_text("utf-8"), *(path.read_text("utf-8") for path in IMAGES)]:
        assert ":latest" not in text


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_an_image_has_a_pinned_base_a_normal_user_and_no_secret(path: Path) -> None:
    text = path.read_text("utf-8")
    instructions = re.findall(r"^([A-Z]+) (.*)$", text, re.MULTILINE)
    default = next(value for name, value in instructions if name == "ARG").removeprefix("BASE=")
    assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", default)
    assert default in (ROOT / "compose.yaml").read_text("utf-8")
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)
    shipped = [stage for stage in stages if re.match(r"\S+ AS (core|cpu)\n", stage)] or stages[-1:]
    assert all(re.findall(r"^USER (.*)$", stage, re.MULTILINE)[-1] == "vcot" for stage in shipped)
    assert not any(SECRET.search(value) for name, value in instructions if name in ("ARG", "ENV"))
    assert "--mount" not in text  # the builder before BuildKit has none


def test_the_gpu_image_is_the_locks_vllm() -> None:
    (line,) = re.findall(r"^ARG BASE=vllm/vllm-openai:v(\S+)$", (ROOT / IMAGES[-1]).read_text("utf-8"), re.MULTILINE)
    assert f"\nvllm=={line} " in (ROOT / "requirements/gpu.txt").read_text("utf-8")


def test_the_env_file_in_git_holds_no_key() -> None:
    assert not SECRET.search(re.sub(r"(?m)^#.*$", "", (ROOT / ".env").read_text("utf-8")))


def test_the_default_profile_serves_on_a_gpu() -> None:
    (profile,) = re.findall(r"^COMPOSE_PROFILES=(\S+)$", (ROOT / ".env").read_text("utf-8"), re.MULTILINE)
    assert in_profile(profile) == {"prepare", "vllm", "gateway"}


def test_what_is_never_copied_into_an_image() -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert ignored[1] == "*"
    assert not {"!.env", "!runs", "!.git", "!."} & set(ignored)


@pytest.mark.parametrize("profile", PROFILES)
def test_compose_accepts_the_file(profile: str) -> None:
    if not (clients := compose_clients()):
        pytest.skip("neither docker compose nor docker-compose is installed")
    for client in clients:
        config = [*client, "-f", str(ROOT / "compose.yaml"), "--profile", profile, "config", "--quiet"]
        done = subprocess.run(config, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

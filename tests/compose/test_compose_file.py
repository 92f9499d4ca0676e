"""What compose.yaml promises that can be read off it, without a Docker Engine."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
IMAGES = sorted((ROOT / "services/images").glob("*.Dockerfile"))
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROFILES = sorted({profile for service in SERVICES.values() for profile in service["profiles"]})
SECRET = re.compile(r"(?i)\b\w*(key|token|secret|password)\w*\b")


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_that_stays_has_a_health_check_and_one_that_ends_is_not_restarted(name: str):
    service = SERVICES[name]
    if service["restart"] == "no":
        assert "healthcheck" not in service
    else:
        assert service["healthcheck"]["test"]
        assert "8100/health" in str(service["healthcheck"]["test"])


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_contained(name: str):
    service = SERVICES[name]
    assert service["init"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert not service.get("privileged")
    assert "network_mode" not in service


@pytest.mark.parametrize("name", SERVICES)
def test_keys_come_from_the_environment_at_run_time_only(name: str):
    service = SERVICES[name]
    assert not any("=" in variable for variable in service["environment"])
    assert not any(SECRET.search(argument) for argument in service["build"]["args"])


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_waits_for_the_health_of_what_it_needs_in_each_of_its_profiles(name: str):
    for needed, how in SERVICES[name].get("depends_on", {}).items():
        assert how["condition"] == "service_healthy"
        assert set(SERVICES[name]["profiles"]) <= set(SERVICES[needed]["profiles"])


def test_images_are_pinned():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    images = {service["image"] for service in SERVICES.values()}
    assert images == {f"vcot-gpu:{version}", f"vcot-cpu:{version}"}
    for text in [(ROOT / "compose.yaml").read_text("utf-8"), *(path.read_text("utf-8") for path in IMAGES)]:
        assert ":latest" not in text


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_an_image_has_a_pinned_base_a_normal_user_and_no_secret(path: Path):
    text = path.read_text("utf-8")
    instructions = re.findall(r"^([A-Z]+) (.*)$", text, re.MULTILINE)
    default = next(value for name, value in instructions if name == "ARG").removeprefix("BASE=")
    assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", default)
    assert default in (ROOT / "compose.yaml").read_text("utf-8")
    assert [value for name, value in instructions if name == "USER"][-1] == "vcot"
    assert not any(SECRET.search(value) for name, value in instructions if name in ("ARG", "ENV"))
    assert "--mount" not in text  # the builder before BuildKit has none


def test_the_gpu_image_is_the_locks_vllm():
    (line,) = re.findall(r"^ARG BASE=vllm/vllm-openai:v(\S+)$", (ROOT / IMAGES[-1]).read_text("utf-8"), re.MULTILINE)
    assert f"\nvllm=={line} " in (ROOT / "requirements/gpu.txt").read_text("utf-8")


def test_the_env_file_in_git_holds_no_key():
    assert not SECRET.search(re.sub(r"(?m)^#.*$", "", (ROOT / ".env").read_text("utf-8")))


def test_the_default_profile_is_the_gpus_server_alone():
    (profile,) = re.findall(r"^COMPOSE_PROFILES=(\S+)$", (ROOT / ".env").read_text("utf-8"), re.MULTILINE)
    assert [name for name, service in SERVICES.items() if profile in service["profiles"]] == ["server"]


def test_what_is_never_copied_into_an_image():
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert ignored[1] == "*"
    assert not {"!.env", "!runs", "!.git", "!."} & set(ignored)


@pytest.mark.parametrize("profile", PROFILES)
def test_compose_accepts_the_file(profile: str):
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("neither docker compose nor docker-compose is installed")
    config = [*command, "-f", str(ROOT / "compose.yaml"), "--profile", profile, "config", "--quiet"]
    done = subprocess.run(config, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

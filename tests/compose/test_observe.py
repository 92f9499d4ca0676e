"""The profile `observe`: what Prometheus scrapes and Grafana shows is what the gateway and vLLM export."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.compose.engine import ROOT
from tests.compose.test_compose_file import SERVICES
from tests.services.gateway.test_gateway import Bench
from vcot.services.gateway.http.limits import Places
from vcot.services.gateway.http.metrics import Metrics

FOLDER = ROOT / "services" / "observe"
PANELS: list[dict[str, Any]] = json.loads((FOLDER / "dashboard.json").read_text("utf-8"))["panels"]
QUERIES: list[dict[str, str]] = [target for panel in PANELS for target in panel["targets"]]
_METRIC = re.compile(r"\b(?:vcot_|vllm:)\w+")


def gateway_families(folder: Path) -> dict[str, set[str]]:
    """What the gateway exports: each family's name, with the names of its series."""
    bench = Bench(folder)
    text = Metrics(bench.fleet, Places(1, 1, 1)).render().decode()
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    histogram = ("_bucket", "_sum", "_count")
    return {name: {name + end for end in (histogram if kind == "histogram" else ("",))} for name, kind in kinds.items()}


def vllm_series() -> set[str]:
    """What vLLM's source says that it exports; the e2e test asks a real one."""
    spec = util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    source = (Path(spec.origin).parent / "v1/metrics/loggers.py").read_text("utf-8")
    names = re.findall(r"self\._(\w+)_cls\(\s*name=\"(vllm:\w+)\"", source)
    ends = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {name + end for kind, name in names for end in ends[kind]}


def test_each_metric_on_the_dashboard_is_exported(tmp_path: Path) -> None:
    exported = set.union(vllm_series(), *gateway_families(tmp_path).values())
    for query in QUERIES:
        used = set(_METRIC.findall(query["expr"]))
        assert used, query
        assert used <= exported, query


def test_each_figure_of_the_gateway_is_on_the_dashboard(tmp_path: Path) -> None:
    shown = {name for query in QUERIES for name in _METRIC.findall(query["expr"])}
    for family, series in gateway_families(tmp_path).items():
        assert series & shown or family.endswith("_created"), family


def test_panels_stand_beside_each_other_and_ask_the_provisioned_source() -> None:
    (source,) = yaml.safe_load((FOLDER / "grafana.yml").read_text("utf-8"))["datasources"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in PANELS]
    assert len(set(places)) == len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert {panel["datasource"]["uid"] for panel in PANELS} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"


def test_what_is_scraped_and_mounted_is_there() -> None:
    jobs = yaml.safe_load((FOLDER / "prometheus.yml").read_text("utf-8"))["scrape_configs"]
    aliases = {alias for service in SERVICES.values() for alias in _aliases(service)} | SERVICES.keys()
    targets = {job["job_name"]: job["dns_sd_configs"][0] for job in jobs}
    assert {target["names"][0] for target in targets.values()} <= aliases
    assert {name: target["port"] for name, target in targets.items()} == {"gateway": 8100, "vllm": 8000, "judge": 8000}
    for name in ("prometheus", "grafana"):
        mounted = [volume for volume in SERVICES[name]["volumes"] if volume.startswith(".")]
        assert mounted
        assert all((ROOT / volume.split(":")[0]).is_file() and volume.endswith(":ro") for volume in mounted)


def _aliases(service: dict[str, Any]) -> list[str]:
    networks = service["networks"]
    return [a for n in networks.values() for a in n.get("aliases", ())] if isinstance(networks, dict) else []


def test_the_key_comes_from_the_environment_into_the_file_that_is_read(tmp_path: Path) -> None:
    service = SERVICES["prometheus"]
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text("utf-8"))
    (path,) = [job["authorization"]["credentials_file"] for job in config["scrape_configs"] if "authorization" in job]
    assert str(Path(path).parent) in service["tmpfs"], "in memory only"
    shell, flag, script, name = service["entrypoint"]
    script = script.replace("$$", "$").replace(str(Path(path).parent), str(tmp_path)).replace("prometheus", "echo")
    line = [shell, flag, script, name, "--config.file=x"]
    done = subprocess.run(line, env={"VCOT_API_KEY": "s$cret %s"}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("--config.file=x\n", "")
    assert (tmp_path / Path(path).name).read_text() == "s$cret %s"
    assert (tmp_path / Path(path).name).stat().st_mode & 0o777 == 0o600


def test_prometheus_takes_the_configuration_and_every_query(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    (tmp_path / "key").write_text("x")
    text = (FOLDER / "prometheus.yml").read_text("utf-8").replace("/run/vcot/key", str(tmp_path / "key"))
    (tmp_path / "prometheus.yml").write_text(text)
    rules = [{"record": "x", "expr": query["expr"].replace("$__rate_interval", "1m")} for query in QUERIES]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    for check in (["config", "prometheus.yml"], ["rules", "--lint=none", "rules.yml"]):
        done = subprocess.run([promtool, "check", *check], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

"""docs/serving.md says what the code does."""

import re
from pathlib import Path

from services.gateway import content, keys, limits
from services.gateway.metrics import Metrics
from tests.services.bench_fleet import Bench

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")


def test_the_page_names_every_metric_and_refused_field(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    metrics = Metrics(bench.fleet, limits.Places(1, 1, 1))
    named = set(re.findall(r"^# TYPE (\w+) ", metrics.render().decode(), re.MULTILINE))
    named = {name for name in named if not name.endswith("_created")}
    assert named == set(re.findall(r"`(vcot_\w+)`", PAGE))
    for field in content.VLLM_FIELDS:
        assert f"`{field}`" in PAGE
    for name in (keys.API_KEYS_ENV, keys.ADMIN_KEY_ENV, "VCOT_API_KEY", limits.DEADLINE_HEADER):
        assert f"`{name}`" in PAGE


def test_the_page_names_the_recipes_limits(tmp_path: Path) -> None:
    settings = Bench(tmp_path).settings
    for field in ("max_in_flight", "max_queued", "max_body_mb", "max_held_mb"):
        assert f"| `serve.{field}` | {getattr(settings, field):g} |" in PAGE
    assert f"| `serve.max_image_pixels` | {settings.max_image_pixels:,} |" in PAGE

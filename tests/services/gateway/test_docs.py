"""docs/serving.md, docs/operations.md and docs/judging.md say what the code does."""

import re
from pathlib import Path

from tests.services.bench_fleet import Bench
from vcot.pipeline import concurrency, faults
from vcot.pipeline.judges import cost
from vcot.pipeline.sections import JudgeSection
from vcot.services.gateway.http import content, keys, limits
from vcot.services.gateway.http.metrics import Metrics

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "serving.md").read_text("utf-8")


def test_the_page_names_every_metric_and_refused_field(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    metrics = Metrics(bench.fleet, limits.Places(1, 1, 1))
    named = set(re.findall(r"^# TYPE (\w+) ", metrics.render().decode(), re.MULTILINE))
    named = {name for name in named if not name.endswith("_created")}
    assert named == set(re.findall(r"`(vcot_\w+)`", PAGE))
    watched = set(re.findall(r"\bvcot_\w+", (DOCS / "operations.md").read_text("utf-8")))
    assert len(watched) > 5
    assert watched <= named
    for field in content.VLLM_FIELDS:
        assert f"`{field}`" in PAGE
    for name in (keys.API_KEYS_ENV, keys.ADMIN_KEY_ENV, "VCOT_API_KEY", limits.DEADLINE_HEADER):
        assert f"`{name}`" in PAGE


def test_the_page_names_the_recipes_limits(tmp_path: Path) -> None:
    settings = Bench(tmp_path).settings
    for field in ("max_in_flight", "max_queued", "max_body_mb", "max_held_mb"):
        assert f"| `serve.{field}` | {getattr(settings, field):g} |" in PAGE
    assert f"| `serve.max_image_pixels` | {settings.max_image_pixels:,} |" in PAGE


def test_the_page_on_judging_names_its_limits_and_prices() -> None:
    page = (DOCS / "judging.md").read_text("utf-8")
    section = JudgeSection(kind="pointwise", model="gpt-4o-mini")
    assert f"tried again, {concurrency.MAX_ATTEMPTS} times" in page
    assert f"up to {concurrency.MAX_PATIENCE_S / 60:g} minutes" in page
    assert f"more\nthan {faults.MAX_WAIT_S / 60:g} minutes" in page
    assert f"`judge.max_unjudged` ({section.max_unjudged:g})" in page
    assert f"OpenAI's prices of {cost.PRICES_AS_OF}" in page
    assert cost.estimate_cost(136_488, 3116, 19, cost.find_prices(section)).summary in page
    sizes = {"low": (640, 480), "high": (512, 512)}
    for detail, (width, height) in sizes.items():
        tokens = cost.guess_prompt_tokens("gpt-4o-mini", detail, width=width, height=height, num_text_tokens=0)
        assert f"{tokens:,}" in page

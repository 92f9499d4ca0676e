"""The report in a real browser: nothing is asked of the network, and it reads well on a telephone."""

import html
import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from vcot.services.report.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
run = runpy.run_path(str(Path(__file__).parents[1] / "services" / "report" / "report_data.py"))
make_data = run["make_data"]

# A page around the report that measures it; the report itself allows no script.
FRAME = """<!doctype html><iframe id="report" width="{width}" height="900" srcdoc="{report}"></iframe>
<pre id="seen"></pre><script>
report.onload = () => {{
  const page = report.contentDocument, style = (e) => report.contentWindow.getComputedStyle(e);
  const wide = [...page.querySelectorAll("body *")].filter((e) =>
    e.getBoundingClientRect().right > page.documentElement.clientWidth + 1 && !e.closest(".scroll, pre, svg"));
  seen.textContent = JSON.stringify({{
    title: page.title, requests: report.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name)
      .filter((name) => !name.startsWith("data:")),
    scrollWidth: page.documentElement.scrollWidth, clientWidth: page.documentElement.clientWidth,
    cut: [...page.querySelectorAll("td")].filter((e) => e.getBoundingClientRect().right > page.documentElement.clientWidth)
      .map((e) => e.innerText),
    labels: [...page.querySelector("#table-differences").closest("table").querySelectorAll("tbody tr:first-child td")]
      .map((e) => [report.contentWindow.getComputedStyle(e, "::before").content, e.innerText]),
    wide: wide.map((e) => e.outerHTML.slice(0, 80)), headings: [...page.querySelectorAll("h2")].map((e) => e.innerText),
    images: [...page.images].map((image) => image.naturalWidth), finding: page.querySelector(".finding").innerText,
    figures: [...page.querySelectorAll("figure svg")].map((e) => e.getBoundingClientRect().height),
    paper: style(page.body).backgroundColor, ink: style(page.body).color,
  }});
}};
</script>"""


def look(tmp_path, width, *options, data=None):
    """What the browser sees of the report in a window `width` pixels wide."""
    report = write_report(data or make_data(), tmp_path / "report.html").read_text("utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width, report=html.escape(report)), "utf-8")
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--enable-logging=stderr",
            *options, "--dump-dom", frame.as_uri(),
        ],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    return json.loads(html.unescape(seen[1])), console


@pytest.mark.parametrize("width", [390, 768, 1440])
def test_report_in_a_browser(tmp_path, width):
    seen, console = look(tmp_path, width)
    assert console == []
    assert seen["requests"] == []
    assert seen["headings"] == ["Results", "Training", "Preference data", "Examples", "The run"]
    assert "answers more questions right" in seen["finding"]
    assert seen["images"] == [56, 56]
    assert len(seen["figures"]) == 7
    assert min(seen["figures"]) > 150
    assert seen["wide"] == []
    assert seen["scrollWidth"] <= seen["clientWidth"] <= width
    assert seen["cut"] == [] or width == 768, "there, a shadow says that more is to the right"


def test_on_a_telephone_each_number_stands_under_its_columns_name(tmp_path):
    seen, _ = look(tmp_path, 390)
    assert [label.strip('"') for label, _ in seen["labels"]] == [
        "Prompt", "Temp.", "Avg", "95 % interval", "p (Holm)", "Exact p", "Detectable", "Questions",
    ]  # fmt: skip
    assert {label for label, _ in look(tmp_path, 768)[0]["labels"]} == {"none"}


def test_report_follows_the_dark_scheme(tmp_path):
    light, _ = look(tmp_path, 800)
    dark, _ = look(tmp_path, 800, "--blink-settings=preferredColorScheme=0")
    assert light["paper"] == "rgb(246, 247, 249)"
    assert dark["paper"] == "rgb(15, 18, 23)"
    assert light["ink"] != dark["ink"]


def test_hostile_texts_run_nothing_and_break_nothing(tmp_path):
    seen, console = look(tmp_path, 390, data=run["make_hostile"]("\n".join(run["HOSTILE"])))
    assert (console, seen["requests"]) == ([], [])
    assert seen["title"] != "hacked"
    assert seen["headings"] == ["Results", "Training", "Preference data", "Examples", "The run"]
    assert (seen["wide"], seen["cut"]) == ([], [])
    assert seen["scrollWidth"] <= seen["clientWidth"]

"""A bundle from disk, in a real browser: it looks as the viewer does, asks for nothing else, and runs nothing."""

from pathlib import Path

import pytest

from tests.browser.chromium import CHROMIUM, browsing
from tests.services.view.view_run import HOSTILE, made, prepared
from vcot.services.view.bundle import write_bundle

__all__ = ["made", "prepared"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
CHECK = Path(__file__).with_name("readable.js").read_text("utf-8")
ASKED = "performance.getEntriesByType('resource').map((entry) => entry.name)"


@pytest.fixture(scope="module")
def page(made, tmp_path_factory):
    """A page of a browser; `here` is the bundle's address."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    write_bundle(made.directory, folder, 1000)
    with browsing(tmp_path_factory.mktemp("profile")) as page:
        page.here, page.folder = folder.as_uri(), folder
        yield page


@pytest.fixture(autouse=True)
def unused_console(page):
    page.console.clear()
    yield
    assert page.console == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_every_page_reads_well(page, width, dark):
    page.shape(width, 900, dark=dark)
    paper = {False: "rgb(246, 247, 249)", True: "rgb(15, 18, 23)"}[dark]
    for path in sorted(page.folder.rglob("*.html")):
        page.open(path.as_uri())
        assert page.ask(CHECK) == [], path
        assert page.ask("getComputedStyle(document.body).backgroundColor") == paper, "the style is let in"
        assert all(page.ask("[...document.images].map((image) => image.complete && image.naturalWidth > 0)")), path
        assert [name for name in page.ask(ASKED) if not name.startswith(page.here)] == []


def test_links_lead_through_all_tasks_by_keyboard(page):
    page.open(f"{page.here}/index.html")
    page.ask("document.querySelector('nav a[href=\"tasks.html\"]').focus()")
    page.press("Enter")
    page.wait("location.pathname.endsWith('/tasks.html') && document.readyState === 'complete'")
    page.ask("document.querySelector('.list a').focus()")
    page.press("Enter")
    page.wait("location.pathname.endsWith('/tasks/01.html') && document.readyState === 'complete'")
    for number in range(2, 22):
        page.ask("document.querySelector('a[rel=next]').focus()")
        page.press("Enter")
        page.wait(f"location.pathname.endsWith('/tasks/{number:02}.html') && document.readyState === 'complete'")
    assert not page.ask("document.querySelector('a[rel=next]')")


def test_hostile_texts_run_nothing_even_where_they_came_through(page):
    shown = 0
    for path in page.folder.glob("tasks/*.html"):
        page.open(path.as_uri())
        assert page.ask("document.title") != "hacked"
        shown += HOSTILE[0] in page.ask("document.body.innerText")
    assert shown
    page.ask("document.body.insertAdjacentHTML('beforeend', `<img src=x onerror=\"document.title='hacked'\">`)")
    page.wait("performance.now() > 500")
    assert page.ask("document.title") != "hacked"
    assert any("Content Security Policy" in line for line in page.console)
    page.console.clear()


def test_nothing_of_a_network_is_let_in(page):
    page.open(f"{page.here}/index.html")
    page.ask("document.body.insertAdjacentHTML('beforeend', '<img src=\"http://127.0.0.1:9/x.png\" alt=\"x\">')")
    page.wait("performance.now() > 300")
    assert any("Content Security Policy" in line for line in page.console)
    page.console.clear()

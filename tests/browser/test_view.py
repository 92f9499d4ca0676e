"""The viewer in a real browser: no complaint, keys and filters work, labels are kept, and it reads well in every shape."""

import re
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn

from tests.browser.chromium import CHROMIUM, browsing
from tests.services.view.view_run import HOSTILE, TOKEN, made, prepared
from vcot.services.view.labels import read_labels
from vcot.services.view.viewer import create_app

__all__ = ["made", "prepared"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
PAGES = ("/runs/0/", "/runs/0/tasks", "/runs/0/labels")
CHECK = Path(__file__).with_name("readable.js").read_text("utf-8")


@contextmanager
def serving(made):
    """The viewer at a port, as `vcot view` has it."""
    config = uvicorn.Config(create_app([made.shown()], TOKEN), port=0, log_level="error", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            threading.Event().wait(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def page(made, tmp_path_factory):
    """A page that was let in; `here` is where the viewer answers."""
    with serving(made) as here, browsing(tmp_path_factory.mktemp("profile")) as page:
        page.here = here
        page.open(f"{here}/?token={TOKEN}")
        assert page.ask("location.search") == "", "the address does not show the token"
        yield page


@pytest.fixture(autouse=True)
def unused_console(page):
    page.console.clear()
    yield
    assert page.console == []


def find_task(page, query):
    page.open(f"{page.here}/runs/0/tasks?{query}")
    return "/runs/0/" + page.ask("document.querySelector('.list a').getAttribute('href')")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1440])
def test_every_page_reads_well(page, width, dark):
    tasks = [find_task(page, query) for query in ("mark=pair%7Cmade", "outcome=lost", "text=null&part=train")]
    page.shape(width, 900, dark=dark)
    for place in (*PAGES, *tasks):
        page.open(page.here + place)
        assert page.ask(CHECK) == [], place
        loaded = page.ask("[...document.images].map((image) => image.complete && image.naturalWidth > 0)")
        assert all(loaded), place


def test_filters_work_by_choosing(page):
    page.shape(1200, 900)
    page.open(f"{page.here}/runs/0/tasks")
    assert page.ask("document.querySelector('#found').innerText") == "21 tasks"
    page.ask(
        "(() => { const s = document.querySelector('#f-part'); s.value = 'eval'; s.dispatchEvent(new Event('change')); })()"
    )
    page.wait("document.readyState === 'complete' && document.querySelector('#found')?.innerText === '9 tasks'")
    assert "part=eval" in page.ask("location.search")


def test_keys_go_through_tasks(page):
    page.open(f"{page.here}/runs/0/tasks?part=train")
    page.press("/")
    assert page.ask("document.activeElement.id") == "f-text"
    page.press("Escape")
    page.ask("document.activeElement.blur()")
    page.press("j")
    page.press("j")
    second = page.ask("document.querySelector('tr.at a').href")
    assert page.ask("document.activeElement.href") == second
    page.press("Enter")
    page.wait(f"location.href === '{second}' && document.readyState === 'complete'")
    page.press("ArrowRight")
    page.wait(
        f"location.href !== '{second}' && document.readyState === 'complete' && !!document.querySelector('#task')"
    )
    third = page.ask("location.href")
    page.press("k")
    page.wait(f"location.href === '{second}' && document.readyState === 'complete'")
    page.press("j")
    page.wait(f"location.href === '{third}' && document.readyState === 'complete'")
    page.press("u")
    page.wait("location.pathname.endsWith('/tasks') && location.search === '?part=train'")


def test_labels_are_kept_by_key_and_by_button(page, made):
    place = find_task(page, "mark=pair%7Cmade")
    page.open(page.here + place)
    page.press("1")
    assert page.ask("document.activeElement.id") == "chain-1"
    page.press("r")
    page.wait("document.querySelector('#said').innerText === 'Kept: Right.'")
    page.ask("document.querySelector('.diff .label').click()")
    page.wait("document.querySelector('#said').innerText.endsWith('is better.')")
    labels = read_labels(made.shown().labels_path)
    assert ([one.said for one in labels.marked.values()], len(labels.compared)) == (["right"], 1)
    page.open(page.here + place)
    assert page.ask("document.querySelectorAll('[aria-pressed=true]').length") == 2
    page.press("1")
    page.press("r")
    page.wait("document.querySelector('#said').innerText === 'The label is taken back.'")
    assert not read_labels(made.shown().labels_path).marked


def test_keys_are_told(page):
    page.open(f"{page.here}/runs/0/tasks")
    page.press("?")
    assert page.ask("document.querySelector('dialog').open")
    assert "next task" in page.ask("document.querySelector('dialog').innerText")
    page.press("Escape")
    page.wait("!document.querySelector('dialog').open")


def test_hostile_texts_run_nothing(page):
    page.open(page.here + find_task(page, "text=null&part=train"))
    assert page.ask("document.title") != "hacked"
    assert HOSTILE[0] in page.ask("document.body.innerText")
    assert page.ask("document.querySelectorAll('.words script, .words img, .words b').length") == 0
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", page.ask("document.body.innerText"))


def test_the_policy_stops_what_would_run(page):
    """Even where a text came through unescaped, nothing of it would run."""
    page.open(f"{page.here}/runs/0/tasks")
    page.ask("document.body.insertAdjacentHTML('beforeend', `<img src=x onerror=\"document.title='hacked'\">`)")
    page.wait("performance.now() > 500")
    assert page.ask("document.title") != "hacked"
    assert any("Content Security Policy" in line for line in page.console)
    page.console.clear()


def test_what_is_live_comes_by_itself(page, made):
    page.open(f"{page.here}/runs/0/")
    page.ask("document.querySelector('#live').innerHTML = 'old'")
    page.wait("document.querySelector('#live').innerText.includes('What was asked for')")


def test_without_a_script_the_pages_are_whole(page):
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.call("Page.navigate", url=page.here + "/runs/0/tasks?part=eval")
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)
    page.wait("document.querySelectorAll('.list tbody tr').length === 9")


def test_it_prints_without_its_controls(page):
    page.open(page.here + find_task(page, "mark=pair%7Cmade"))
    page.call("Emulation.setEmulatedMedia", media="print")
    seen = page.ask("['.says', '.pages', '.two'].map((s) => getComputedStyle(document.querySelector(s)).display)")
    page.call("Emulation.setEmulatedMedia", media="")
    assert seen == ["none"] * 3

"""axe finds nothing serious in the viewer's pages and in the report, light and dark, on a telephone and on a wide screen."""

import pytest

from tests.browser.axe import IS_THERE, find_faults
from tests.browser.chromium import CHROMIUM, browsing
from tests.browser.test_report import make_data
from tests.browser.test_view import find_task, serving
from tests.services.view.view_run import TOKEN, made, prepared
from vcot.services.report.page import write_report

__all__ = ["made", "prepared"]
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed"),
    pytest.mark.skipif(not IS_THERE, reason="axe is not installed; `make setup` has it, but for GPUs"),
]
SHAPES = [(width, dark) for width in (390, 1280) for dark in (False, True)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.parametrize(("width", "dark"), SHAPES)
def test_the_viewers_pages(page, made, width, dark):
    page.shape(width, 900, dark=dark)
    with serving(made) as here:
        page.here = here
        page.open(f"{here}/?token={TOKEN}")
        task = find_task(page, "mark=pair%7Cmade")
        for place in ("/runs/0/", "/runs/0/tasks", "/runs/0/labels", task):
            page.open(here + place)
            assert find_faults(page) == [], place


@pytest.mark.parametrize(("width", "dark"), SHAPES)
def test_the_report(page, tmp_path, width, dark):
    page.shape(width, 900, dark=dark)
    page.open(write_report(make_data(), tmp_path / "report.html").as_uri())
    assert find_faults(page) == []


def test_a_fault_is_found(page, tmp_path):
    (tmp_path / "bad.html").write_text('<title>x</title><html lang="en"><main><h1>x</h1><img src="x"></main>', "utf-8")
    page.open((tmp_path / "bad.html").as_uri())
    assert [fault.partition(":")[0] for fault in find_faults(page)] == ["image-alt"]

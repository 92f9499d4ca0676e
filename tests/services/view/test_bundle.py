"""A bundle: files that stand by themselves, a choice that is the same each time, and the truth about what is left out."""

import fcntl
import json
import os
import re
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import numpy as np
import pytest

from tests.services.cli.test_cli import vcot
from tests.services.view.view_run import HOSTILE, TOKEN, K, made, own, prepared, respond
from vcot.pipeline.errors import InputError
from vcot.services.run.rounds import list_rounds
from vcot.services.view.bundle import MANIFEST, choose, write_bundle
from vcot.services.view.index import FOLDER
from vcot.services.view.indexing import index_once
from vcot.services.view.labels import Label, keep_label
from vcot.services.view.queries import Filter

__all__ = ["made", "own", "prepared", "vcot"]
NUM = 9


class Elements(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(page)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


def read_pages(folder):
    return {str(path.relative_to(folder)): Elements(path.read_text("utf-8")) for path in folder.rglob("*.html")}


@pytest.fixture(scope="module")
def bundle(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "new" / "bundle"
    write_bundle(made.directory, folder, NUM)
    return folder


def test_every_address_in_it_is_a_file_of_it(bundle):
    asked = set()
    for page, found in read_pages(bundle).items():
        for _, attributes in found.tags:
            for name in ("href", "src"):
                place = attributes.get(name, "#").partition("#")[0]
                parts = urlsplit(urljoin(f"file:///{page}", place))
                assert parts.scheme == "file", f"{page} leads out by {place}"
                asked.add(parts.path.lstrip("/"))
    files = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert asked <= files
    assert files - asked == {MANIFEST}, "nothing lies there that no page shows"


def test_pages_have_a_policy_and_no_script_form_or_token(bundle):
    pages = read_pages(bundle)
    assert len(pages) == NUM + 2
    for page, found in pages.items():
        assert {tag for tag, _ in found.tags}.isdisjoint({"script", "form", "input", "button", "select", "iframe"}), (
            page
        )
        policies = [a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
        assert len(policies) == 1
        assert policies[0].startswith("default-src 'none'")
        assert "script-src" not in policies[0]
        assert not [
            name for _, attributes in found.tags for name in attributes if name.startswith("on") or name == "style"
        ]
    assert not [path for path in bundle.rglob("*.*") if TOKEN.encode() in path.read_bytes()]


def test_a_task_has_all_its_chains_as_in_the_viewer(made, bundle):
    told = json.loads((bundle / MANIFEST).read_text())["tasks"]
    for number, name in enumerate(told, start=1):
        part, _, task = name.partition("/")
        page = Elements((bundle / f"tasks/{number}.html").read_text("utf-8"))
        chains = [a for _, a in page.tags if "chain" in a.get("class", "").split()]
        asked = made.shown().find_example(part, task)
        assert len(chains) == len(asked.chains)
        for chain in asked.chains:
            assert " ".join(chain.text.split()) in page.text
            assert " ".join(chain.rationale.split()) in page.text
        images = [a["src"] for tag, a in page.tags if tag == "img"]
        assert [(bundle / "tasks" / source).read_bytes() for source in images] == [made.shown().read_image(asked, 0)[0]]


def test_the_pages_say_what_is_left_out_and_how_it_was_chosen(bundle):
    pages = read_pages(bundle)
    assert "with 9 of its 21 tasks" in pages["index.html"].text
    assert "What was asked for, and what became of it" in pages["index.html"].text
    assert "9 of the run's 21 tasks are here" in pages["tasks.html"].text
    assert "the other 12 are only in the run" in pages["tasks.html"].text
    assert "the shares here are not the run's" in pages["tasks.html"].text


def test_its_overview_has_every_table_row_of_the_viewers(made, bundle):
    tables = [
        re.findall(r"<tr.*?</tr>", page[page.index("<main") :], re.DOTALL)
        for page in (made.client().get("/runs/0/").text, (bundle / "index.html").read_text("utf-8"))
    ]
    shown, kept = (set(rows) for rows in tables)
    assert any("base, cot at 0.4" in row for row in shown), "the parser matrix is there"
    assert shown <= kept


def test_a_rare_kind_is_there(bundle):
    rows = re.findall(
        r'<th scope="row">([^<]+)</th><td data-label="Here" class="n">(\d+)</td><td data-label="In the run" class="n">(\d+)',
        (bundle / "tasks.html").read_text("utf-8"),
    )
    found = {name: (int(here), int(there)) for name, here, there in rows}
    assert found["refused: too long"] == found["failed: overloaded"] == (1, 1)
    assert all(1 <= here <= there for here, there in found.values())
    assert {"outcome: right before, now wrong", "pair: made"} <= set(found)


def test_the_same_run_gives_the_same_bundle_and_another_size_holds_it(made, bundle, tmp_path):
    write_bundle(made.directory, tmp_path / "again", NUM)
    files = {str(path.relative_to(bundle)): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    again = {
        str(path.relative_to(tmp_path / "again")): path for path in (tmp_path / "again").rglob("*") if path.is_file()
    }
    assert set(files) == set(again)
    assert [name for name, data in files.items() if again[name].read_bytes() != data] == []
    more = write_bundle(made.directory, tmp_path / "more", NUM + 3)
    assert set(json.loads(files[MANIFEST])["tasks"]) < set(more.tasks)


def test_the_kinds_take_turns():
    kinds = [np.array(own, dtype=np.int32) for own in ([1, 2, 3, 4, 5, 6], [6, 7], [8])]
    names = {number: f"train/{number}" for number in range(1, 9)}
    chosen = list(choose(kinds, names, 5))
    assert set(chosen[:3]) >= {8}
    assert len(chosen) == len(set(chosen)) == 5
    assert {6, 7} <= set(chosen)
    assert sorted(choose(kinds, names, 99)) == list(range(1, 9))
    assert list(choose(kinds, names, 0)) == []


def test_all_tasks_and_none(made, tmp_path):
    all_of_it = write_bundle(made.directory, tmp_path / "bundle", 1000)
    assert (all_of_it.num_tasks, all_of_it.num_left_out) == (21, 0)
    assert "only in the run" not in (tmp_path / "bundle" / "tasks.html").read_text("utf-8")
    none = write_bundle(made.directory, tmp_path / "bundle", 0)
    assert (none.num_tasks, none.num_left_out) == (0, 21)
    assert not (tmp_path / "bundle" / "tasks").exists(), "the earlier bundle's pages are gone"


def test_hostile_texts_are_what_they_are(made, tmp_path):
    write_bundle(made.directory, tmp_path / "bundle", 1000)
    pages = read_pages(tmp_path / "bundle")
    assert any(HOSTILE[0] in found.text for found in pages.values())
    for found in pages.values():
        assert {tag for tag, _ in found.tags}.isdisjoint({"b", "textarea", "svg", "style"})
    for path in (tmp_path / "bundle").rglob("*.html"):
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x07\x1b]", path.read_text("utf-8"))


def test_labels_are_told_as_agreement_only(own, tmp_path):
    own.summarise()
    (item, *_) = own.shown().finder.find(Filter(mark="pair|made")).items
    example = own.shown().find_example(item.part, item.task)
    by_place = {chain.answered.place: chain.key for chain in example.chains}
    label = {"part": "train", "task": example.item.task, "at": 1.0}
    keep_label(
        own.shown().labels_path, Label(**label, response=by_place["chosen"], said="better", than=by_place["rejected"])
    )
    write_bundle(own.directory, tmp_path / "bundle", 3)
    assert "ranks as you do in 100%" in (tmp_path / "bundle" / "index.html").read_text("utf-8")


def test_a_folder_of_something_else_is_left_alone(made, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="no earlier bundle"):
        write_bundle(made.directory, tmp_path, 3)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_present_folder_is_not_replaced_and_a_link_to_one_is_followed(made, tmp_path, monkeypatch):
    (tmp_path / "pages").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pages")
    for _ in range(2):
        write_bundle(made.directory, tmp_path / "link", 2)
        assert (tmp_path / "pages" / "index.html").is_file()
    monkeypatch.chdir(tmp_path / "pages")
    with pytest.raises(InputError, match="started in, which a bundle would replace"):
        write_bundle(made.directory, Path(), 2)


def test_an_index_that_another_viewer_is_still_making_is_not_taken_for_whole(own, tmp_path):
    (own.directory / FOLDER).mkdir()
    with (own.directory / FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="0 of 0 tasks so far; wait"):
            write_bundle(own.directory, tmp_path / "bundle", 3)
    assert not (tmp_path / "bundle").exists()


def test_of_a_run_that_may_not_be_written_it_leaves_no_index_behind(own, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert write_bundle(own.directory, tmp_path / "bundle", 3).num_tasks == 3
    assert not (own.directory / FOLDER).exists()
    assert not list((tmp_path / "temporary").iterdir())


def test_of_a_run_that_cannot_be_opened_it_says_why(own, vcot, tmp_path):
    (own.directory / "recipe.toml").write_text("name = ")
    code, _, err = vcot("view", own.directory, "--bundle", tmp_path / "out")
    assert (code, "recipe.toml" in err, "Traceback" in err) == (2, True, False), err


def test_what_an_open_viewer_has_not_read_yet_is_not_left_out_in_silence(own, tmp_path):
    def go_on(session):
        request = list(list_rounds(session)[0].requests())[2]
        session.run.ledger.put([respond(request, index, "Anew. <R> The answer is (A).") for index in range(K)])

    folder = own.directory / FOLDER
    index_once(own.directory, folder)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert write_bundle(own.directory, tmp_path / "before", 1).num_tasks == 1
        own.change(go_on)
        with pytest.raises(InputError, match="not read yet what the run was given last; try again"):
            write_bundle(own.directory, tmp_path / "after", 1)
        with own.writing():
            assert write_bundle(own.directory, tmp_path / "after", 1).num_tasks == 1, "its pages say that it goes on"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tasks", 3], "add --bundle DIR"),
        (["--bundle", "x", "--tasks", -1], "0 or more"),
        (["--bundle", "x", "--port", 8400], "no --port"),
    ],
)
def test_flags_that_do_not_go_together(made, vcot, flags, said):
    code, _, err = vcot("view", made.directory, *flags)
    assert (code, said in err) == (2, True), err


def test_the_command_says_where_it_is_and_what_it_holds(made, vcot, tmp_path):
    code, _, err = vcot("view", made.directory, "--bundle", tmp_path / "out", "--tasks", 4)
    assert (code, "4 tasks with their chains and images; 17 more are only in the run" in " ".join(err.split())) == (
        0,
        True,
    )
    assert (tmp_path / "out" / "index.html").is_file()

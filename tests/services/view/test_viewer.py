"""The viewer's pages: what they show of a run, hostile texts as what they are, labels, and what is wrong in a sentence."""

import html
import json
import re
from html.parser import HTMLParser

import pytest

from tests.services.view.view_run import HOST, HOSTILE, K, made, own, prepared
from vcot.pipeline.records import Response
from vcot.services.run.live import LIVE
from vcot.services.view.labels import read_labels

__all__ = ["made", "own", "prepared"]
POST = {"origin": HOST}


class Elements(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def list_places(page):
    return [html.unescape(place) for place in re.findall(r'href="(task\?[^"]+)"', page)]


def open_task(client, query="", number=0):
    places = list_places(client.get(f"/runs/0/tasks?{query}").text)
    return client.get(f"/runs/0/{places[number]}")


def test_overview_is_the_reports_page_with_what_is_live(made):
    client = made.client()
    page = Elements(client.get("/").text)
    assert "vcot view" in page.text
    for words in (
        "What was asked for, and what became of it",
        "Preference data",
        "Accuracy in %",
        "too long",
        "overloaded",
        "Parser matrix",
        "vlmevalkit",
    ):
        assert words in page.text, words
    figures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(figures) >= 4
    for figure in figures:
        answer = client.get(f"/runs/0/{figure}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/svg+xml")
    assert not [tag for tag, attributes in page.tags if "style" in attributes or tag in ("style", "svg")], (
        "the policy forbids them"
    )
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert [script["src"] for script in scripts] == ["../../static/view.js"]


def test_a_command_at_work_is_seen(own):
    client = own.client()
    live = {
        "command": "sample", "pid": 1, "began_at": 0, "updated_at": 0, "stage": "sample", "what": "12 tasks",
        "unit": "responses", "done": 10, "total": 36, "per_s": 2.0,
    }  # fmt: skip
    (own.directory / LIVE).write_text(json.dumps(live))
    own.index()
    with own.writing():
        page = Elements(client.get("/runs/0/live").text).text
    assert "At work: vcot sample" in page
    assert "10 of 36 responses, 2.0 a second, about 13 s left" in page
    assert "was killed" in Elements(client.get("/runs/0/live").text).text


def test_before_there_is_an_index_the_pages_say_so(own):
    client = own.client()
    assert "The overview is being made" in Elements(client.get("/runs/0/").text).text
    assert "0 of 0 tasks so far" in Elements(client.get("/runs/0/tasks").text).text
    own.index()
    assert "0 of 0" not in client.get("/runs/0/tasks").text


def test_a_task_shows_all_its_chains_with_what_the_judge_said(made):
    page = Elements(open_task(made.client(), "mark=pair%7Cmade").text)
    articles = [
        attributes["class"].split() for tag, attributes in page.tags if "chain" in attributes.get("class", "").split()
    ]
    assert len(articles) == K
    assert sum("chosen" in kinds for kinds in articles) == sum("rejected" in kinds for kinds in articles) == 1
    for words in ("gold", "score 1.00", "statements true", "What differs", "Only in 1 (chosen)", "is better"):
        assert words in page.text, words
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    shown = made.client().get(f"/runs/0/{image['src']}")
    assert (shown.headers["content-type"], shown.content[:4]) == ("image/png", b"\x89PNG")
    assert image["alt"]


def test_a_flip_compares_the_base_with_the_policy(made):
    page = Elements(open_task(made.client(), "outcome=lost&checkpoint=dpo-x").text)
    assert "What differs" in page.text
    headings = [attributes for tag, attributes in page.tags if tag == "h2"]
    assert len(headings) == 2 + 2, "question, difference, and two prompts, each with the answers of both checkpoints"
    chains = [attributes for tag, attributes in page.tags if "chain" in attributes.get("class", "").split()]
    assert (len(chains), page.text.count(" base"), page.text.count(" dpo-x")) == (4, 2, 2)


def test_next_and_previous_go_through_the_filter(made):
    client, seen = made.client(), []
    place = list_places(client.get("/runs/0/tasks?part=train&sort=best&down=1").text)[0]
    while place:
        page = client.get(f"/runs/0/{place}").text
        seen.append(re.search(r'data-task="([^"]+)"', page)[1])
        found = re.search(r'rel="next" href="([^"]+)"', page)
        place = html.unescape(found[1]) if found else None
    assert len(seen) == len(set(seen)) == 9


def test_an_error_is_shown_as_one_and_takes_no_label(made):
    page = open_task(made.client(), "mark=failed%7Coverloaded").text
    assert Elements(page).text.count("no response") == K
    assert "data-said" not in page


def test_hostile_texts_are_what_they_are(made):
    page = open_task(made.client(), "text=null&part=train").text
    found = Elements(page)
    assert [attributes for tag, attributes in found.tags if tag == "script"] == [
        {"src": "../../static/view.js", "defer": None}
    ]
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert {tag for tag, _ in found.tags}.isdisjoint({"b", "style", "textarea", "iframe", "svg"})
    shown = {attributes.get("src", "").split("?")[0] for tag, attributes in found.tags if tag == "img"}
    assert shown == {"image"}
    assert "{{ 7 * 7 }}" in found.text
    assert HOSTILE[0] in found.text
    for sign in "\u202e\u2066\x00\x07\x1b":
        assert sign not in page
    assert r"\u202egnorw\u202c" in found.text
    listed = made.client().get("/runs/0/tasks", params={"text": HOSTILE[1]})
    assert not [name for _, attributes in Elements(listed.text).tags for name in attributes if name == "onerror"]


def test_a_hostile_filter_and_name_are_only_text(made):
    client = made.client()
    for place in (
        "/runs/0/tasks?sort=<script>",
        '/runs/0/tasks?subject="><script>',
        "/runs/0/task?of=train&task=<script>",
    ):
        answer = client.get(place)
        assert len(re.findall("<script", answer.text)) == 1


def say(client, page, said, index=0, than=None):
    part, task = re.search(r'data-part="([^"]+)" data-task="([^"]+)"', page).groups()
    keys = list(dict.fromkeys(re.findall(r'<option value="([0-9a-f]{64})"', page)))
    body = {"part": part, "task": task, "response": keys[index], "said": said}
    body |= {"than": keys[than]} if than is not None else {}
    return client.post("/runs/0/labels", json=body, headers=POST)


def test_labels_are_kept_shown_and_compared_with_the_judge(own):
    own.summarise()
    client = own.client()
    page = open_task(client, "mark=pair%7Cmade").text
    assert say(client, page, "right", 0).json() == {"kept": True}
    assert say(client, page, "wrong", 1).status_code == 200
    assert len(read_labels(own.shown().labels_path).marked) == 2
    again = open_task(client, "label=yes").text
    assert again.count('aria-pressed="true"') == 2
    assert (
        "ranks as you do in 100% (0% to 100%) of 1 comparison within"
        in Elements(client.get("/runs/0/labels").text).text
    )
    assert "ranks as you do" in client.get("/runs/0/live").text
    assert say(client, page, "better", 1, than=0).status_code == 200
    assert "ranks as you do in 0%" in Elements(client.get("/runs/0/labels").text).text
    assert len(list_places(client.get("/runs/0/tasks?label=no").text)) == 20


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"part": "train", "task": "x", "response": "y", "said": "right"}, 400, "no such response"),
        ({"part": "train", "task": "x", "response": "y", "said": "good"}, 400, "said"),
        ({"said": "right"}, 400, "no label"),
        ([1], 400, "no JSON object"),
        ({"part": "x" * 20_000}, 413, "not that long"),
    ],
)
def test_a_label_that_makes_no_sense_is_not_kept(own, body, status, said):
    answer = own.client().post("/runs/0/labels", json=body, headers=POST)
    assert (answer.status_code, said in answer.text) == (status, True), answer.text
    assert not own.shown().labels_path.exists()


def test_a_label_is_taken_as_json_only(own):
    answer = own.client().post("/runs/0/labels", data={"said": "right"}, headers=POST)
    assert answer.status_code == 415


def test_several_runs_stand_side_by_side(made, own):
    page = Elements(made.client(own.shown(1)).get("/").text)
    assert [attributes["href"] for tag, attributes in page.tags if tag == "a"] == ["runs/0/", "runs/1/"]
    assert "dpo-x" in page.text
    assert "being read" in page.text


@pytest.mark.parametrize(
    "place", ["runs/9/", "runs/0/figures/none.svg", "runs/0/task?of=a&task=b", "nowhere", "static/../viewer.py"]
)
def test_what_is_not_there_is_said(made, place):
    answer = made.client().get(f"/{place}")
    assert answer.status_code == 404
    assert 'role="alert"' in answer.text


def test_what_is_shown_is_what_the_ledger_holds(made):
    """Every response of the run is on its task's page, with its own text."""

    def read(session):
        from vcot.services.run.rounds import list_rounds

        return {g.task.id: [r for r in g.found if r.text] for g in list_rounds(session)[0].groups}

    client, known = made.client(), made.change(read)
    for task, responses in known.items():
        page = Elements(client.get("/runs/0/task", params={"of": "train", "task": task}).text).text
        for response in responses:
            assert isinstance(response, Response)
            assert " ".join(response.text.split())[:20].split("\u202e")[0] in page

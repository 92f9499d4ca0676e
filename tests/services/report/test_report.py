"""The report's page: what it says, and that nothing in it can run or ask for anything."""

import re
import runpy
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vcot.eval.prior import PriorReport, PriorRow
from vcot.eval.published import PaperRow
from vcot.pipeline.contamination import Contamination, Match
from vcot.pipeline.judges.cost import Cost
from vcot.pipeline.printable import printable
from vcot.pipeline.records import Interval, Usage
from vcot.services.recipes.recipe import load_recipe
from vcot.services.report import figures
from vcot.services.report.data import Lookalikes
from vcot.services.report.page import write_report
from vcot.training.protocol.search import Settings, Sweep, SweepPoint

run = runpy.run_path(str(Path(__file__).with_name("report_data.py")))
make_data, make_example = run["make_data"], run["make_example"]
make_scores, make_reliance, make_trend = run["make_scores"], run["make_reliance"], run["make_trend"]
make_margins = run["make_margins"]
make_repeats = run["make_repeats"]
make_image = run["make_image"]
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """The page's elements and visible text; checks that every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    out = write_report(make_data(), tmp_path_factory.mktemp("report") / "new" / "report.html")
    return out.read_text("utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_page_says_what_was_found(page):
    assert "dpo-3fa29b01cc answers more questions right than base with cot at 0.4" in page.text
    assert "Validation loss went from 0.711 to 0.493" in page.text
    assert "its gap to the training loss at the end is +0.030" in page.text
    assert "Scores of 2400 responses by verifier/1" in page.text
    assert "pair 300 262 0 0 38 38 tie" in page.text
    assert "judge 2,400 2,388 0 0 12 9 refusal, 3 cut by length" in page.text
    assert "Judging took" not in page.text
    assert "Chance: a uniform guess 25.0 25.0 25.0 25.0" in page.text
    assert "sha256:3f1ca7a7" in page.text
    assert "is served as it was trained: in float32 no token's log-prob differs by more than 6.2e-06" in page.text
    assert "lora_alpha = 128" in page.text
    assert "Settings: eval.seed=1; all else as in runs/nano/recipe.toml." in page.text


def test_several_responses_to_a_question_have_a_table_of_their_own(tmp_path, page):
    assert "Several responses to a question" not in page.text
    data = make_data(repeats=make_repeats(make_scores()), breakdown=run["make_breakdown"](make_scores()))
    text = Page(write_report(data, tmp_path / "report.html").read_text("utf-8")).text
    assert "Several responses to a question, in %" in text
    assert "Accuracy in % by label" in text
    assert "grade G1" in text
    assert "base: more responses to the same questions would bring the standard error" in text


def test_page_says_that_it_is_a_miniature_with_a_program_as_judge(page):
    assert "This is a miniature." in page.text
    assert "The judge is a program, not a language model." in page.text


def test_paper_recipe_is_no_miniature(tmp_path):
    cost = Cost(num_requests=2400, usage=Usage(prompt_tokens=7_000_000, completion_tokens=100_000), usd=1.11)
    data = make_data(recipe=load_recipe("paper"), judge="pointwise/1:gpt-4o-mini", judge_cost=cost)
    text = Page(write_report(data, tmp_path / "report.html").read_text("utf-8")).text
    assert "Judging took 2,400 requests: 7.1 M tokens, $1.11" in text
    assert "miniature" not in text
    assert "not a language model" not in text


def test_page_is_one_file_that_asks_for_nothing(html, page):
    assert "default-src 'none'" in html
    assert not page.all("script")
    assert not page.all("link")
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"(?:url\(|@import)\s*['\"]?(?!#)", html)


def test_page_is_accessible(page):
    assert page.all("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in page.all("img"))
    assert all(header.get("scope") in ("col", "row") for header in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(cell.get("data-label") or "colspan" in cell for cell in page.all("td")), "a telephone shows no header"
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"].removeprefix("#") for tag, a in page.elements if tag in ("a", "use")}
    assert targets <= set(ids)
    assert sum(attributes.get("role") == "img" and "aria-label" in attributes for attributes in page.all("div")) == 7


def test_a_cell_is_labelled_as_its_column_is_headed(html):
    """On a narrow screen the headings are not shown, and each cell has its label."""
    labels = set(re.findall(r'data-label="(.*?)"', html))
    headings = {re.sub(r"<.*?>", "", cell).strip() for cell in re.findall(r"<th[^>]*>(.*?)</th>", html, re.DOTALL)}
    assert labels
    assert labels <= headings


def test_pairs_that_were_left_out_are_said(tmp_path):
    recipe = load_recipe("nano", ["pairs.num=262"])
    text = Page(write_report(make_data(recipe=recipe, num_left_out=38), tmp_path / "r.html").read_text("utf-8")).text
    assert "38 more pairs came out than pairs.num = 262 asks for" in text


def test_pictures_that_are_in_training_and_evaluation_are_shown_side_by_side(tmp_path, page):
    assert "Held out" not in page.text
    ref = make_example(1).pair.images[0]
    match = Match(
        kind="alike picture", distance=2, trained="t1", asked="e1", trained_question="What <b>?", asked_question="Who?",
        trained_image=ref, asked_image=ref,
    )  # fmt: skip
    touched = {"same image": 0, "alike picture": 1, "alike text": 0}
    found = Contamination(num_trained=600, num_asked=900, is_drawn=False, touched=touched, worst=(match,))
    data = make_data(contamination=found, lookalikes=(Lookalikes(match, make_image(), make_image()),))
    shown = Page(write_report(data, tmp_path / "r.html").read_text("utf-8"))
    assert "Of 900 evaluation questions, by match with one of 600 for training: 1 alike picture." in shown.text
    assert "Trained on, t1: What <b>?" in shown.text
    assert "Evaluated on, e1, alike picture, 2 of 64 bits apart: Who?" in shown.text
    assert len(shown.all("img")) == len(page.all("img")) + 2
    clean = found.model_copy(update={"touched": dict.fromkeys(touched, 0), "worst": (), "is_drawn": True})
    shown = Page(write_report(make_data(contamination=clean), tmp_path / "r.html").read_text("utf-8"))
    assert "None of 900 evaluation questions is among the 600 for training." in shown.text
    assert "Only the same image counts" in shown.text


def test_the_papers_figures_are_shown_where_there_are_any(tmp_path, page):
    assert "the paper's Table 1" not in page.text
    interval = Interval(value=0.071, low=0.041, high=0.101, n=2017)
    row = PaperRow(
        checkpoint=make_data().checkpoints[0], prompt="zero_shot", temperature=0.4, paper=0.593, difference=interval,
        ours=Interval(value=0.664, low=0.643, high=0.685, n=2017), mde=0.042, source="the paper's Table 1",
    )  # fmt: skip
    text = Page(write_report(make_data(published=(row,)), tmp_path / "r.html").read_text("utf-8")).text
    assert "Beside the paper's Table 1, in %" in text
    assert "base zero_shot 0.4 66.4 ±2.1 59.3 +7.1 +4.1 to +10.1 4.2" in text
    assert "true differences of 4.2 points are told from noise" in text


def test_answers_that_follow_the_prior_are_shown(tmp_path, page):
    assert "Seen or expected" not in page.text
    share = Interval(value=0.5, low=0.3, high=0.7, n=24)
    row = PriorRow(
        checkpoint=make_data().checkpoints[0], prompt="cot", temperature=0.4, usual=share, seen=share, prior=share,
        other=0.1, no_answer=0.02, num_failed=3,
    )  # fmt: skip
    report = PriorReport(rows=(row,), differences=(), chance=0.3, num_drawings=24)
    text = Page(write_report(make_data(prior=report), tmp_path / "r.html").read_text("utf-8")).text
    assert "answers about 24 drawings that contradict the usual state" in text
    assert "base cot 0.4 50.0 ±20.0 50.0 ±20.0 50.0 ±20.0 10.0 2.0 3" in text
    assert "would assert the usual state in 30 %" in text


def test_statements_are_marked(page):
    marks = [a["aria-label"] for a in page.all("span") if a.get("class") == "mark"]
    assert marks == ["true", "true", "false", "true", "true"] * 2
    assert "The answer is (B)" in page.text


@pytest.mark.parametrize("text", run["HOSTILE"])
def test_hostile_texts_are_shown_and_nothing_more(tmp_path, text):
    html = write_report(run["make_hostile"](text), tmp_path / "report.html").read_text("utf-8")
    page, plain = Page(html), Page(write_report(run["make_hostile"]("plain"), tmp_path / "p.html").read_text("utf-8"))
    tags = [tag for tag, _ in page.elements if tag not in ("span", "tspan", "text", "use", "g", "path")]
    assert tags == [tag for tag, _ in plain.elements if tag not in ("span", "tspan", "text", "use", "g", "path")]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert not re.search(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u200f\u202a-\u202e\u2066-\u2069]", html), (
        "such signs are written out"
    )
    assert all(word in page.text for word in printable(text).split()), "as it is, and not what a template makes of it"


def test_a_response_without_format_is_shown_as_it_is(tmp_path):
    example = make_example(3, rejected="just rambling on")
    html = write_report(make_data(examples=(example,)), tmp_path / "report.html").read_text("utf-8")
    assert "just rambling on" in Page(html).text


def test_an_example_answered_in_words_has_its_gold_answer_and_no_options(tmp_path):
    example = make_example(3)
    task = example.task.model_copy(update={"choices": (), "answer": None, "gold": "dark <blue>"})
    page = Page(
        write_report(make_data(examples=(replace(example, task=task),)), tmp_path / "r.html").read_text("utf-8")
    )
    assert "Gold: dark <blue>" in page.text
    assert not page.all("ol")


def test_what_was_not_probed_is_not_shown_and_what_was_is(page, tmp_path):
    assert "Image reliance" not in page.text
    assert "Margins:" not in page.text
    assert "Rounds, on the validation split" not in page.text
    scores = make_scores(100)
    data = make_data(reliance=make_reliance(scores), trend=make_trend(scores), margins=make_margins())
    probed = Page(write_report(data, tmp_path / "report.html").read_text("utf-8"))
    assert "Answers changed base zero_shot 0.4 blank" in probed.text
    assert "dpo-3fa29b01cc chosen base" in probed.text
    assert "600 324 46.0 % 0.79 22.5 0.81" in probed.text
    assert "With its own image base finds the right option" in probed.text
    assert "Margin of the right option over the best wrong one" in probed.text
    assert len(probed.all("caption")) == len(probed.all("table")) == 7


def test_page_of_a_run_that_has_only_begun(tmp_path):
    nothing = dict.fromkeys(("results", "differences", "progress", "examples", "counts", "judge_scores", "gaps"), ())
    data = make_data(**nothing, chance={}, training=None, checkpoints=())
    text = Page(write_report(data, tmp_path / "report.html").read_text("utf-8")).text
    for said in ("Nothing has been evaluated yet", "Nothing has been trained yet", "There are no pairs to show yet"):
        assert said in text


def test_same_data_gives_the_same_bytes(tmp_path, html):
    again = write_report(make_data(), tmp_path / "report.html")
    assert again.read_text("utf-8") == html
    assert list(tmp_path.iterdir()) == [again]


def test_figures_follow_the_pages_colours():
    data = make_data()
    for svg in (
        figures.draw_accuracy(data.results, 0.25),
        figures.draw_differences(data.differences),
        figures.draw_reliance(make_reliance(make_scores(100))),
        figures.draw_margins(make_margins()),
        figures.draw_trend(make_trend(make_scores(100))),
        figures.draw_loss(data.progress),
        figures.draw_rewards(data.progress),
        figures.draw_histogram([0.5, 0.5], "score $x_1$", "scores"),
    ):
        assert svg.startswith("<svg viewBox=")
        assert svg.endswith("</svg>")
        assert not re.search(r"#[0-9a-fA-F]{6}\b|#000|font-family|<style|<metadata|http", svg)
        assert "var(--" in svg
    assert "score $x_1$" in svg


@pytest.mark.parametrize(
    "draw", [lambda rows, _: figures.draw_accuracy(rows, 0.25), lambda _, rows: figures.draw_margins(rows)]
)
def test_many_checkpoints_are_told_apart_and_stay_in_their_rows(draw):
    num = 8

    def repeat(rows):
        own = [row for row in rows if row.checkpoint.name == "base"]
        refs = [own[0].checkpoint.model_copy(update={"name": f"p{n}", "digest": f"{n}"}) for n in range(num)]
        return [row.model_copy(update={"checkpoint": ref}) for ref in refs for row in own]

    svg = draw(repeat(make_data().results), repeat(make_margins()))
    drawn = re.findall(r'<use href="#(\w+-m\w+)" x="[\d.]+" y="([\d.]+)" style="fill: (\S+);', svg)
    num_rows = len(drawn) // num - 1  # and each once in the legend
    points, legend = drawn[: num * num_rows], drawn[num * num_rows :]
    assert len({(marker, colour) for marker, _, colour in legend}) == num
    rows = [[float(y) for _, y, _ in points[row::num_rows]] for row in range(num_rows)]
    assert all(max(above) < min(below) for above, below in pairwise(rows))


def test_reward_curve_is_left_out_where_it_was_not_logged(tmp_path):
    progress = tuple(point.model_copy(update={"reward_accuracy": None}) for point in make_data().progress)
    html = write_report(make_data(progress=progress), tmp_path / "report.html").read_text("utf-8")
    assert "coin toss" not in html


def make_sweep(mode, *varied):
    centre = Settings(epochs=2, learning_rate=1e-5, lora_dropout=0.1, lora_alpha=128)
    points = tuple(
        SweepPoint(job=str(n), settings=centre, varies=name, loss=0.6 + n / 10, gap=(-1) ** n / 10)
        for n, name in enumerate((None, *varied))
    )
    return Sweep(
        mode=mode, num_trainings=4, num_train=18, num_validation=2, tolerance=0.01, centre=centre, points=points,
        chosen=centre,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sweep", "series"),
    [
        (make_sweep("grid", None, None), ["lr 1e-05"]),
        (make_sweep("one_at_a_time", "learning_rate", "epochs"), ["epochs", "learning rate", "the recipe's own"]),
    ],
)
def test_a_search_is_shown_with_its_choice(tmp_path, sweep, series):
    html = write_report(make_data(sweep=sweep), tmp_path / "report.html").read_text("utf-8")
    assert "3 trainings of 4 on 18 pairs" in html
    assert ("for each setting apart" in html) == (sweep.mode == "one_at_a_time")
    assert "epochs 2, learning_rate 1e-05, dropout 0.1, alpha 128" in html
    document = ElementTree.fromstring(figures.standalone(figures.draw_sweep(sweep)))
    assert document.tag == "{http://www.w3.org/2000/svg}svg"
    assert "--series-0" in document[0].text
    words = "".join(document.itertext())
    assert all(name in words for name in (*series, "chosen"))

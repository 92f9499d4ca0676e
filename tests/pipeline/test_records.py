import pytest
from pydantic import ValidationError

from vcot.pipeline.pairs import PreferencePair
from vcot.pipeline.records import (
    CheckpointRef,
    Judgment,
    Response,
    SamplingParams,
    StageCount,
    Task,
    content_key,
)

CHECKPOINT = CheckpointRef(name="base", digest="sha256:aa", kind="base")
SAMPLING = SamplingParams(temperature=0.5, max_tokens=8, n=2, seed=0)


def make_task(**changes):
    fields = {"id": "t", "question": "q?", "choices": ("a", "b"), "answer": 1, "source": "nano", "split": "train"}
    return Task(**(fields | changes))


def test_a_key_depends_on_every_part_and_not_on_their_order():
    key = content_key(weights="w", prompt="p", sampling=SAMPLING)
    assert key == content_key(sampling=SAMPLING, prompt="p", weights="w")
    hotter = SAMPLING.model_copy(update={"temperature": 0.6})
    others = [
        content_key(weights="x", prompt="p", sampling=SAMPLING),
        content_key(weights="w", prompt="q", sampling=SAMPLING),
        content_key(weights="w", prompt="p", sampling=hotter),
    ]
    assert len({key, *others}) == 4


@pytest.mark.parametrize("changes", [{"choices": ("only",)}, {"answer": 2}, {"answer": -1}, {"colour": "red"}])
def test_a_task_that_cannot_be_asked_is_refused(changes):
    with pytest.raises(ValidationError):
        make_task(**changes)


def test_the_gold_letter_counts_from_a():
    assert make_task().answer_letter == "B"
    assert make_task(answer=None).answer_letter is None


@pytest.mark.parametrize("outcome", [{}, {"text": "x", "error": "y"}])
def test_a_response_has_either_a_text_or_an_error(outcome):
    with pytest.raises(ValidationError):
        Response(
            key="k", group="g", task="t", index=0, checkpoint=CHECKPOINT, prompt="cot", sampling=SAMPLING, **outcome
        )


@pytest.mark.parametrize("outcome", [{}, {"score": 0.0, "error": "y"}])
def test_a_judgment_with_an_error_has_no_score(outcome):
    with pytest.raises(ValidationError):
        Judgment(key="k", response="r", task="t", judge="verifier/1", **outcome)


@pytest.mark.parametrize(("chosen", "rejected", "scores"), [("a", "a", (1, 0)), ("a", "b", (1, 1)), ("a", "b", (0, 1))])
def test_a_pair_needs_two_texts_and_a_better_one(chosen, rejected, scores):
    with pytest.raises(ValidationError):
        PreferencePair(
            task="t",
            images=[{"sha256": "s", "path": "p", "width": 1, "height": 1}],
            prompt="q",
            chosen=chosen,
            rejected=rejected,
            chosen_key="1",
            rejected_key="2",
            chosen_score=scores[0],
            rejected_score=scores[1],
            judge="verifier/1",
            policy="sha256:aa",
        )


def test_a_stage_that_does_not_add_up_is_refused():
    StageCount(stage="sample", requested=4, ok=1, cached=1, failed=1, refused=1, reasons={"tie": 2})
    with pytest.raises(ValidationError, match="does not add up"):
        StageCount(stage="sample", requested=5, ok=1, cached=1, failed=1, refused=1, reasons={"tie": 2})
    with pytest.raises(ValidationError, match=r"reasons .* do not add up"):
        StageCount(stage="sample", requested=4, ok=1, cached=1, failed=1, refused=1, reasons={"tie": 1})


def test_reasons_are_said_the_commonest_first():
    reasons = {"refusal": 1, "content_filter": 2}
    count = StageCount(stage="judge", requested=3, refused=3, reasons=reasons)
    assert count.by_reason == "2 content filter, 1 refusal"

"""A verdict is read however it is wrapped, and never guessed."""

import json

import pytest

from pipeline.judges.verdict import Unreadable, read_verdict

PLAIN = '{"rationale": "fine", "score": 8}'


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        f"```json\n{PLAIN}\n```",
        f"<think>a {{score}} of 9? no</think>\n{PLAIN}",
        f"Here is my verdict:\n{PLAIN}",
        '{"rationale": "fine", "score": 8.0}',
        '{"score": 8, "confidence": 1, "rationale": "fine", "more": {"score": 3}}',
    ],
    ids=["plain", "fence", "thought", "words", "8.0", "fields"],
)
def test_an_unambiguous_verdict_is_read(text):
    verdict = read_verdict(text)
    assert (verdict.score, verdict.rationale) == (8.0, "fine")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8",
        f"{PLAIN}\n{PLAIN}",
        '{"rationale": "x", "score": 11}',
        '{"rationale": "x", "score": 0}',
        '{"rationale": "x", "score": 7.5}',
        '{"rationale": "x", "score": "8"}',
        '{"rationale": "x", "score": true}',
        '{"rationale": "x", "score": NaN}',
        '{"rationale": "x", "score": null}',
        '{"rationale": "x", "score": 8, "score": 3}',
        '{"rationale": "x"}',
        '{"score": 8}',
        '{"rationale": "long", "draft": {"rationale": "x", "score": 3}, "sco',
        "[" * 9000 + '{"a":' * 9000,
    ],
)
def test_what_could_be_two_things_is_unreadable(text):
    with pytest.raises(Unreadable):
        read_verdict(text)


@pytest.mark.parametrize("score", [1, 10])
def test_both_ends_of_the_scale_are_scores(score):
    assert read_verdict(json.dumps({"rationale": "x", "score": score})).score == score


def test_a_rationale_can_be_stored_whatever_the_judge_wrote():
    verdict = read_verdict('{"rationale": "ok \\ud83d", "score": 8}')
    assert json.loads(json.dumps(verdict.rationale).encode()) == "ok ?"

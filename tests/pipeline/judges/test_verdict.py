"""A verdict is read however it is wrapped, and never guessed."""

import json

import pytest

from vcot.pipeline.judges.verdict import Unreadable, build_format, read_verdict

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
        "\ufeff" + PLAIN,
        f"**Verdict:** {PLAIN}",
        f"[{PLAIN}]",
        f'{{"verdict": {PLAIN}}}',
        f"<thinking>a {{ b</thinking>{PLAIN}",
        f"The set {{A, B}} and \\frac{{1}}{{2}}. {PLAIN} Nothing {{more}}.",
        '{"rationale": "fine", "score": "8"}',
        '{"rationale": "fine", "score": "8.0"}',
        '{"rationale": "fine", "score": "8/10"}',
        '{"rationale": "fine", "score": "8 out of 10"}',
        '{"rationale": "fine", "score": 0.8e1}',
        '{"rationale": "fine", "score": 8,}',
        "{'rationale': 'fine', 'score': 8}",
        """{'rationale': "fine", 'more': 'a } b', 'score': 8}""",
        "{'rationale': 'fine', 'more': {'a': 'it\\'s } b'}, 'score': 8}. And that is all.",
        '{"Rationale": "fine", "Score": 8}',
    ],
)
def test_a_verdict_is_read_as_any_reader_reads_it(text):
    verdict = read_verdict(text)
    assert (verdict.score, verdict.rationale) == (8.0, "fine")


def test_a_line_break_in_a_rationale_is_its_own():
    assert read_verdict('{"rationale": "one\ntwo", "score": 8}').rationale == "one\ntwo"


@pytest.mark.parametrize(
    "text",
    [
        '{"rationale": "x", "score": "11"}',
        '{"rationale": "x", "score": "7.5"}',
        '{"rationale": "x", "score": "8/5"}',
        '{"rationale": "x", "score": "8 or 9"}',
        '{"rationale": "x", "score": [8]}',
        '{"rationale": "x", "score": Infinity}',
        '{"rationale": "x", "score": 8, "Score": 3}',
        "{'rationale': 'x', 'score': 8, 'score': 3}",
        "{'rationale': 'x', 'score': 8} {'rationale': 'x', 'score': 3}",
        "{'rationale': 'x', 'score': __import__('os')}",
        '{"a": {"rationale": "x", "score": 8}, "b": {"rationale": "x", "score": 3}}',
        "{'rationale': " + "[" * 9000,
        '{"rationale": "x", "score": ' + "1" * 400 + "}",
        "{'a': {1: 2}}",
        "{'rationale': {[1]: 2}, 'score': 8}",
        "{'rationale', 'score'}",
        "{'a\\q': 1\0}",
        "",
        "8",
        f"{PLAIN}\n{PLAIN}",
        '{"rationale": "x", "score": 11}',
        '{"rationale": "x", "score": 0}',
        '{"rationale": "x", "score": 7.5}',
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


def test_the_format_that_is_asked_for_is_openais():
    score = {"type": "integer"}
    assert build_format("verdict", {"score": score}) == {
        "type": "json_schema",
        "json_schema": {
            "name": "verdict",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": {"score": score},
                "required": ["score"],
                "additionalProperties": False,
            },
        },
    }

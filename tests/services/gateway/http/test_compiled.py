"""What would keep the engine's scheduler busy is refused; what people ask for passes."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.services.bench_fleet import Bench
from vcot.services.gateway.http.answers import Refusal
from vcot.services.gateway.http.content import check_content
from vcot.services.gateway.http.patterns import TooDeepError, cost_of

SLOW = "(.{0,40}){25}"
VERDICT = {
    "type": "object",
    "properties": {
        "verdict": {"type": "string", "enum": ["correct", "wrong"]},
        "reason": {"type": "string", "maxLength": 2_000},
        "day": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
        "pattern": {"type": "array", "maxItems": 100, "items": {"type": "string", "maxLength": 500}},
    },
    "required": ["verdict"],
}


def refused(request: dict[str, Any]) -> str:
    with pytest.raises(Refusal) as caught:
        check_content(request, (), 10**6)
    assert (caught.value.status, caught.value.code) == (400, "too_complex")
    return str(caught.value)


def passes(**request: Any) -> None:
    check_content(request, (), 10**6)


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "[ABCD]",
        r"\d{1,4}",
        ".{0,200}",
        ".{0,4000}",
        r"[\s\S]{0,400}",
        ".*Answer: [ABCD]",
        ".{0,500}Answer: [ABCD]",
        r"Reason: .{0,200}\nScore: (10|[0-9])",
        r"(?:[A-D])(?:, ?[A-D]){0,3}",
        r"(\w{1,10} ){0,50}",
        r"([^,]{1,40},){0,100}",
        r'\{"a": "[^"]{0,200}", "b": (true|false)\}',
        r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?",
        r"https?://[a-z0-9.-]+(/[^ ]*)?",
        r"[\w.+-]+@[\w-]+\.[\w.-]+",
        r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(Z|[+-]\d{2}:\d{2})",
        "|".join(f"word{number}" for number in range(900)),
        "(a|b)*a(a|b){16}",
    ],
)
def test_what_people_ask_for_passes(pattern: str) -> None:
    passes(structured_outputs={"regex": pattern})


@pytest.mark.parametrize(
    "pattern",
    [
        SLOW,
        "(.{0,400}){25}",
        "(.{0,10}){10}",
        "(.{0,40}){25,}",
        "(.{0,400})*",
        ".{0,400}" * 25,
        ".{0,200}.{0,200}",
        "|".join([".{0,400}"] * 25),
        "|".join(f"x{number}.{{0,400}}" for number in range(25)),
        ".+" * 50,
        "(.?){200}",
        "(.|..|...){100}",
        r"(\w+ ?){0,50}",
        "((.{0,9})|(.{0,9})){8}",
        "(((.{0,10}){0,10}){0,10}){0,10}",
        "(?:.{0,40}){25}",
        "(?P<name>.{0,40}){25}",
        r"([\s\S]{0,40}){25}",
        r"([^\n]{0,40}?){25}",
        r"(\p{L}{0,40}){25}",
        "([一-龥]{0,40}){25}",
        r"(\S{0,40}){25}",
        r"([\x20-\x7e]{0,40}){25}",
        "(x?.{0,40}){25}",
        "(.{0,40}x?){25}",
        "(^.{0,40}$){25}",
        "){0,1}" + SLOW,
        "a{99999999999999}",
        "(a{100}){101}",
        "a" * 8_193,
        "(" * 51 + ")" * 51,
    ],
)
def test_what_would_keep_the_engine_busy_is_refused_with_a_remedy(pattern: str) -> None:
    assert ";" in refused({"structured_outputs": {"regex": pattern}})


@pytest.mark.parametrize(
    "request_",
    [
        {"structured_outputs": {"json": {"type": "string", "pattern": SLOW}}},
        {"structured_outputs": {"json": json.dumps({"anyOf": [{"pattern": SLOW}]})}},
        {"structured_outputs": {"json": {"patternProperties": {SLOW: {}}}}},
        {"structured_outputs": {"json": {}, "whitespace_pattern": SLOW}},
        {"structured_outputs": {"structural_tag": json.dumps({"format": {"type": "regex", "pattern": SLOW}})}},
        {"structured_outputs": {"json": {"maxLength": 100_001}}},
        {"structured_outputs": {"json": {"maxItems": 1_000, "items": {"maxItems": 101}}}},
        {"structured_outputs": {"json": {"minItems": 1_000, "items": {"anyOf": [{"maxLength": 101}]}}}},
        {"structured_outputs": {"grammar": "root ::= [a-z]{1,200} [0-9]{60}"}},
        {"structured_outputs": {"grammar": "root ::= a\n" * 2_000}},
        {"structured_outputs": {"json": {"anyOf": [{"pattern": "a" * 8_000}] * 5}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": SLOW}}}},
        {"tools": [{"function": {"parameters": {"properties": {"x": {"pattern": SLOW}}}}}]},
        {"functions": [{"parameters": {"properties": {"x": {"pattern": SLOW}}}}]},
    ],
)
def test_it_is_seen_wherever_it_stands(request_: dict[str, Any]) -> None:
    refused(request_)


def test_schemas_and_grammars_of_usual_size_pass() -> None:
    passes(response_format={"type": "json_schema", "json_schema": {"name": "verdict", "schema": VERDICT}})
    passes(structured_outputs={"json": json.dumps(VERDICT)})
    passes(structured_outputs={"json": "no JSON"})
    passes(structured_outputs={"choice": ["pattern", SLOW]})
    passes(structured_outputs={"grammar": 'root ::= "yes" | "no" [a-z]{0,20}'})


@given(st.text("ab.()[]{}|*+?\\^$-,0123dwsxupPSWD<>:=!é", max_size=30))
def test_any_text_has_a_cost(pattern: str) -> None:
    cost = cost_of(pattern)
    assert cost.width >= 0 <= cost.size


def test_too_many_groups_have_none() -> None:
    with pytest.raises(TooDeepError):
        cost_of("(" * 10_000)


async def test_the_engine_is_never_asked(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with bench.running():
        before = bench.server.num_asked
        answer = await bench.ask(structured_outputs={"regex": SLOW})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_complex")
        assert bench.server.num_asked == before
        assert (await bench.ask(structured_outputs={"regex": "[ABCD]"})).status_code == 200

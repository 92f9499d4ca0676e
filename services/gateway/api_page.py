"""The gateway's HTTP API as a page and as an OpenAPI document, from the types that read it.

`python -m vcot.services.gateway.api_page docs` writes gateway-api.md and gateway-openapi.json into a folder; a test holds
the routes to those that the gateway answers.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic.json_schema import models_json_schema

from vcot.pipeline.files import replace_file
from vcot.pipeline.records import CheckpointRef, Record
from vcot.services.checkpoints.registry import CheckpointInfo
from vcot.services.gateway import admin

Who = Literal["client", "operator", "anyone"]
_SCHEMAS = "#/components/schemas/"
_KEYS = {"client": "VCOT_API_KEYS", "operator": "VCOT_ADMIN_KEY", "anyone": ""}
_HEAD = """# The gateway's HTTP API

What `vcot serve` answers. [gateway-openapi.json](gateway-openapi.json) is the same as an OpenAPI 3.1 document, for tools
that make clients or pages of one. Promises, headers, limits and keys are in [serving.md](serving.md).

- A key goes into the header `authorization: Bearer KEY`: one of `VCOT_API_KEYS` for clients, `VCOT_ADMIN_KEY` for the
  operator. Where the gateway has none, it answers its own machine only.
- The body of a POST is one JSON object, with the content type `application/json`. A field that is not known is refused.
- An error is OpenAI's: `{"error": {"message": ..., "type": ..., "param": null, "code": ...}}`. Of the operator's routes,
  `code` is the name of the exception (`SwapError`, 409; `CheckpointError`, 404; others 503), or says what is wrong with the
  request (4xx).

<!-- `make docs` writes this page from the types that read requests. -->
"""


class ErrorBody(Record):
    """Of every answer that is no success."""

    error: dict[str, str | int | None]
    """`message`, in a sentence with the remedy; `type`; `param`, always null; `code`."""


@dataclass(frozen=True)
class Documented:
    """A route, as it is told to those who call it."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    who: Who
    what: str
    answer: type[Record] | str = "JSON"
    """A record, or what else is answered, in words."""
    body: type[Record] | None = None
    status: int = 200
    query: str = ""
    """The name of a parameter behind the path."""


_OPENAI = "as OpenAI's"
ROUTES = (
    Documented("POST", "/v1/chat/completions", "client", "A chat's next message, also as a stream.", _OPENAI),
    Documented("POST", "/v1/completions", "client", "What follows a text, likewise.", _OPENAI),
    Documented("GET", "/v1/models", "client", "What can be asked for right now, and the weights behind it.", _OPENAI),
    Documented("GET", "/v1/models/{name}", "client", "One of them, by name, alias or NAME@DIGEST.", _OPENAI),
    Documented("GET", "/metrics", "client", "What Prometheus reads.", "text"),
    Documented(
        "GET",
        "/health",
        "anyone",
        "200 while a checkpoint is live or being swapped, or servers rest; else 503, with why.",
    ),
    Documented("GET", "/admin/state", "operator", "What the gateway does now.", admin.GatewayState),
    Documented("GET", "/admin/checkpoints", "operator", "What is registered.", admin.CheckpointList),
    Documented(
        *("POST", "/admin/checkpoints", "operator", "Verify and register a checkpoint's directory."),
        *(CheckpointRef, admin.RegisterRequest, 201),
    ),
    Documented("GET", "/admin/checkpoints/{name}", "operator", "One checkpoint, by name or alias.", CheckpointInfo),
    Documented("DELETE", "/admin/checkpoints/{name}", "operator", "Forget one; its files stay.", CheckpointRef),
    Documented(
        *("POST", "/admin/swap", "operator", "Make a checkpoint live, verified, or leave all as it was."),
        *(admin.Swapped, admin.SwapRequest),
    ),
    Documented(
        *("POST", "/admin/trial", "operator", "Have a checkpoint served to those who expect its digest."),
        *(admin.Swapped, admin.TrialRequest),
    ),
    Documented("DELETE", "/admin/trial", "operator", "End the trial of `owner`.", admin.GatewayState, query="owner"),
    Documented(
        *("POST", "/admin/rest", "operator", "Have the servers rest for a while, or longer."),
        *(admin.Rested, admin.RestRequest),
    ),
    Documented("POST", "/admin/wake", "operator", "Have them serve again.", admin.GatewayState, Record),
    Documented("GET", "/admin/replicas", "operator", "The servers behind the gateway.", admin.ReplicaList),
    Documented(
        *(
            "POST",
            "/admin/replicas",
            "operator",
            "Start one more, or use one that runs; it answers once it is verified.",
        ),
        *(admin.ReplicaState, admin.AddRequest, 202),
    ),
    Documented(
        "DELETE", "/admin/replicas/{name}", "operator", "Let a server's requests end, then drop it.", admin.ReplicaList
    ),
)


def render_page() -> str:
    """The page, in Markdown."""
    return "\n".join([_HEAD, *_render_routes(), "## Records", "", *_render_records(), ""])


def _render_routes() -> Iterator[str]:
    for who, heading in (("client", "Clients"), ("operator", "The operator"), ("anyone", "Anyone")):
        yield from (f"## {heading}", "", "| route | what it does | body | answer |", "|---|---|---|---|")
        for route in ROUTES:
            if route.who == who:
                query = f"?{route.query}=..." if route.query else ""
                body = _link(route.body or route.answer) if route.method == "POST" else ""
                told = f"{_link(route.answer)}, {route.status}" if route.status != 200 else _link(route.answer)
                yield f"| `{route.method} {route.path}{query}` | {route.what} | {body} | {told} |"
        yield ""


def _link(what: type[Record] | str) -> str:
    """To what is said of a record; an empty one, or words, is itself."""
    if isinstance(what, str):
        return what
    return "`{}`" if what is Record else f"[{what.__name__}](#{what.__name__.lower()})"


def _render_records() -> Iterator[str]:
    """Each record that goes in or out, and those within them."""
    for name, schema in sorted(_list_schemas().items()):
        yield from (f"### {name}", "", _flatten(schema.get("description", "")), "")
        yield from ("| field | type | | what it is |", "|---|---|---|---|")
        for field, told in schema.get("properties", {}).items():
            need = "required" if field in schema.get("required", ()) else _show_default(told)
            yield f"| `{field}` | {_name_type(told)} | {need} | {_flatten(told.get('description', ''))} |"
        yield ""


def _flatten(text: str) -> str:
    return " ".join(text.split())


def _show_default(told: dict[str, Any]) -> str:
    return f"`{json.dumps(told['default'])}`" if "default" in told else ""


def _name_type(told: dict[str, Any]) -> str:
    """A schema in few words."""
    if "$ref" in told:
        name = str(told["$ref"]).removeprefix(_SCHEMAS)
        return f"[{name}](#{name.lower()})"
    if "anyOf" in told:
        return " or ".join(_name_type(each) for each in told["anyOf"])
    if "enum" in told or "const" in told:
        return " or ".join(f"`{each}`" for each in told.get("enum", [told.get("const")]))
    kind = str(told.get("type", "any"))
    if kind == "array":
        return f"list of {_name_type(told['items'])}"
    if kind == "object" and isinstance(told.get("additionalProperties"), dict):
        return f"by name, {_name_type(told['additionalProperties'])}"
    return kind


def _list_schemas() -> dict[str, dict[str, Any]]:
    """Of each record that goes in or out, by its name."""
    bodies = [(route.body, "validation") for route in ROUTES if route.body not in (None, Record)]
    answers = [(route.answer, "serialization") for route in ROUTES if isinstance(route.answer, type)]
    known: Any = [*dict.fromkeys([*bodies, *answers, (ErrorBody, "serialization")])]
    _, found = models_json_schema(known, ref_template=_SCHEMAS + "{model}")
    schemas: dict[str, dict[str, Any]] = found["$defs"]
    for record, _ in known:
        for field, told in _read_docstrings(record):
            schemas[record.__name__]["properties"][field]["description"] = told
    return schemas


def _read_docstrings(record: type[Record]) -> Iterator[tuple[str, str]]:
    """The sentences under a record's fields."""
    [defined] = ast.parse(textwrap.dedent(inspect.getsource(record))).body
    assert isinstance(defined, ast.ClassDef)
    for field, told in pairwise(defined.body):
        match field, told:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, _flatten(text)


def build_document() -> dict[str, Any]:
    """The OpenAPI document."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _describe(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "vcot gateway", "version": metadata.version("vcot")},
        "servers": [{"url": "http://127.0.0.1:8100"}],
        "paths": paths,
        "components": {
            "schemas": _list_schemas(),
            "securitySchemes": {
                who: {"type": "http", "scheme": "bearer", "description": key} for who, key in _KEYS.items() if key
            },
        },
    }


def _describe(route: Documented) -> dict[str, Any]:
    """One operation."""
    places = [("path", name) for name in re.findall(r"{(\w+)}", route.path)]
    places += [("query", route.query)] if route.query else []
    text = {"type": "string"}
    parameters = [{"name": name, "in": place, "required": place == "path", "schema": text} for place, name in places]
    answer = {"description": "done", "content": _content(route.answer)}
    failed = {"description": "refused or failed", "content": _content(ErrorBody)}
    return {
        "summary": route.what,
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.path}").strip("_"),
        **({"parameters": parameters} if parameters else {}),
        **({"requestBody": _ask_for(route.body)} if route.method == "POST" else {}),
        "responses": {str(route.status): answer, "default": failed},
        "security": [{route.who: []}] if _KEYS[route.who] else [],
    }


def _ask_for(body: type[Record] | None) -> dict[str, Any]:
    return {"required": True, "content": _content("JSON" if body in (None, Record) else body)}


def _content(what: type[Record] | str | None) -> dict[str, Any]:
    if what == "text":
        return {"text/plain": {"schema": {"type": "string"}}}
    schema = {"$ref": _SCHEMAS + what.__name__} if isinstance(what, type) else {"type": "object"}
    return {"application/json": {"schema": schema}}


def render_document() -> str:
    """The OpenAPI document's file."""
    return json.dumps(build_document(), indent=1) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    replace_file(folder / "gateway-api.md", render_page())
    replace_file(folder / "gateway-openapi.json", render_document())

"""docs/gateway-api.md and the OpenAPI document say what the gateway answers: every route, and no other."""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import httpx2

from tests.services.bench_fleet import Bench
from vcot.services.gateway import admin, api_page
from vcot.services.gateway.http import app

DOCS = Path(__file__).parents[3] / "docs"


def list_routes(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Method and path of what the source of the application mounts."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Call(func=ast.Name(id="Mount"), args=[ast.Constant(value=str(mounted))]):
                yield from list_routes(child, prefix + mounted)
            case ast.Call(func=ast.Name(id="Route"), args=[ast.Constant(value=path), *_], keywords=keywords):
                methods = next(ast.literal_eval(each.value) for each in keywords if each.arg == "methods")
                yield from ((method, f"{prefix}{path}") for method in methods)
            case _:
                yield from list_routes(child, prefix)


def test_every_route_of_the_application_is_documented_and_no_other():
    mounted = set(list_routes(ast.parse(Path(app.__file__).read_text("utf-8"))))
    documented = {(route.method, route.path) for route in api_page.ROUTES}
    inference = {("POST", "/v1/chat/completions"), ("POST", "/v1/completions")}
    assert len(mounted) > 10
    assert documented == mounted | inference


async def test_the_application_allows_the_methods_that_are_documented(tmp_path: Path):
    known = defaultdict(set)
    for route in api_page.ROUTES:
        known[route.path.replace("{name}", "x")].add(route.method)
    bench = Bench(tmp_path)
    async with bench.running():
        transport = httpx2.ASGITransport(bench.app, client=("127.0.0.1", 1))
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8100") as client:
            for path, methods in known.items():
                answer = await client.request("PATCH", path, headers={"content-type": "application/json"})
                assert answer.status_code == 405, path
                allowed = set(answer.headers["allow"].split(", ")) - {"HEAD"}
                assert allowed <= methods, path


def test_the_files_are_as_the_types_are():
    for name, text in {
        "gateway-api.md": api_page.render_page(),
        "gateway-openapi.json": api_page.render_document(),
    }.items():
        assert (DOCS / name).read_text("utf-8") == text, f"{name}: `make docs` writes it anew"


def test_every_record_of_the_operators_routes_has_its_fields_and_what_they_say():
    page = api_page.render_page()
    for record in (admin.SwapRequest, admin.TrialRequest, admin.RestRequest, admin.GatewayState, admin.ReplicaState):
        section = page.partition(f"### {record.__name__}\n")[2].partition("\n### ")[0]
        assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(record.model_fields)
    assert "| `pause_s` | number | required | How long requests had to wait for it; 0 where others answered" in page
    assert "| `way` | `auto` or `sleep` or `stop` | required |" in page


def test_the_document_names_every_schema_that_it_refers_to():
    document = json.loads(api_page.render_document())
    referred = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert referred <= document["components"]["schemas"].keys()
    operations = [told["operationId"] for methods in document["paths"].values() for told in methods.values()]
    assert len(operations) == len(set(operations)) == len(api_page.ROUTES)
    swap = document["paths"]["/admin/swap"]["post"]
    assert swap["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/SwapRequest"}
    assert swap["security"] == [{"operator": []}]
    assert document["paths"]["/health"]["get"]["security"] == []


def test_no_page_is_written_by_a_shell_which_empties_it_where_the_program_fails():
    makefile = (DOCS.parent / "Makefile").read_text("utf-8")
    assert "python -m vcot.services.gateway.api_page docs\n" in makefile
    assert "python -m vcot.services.recipes.settings_page docs/recipes.md\n" in makefile

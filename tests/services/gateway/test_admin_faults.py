"""Whatever is sent to /admin, the answer is a sentence, and nothing that was not tried is kept."""

import asyncio
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from tests.services.bench_fleet import Bench
from tests.services.fake_vllm import write_checkpoint
from vcot.pipeline.addresses import UpstreamUrl
from vcot.pipeline.errors import RecipeError, ServerError
from vcot.services.recipes.recipe import load_recipe

JSON = {"content-type": "application/json"}
ROUTES = ("checkpoints", "swap", "trial", "rest", "replicas")
FIELDS = ("alias", "checkpoint", "path", "name", "way", "lease_s", "url", "no_such")
_texts = st.one_of(
    st.sampled_from(["policy", "tuned", "base", "sleep", "", "/", "..", "\0", "a\0b", "/proc/self/mem", "\x1b[31m"]),
    st.text(st.characters(exclude_categories=()), max_size=20),  # half a surrogate pair, too
)
_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), _texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_texts, inner, max_size=3)),
    max_leaves=5,
)
_bodies = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 50_000, b'{"a":' * 20_000, b'{"path":"x","path":"y"}']),
    st.dictionaries(st.sampled_from(FIELDS), _values, max_size=4).map(lambda body: json.dumps(body).encode()),
    _values.map(lambda body: json.dumps(body).encode()),
)


class Fuzzed:
    """A bench on an event loop of its own, since hypothesis calls plain functions."""

    def __init__(self, folder: Path) -> None:
        self.runner = asyncio.Runner()
        self.bench = Bench(folder)
        self._running = self.bench.running()
        self.runner.run(self._running.__aenter__())

    def send(self, method: str, path: str, body: bytes = b"") -> httpx.Response:
        async def call() -> httpx.Response:
            async with asyncio.timeout(20):
                return await self.bench.http.request(method, path, content=body, headers=JSON)

        return self.runner.run(call())

    def close(self) -> None:
        self.runner.run(self._running.__aexit__(None, None, None))
        self.runner.close()


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Fuzzed]:
    with tempfile.TemporaryDirectory() as folder:
        found = Fuzzed(Path(folder))
        yield found
        found.close()


def is_sentence(answer: httpx.Response) -> bool:
    said = answer.json()["error"]["message"]
    return bool(said) and "Traceback" not in said and len(said) < 1000


@settings(max_examples=150, derandomize=True, suppress_health_check=list(HealthCheck))
@given(route=st.sampled_from(ROUTES), body=_bodies)
def test_any_body_gets_an_answer(fuzzed: Fuzzed, route: str, body: bytes) -> None:
    answer = fuzzed.send("POST", f"/admin/{route}", body)
    assert answer.status_code < 300 or (400 <= answer.status_code < 500 and is_sentence(answer)), answer.text
    assert not any(replica.url for replica in fuzzed.bench.fleet.replicas)
    fuzzed.runner.run(fuzzed.bench.fleet.changes.wait_for(lambda: not fuzzed.bench.fleet.is_changing, 5))
    if route == "rest":
        fuzzed.send("POST", "/admin/wake")


@settings(max_examples=80, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from(["GET", "DELETE", "PUT", "PATCH", "OPTIONS"]),
    route=st.sampled_from(["/admin/checkpoints/", "/admin/replicas/", "/admin/", "/v1/models/", "/"]),
    name=st.text(st.characters(exclude_categories=("Cs",)), max_size=30),
)
def test_any_name_gets_an_answer(fuzzed: Fuzzed, method: str, route: str, name: str) -> None:
    answer = fuzzed.send(method, route + quote(name))
    assert answer.status_code < 400 or (400 <= answer.status_code < 500 and is_sentence(answer)), answer.text


def test_an_endless_body_is_not_read_whole(fuzzed: Fuzzed) -> None:
    answer = fuzzed.send("POST", "/admin/swap", b"x" * 70_000)
    assert (answer.status_code, is_sentence(answer)) == (413, True)


GOOD = {
    "checkpoints": {"path": "/tmp"},
    "swap": {"alias": "policy", "checkpoint": "tuned"},
    "trial": {"name": "tuned", "owner": "me"},
    "rest": {"way": "sleep", "lease_s": 60},
    "replicas": {"url": "http://127.0.0.1:9"},
    "wake": {},
}
ODD_VALUES = ["true", "1", "1.5", "[]", "{}", "NaN", "1e999", '"1"']


def unchanged(fuzzed: Fuzzed) -> tuple[Any, ...]:
    """What an /admin request could change, in memory and on the disk."""
    fleet, folder = fuzzed.bench.fleet, fuzzed.bench.directory / "run"
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    phases = [(replica.name, replica.gate.admission.phase) for replica in fleet.replicas]
    return files, phases, fleet.trial, fleet.lease, fleet.registry.aliases(), fleet.live


def refusals_of(fuzzed: Fuzzed, route: str, *bodies: str | bytes) -> list[httpx.Response]:
    before = unchanged(fuzzed)
    answers = [fuzzed.send("POST", f"/admin/{route}", b if isinstance(b, bytes) else b.encode()) for b in bodies]
    assert unchanged(fuzzed) == before
    return answers


@pytest.mark.parametrize("route", GOOD)
def test_a_field_that_is_not_known_is_refused(fuzzed: Fuzzed, route: str) -> None:
    (answer,) = refusals_of(fuzzed, route, json.dumps(GOOD[route] | {"forse": True}))
    assert (answer.status_code, "forse" in answer.text, is_sentence(answer)) == (422, True, True)


@pytest.mark.parametrize(("route", "name"), [(route, name) for route, body in GOOD.items() for name in body])
def test_a_value_of_another_type_is_refused(fuzzed: Fuzzed, route: str, name: str) -> None:
    right = {"1", "1.5"} if name == "lease_s" else {'"1"'}
    bodies = [json.dumps(GOOD[route] | {name: "?"}).replace('"?"', odd) for odd in ODD_VALUES if odd not in right]
    for answer in refusals_of(fuzzed, route, *bodies):
        assert (answer.status_code, name in answer.text, is_sentence(answer)) == (422, True, True), answer.text


@pytest.mark.parametrize("route", [route for route, body in GOOD.items() if body])
def test_what_is_no_object_with_each_key_once_is_refused(fuzzed: Fuzzed, route: str) -> None:
    whole = json.dumps(GOOD[route])
    twice = whole[:-1] + ", " + whole[1:]
    bodies = ["", " ", twice, whole + "x", whole[:-1], "nul", whole.encode("utf-16"), b"\xff", b"[" * 50_000]
    for answer in refusals_of(fuzzed, route, *bodies):
        assert (answer.status_code, is_sentence(answer)) == (400, True), answer.text
    for answer in refusals_of(fuzzed, route, "[]", "null", "1", json.dumps(whole)):
        assert (answer.status_code, is_sentence(answer)) == (422, True), answer.text


@pytest.mark.parametrize("route", [route for route, body in GOOD.items() if body])
@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
async def test_only_json_is_taken_with_a_key_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str, kind: str | None
) -> None:
    monkeypatch.setenv("VCOT_ADMIN_KEY", "k")
    bench = Bench(tmp_path)
    headers = {"authorization": "Bearer k"} | ({"content-type": kind} if kind else {})
    answer = await bench.http.post(f"/admin/{route}", content=json.dumps(GOOD[route]), headers=headers)
    assert (answer.status_code, is_sentence(answer)) == (415, True)
    await bench.http.aclose()


BAD = [
    *("http://vllm:80O0", "http://h:0", "http://h:65536", "http://h:-1", "http://h:+8", "http://h:\uff10", "http://h:"),
    *(
        "http://h:008",
        "http://h: 80",
        "http://h:8 ",
        " http://h",
        "\thttp://h",
        "http://h\n",
        "http://h h",
        "http://\0",
    ),
    *("http://u:p@h:1", "http://@h", "http://h\\\\@e", "ftp://h", "h:8000", "//h", "http:h", "http://", "http:///", ""),
    *(
        "http://h/v1",
        "http://h?x",
        "http://h#x",
        "http://h;x",
        "http://[::1",
        "http://::1",
        "http://[v1.x]",
        "http://[::1%1]",
    ),
    *(
        "http://ex\u00e4mple",
        "http://\uff48",
        "http://%31",
        "http://h.",
        "http://.h",
        "http://a..b",
        "http://" + "a" * 64,
    ),
    *(
        "http://127.1",
        "http://1",
        "http://0x7f000001",
        "http://256.1.1.1",
        "http://[1.2.3.4]",
        "\ud800",
        "http://a." + "b." * 140,
    ),
]


@pytest.mark.parametrize("url", BAD)
def test_an_address_that_no_client_takes_is_refused_before_it_is_kept(fuzzed: Fuzzed, url: str) -> None:
    answer = fuzzed.send("POST", "/admin/replicas", json.dumps({"url": url}).encode())
    assert (answer.status_code, is_sentence(answer)) == (422, True)
    assert not any(replica.url for replica in fuzzed.bench.fleet.replicas)


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("http://h:8/", "http://h:8"),
        ("HTTP://H.Org:80", "http://h.org"),
        ("https://a_b-c:443", "https://a_b-c"),
        ("http://[0:0::1]:9", "http://[::1]:9"),
        ("http://10.0.0.1", "http://10.0.0.1"),
    ],
)
def test_an_address_is_kept_in_one_way(url: str, canonical: str) -> None:
    """Else the same server could be added twice."""
    adapter: TypeAdapter[str] = TypeAdapter(UpstreamUrl)
    assert adapter.validate_python(url) == canonical == adapter.validate_python(canonical)
    httpx.URL(canonical)


@settings(max_examples=300, derandomize=True)
@given(st.from_regex(r"https?://[^/]{0,20}(:[0-9A-Z]{1,6})?/?", fullmatch=True))
def test_what_is_kept_every_client_takes(url: str) -> None:
    adapter: TypeAdapter[str] = TypeAdapter(UpstreamUrl)
    try:
        kept = adapter.validate_python(url)
    except ValidationError:
        return
    parsed = httpx.URL(kept)
    assert str(parsed).rstrip("/") == kept


async def test_a_gateway_is_no_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vcot.services.engine.vllm import Endpoint
    from vcot.services.gateway.fleet.remote import RemoteServer

    bench = Bench(tmp_path)
    async with bench.running():
        monkeypatch.setattr(Endpoint, "client", lambda *_: bench.client("127.0.0.1"))
        with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:8100 is a gateway, and no vLLM server"):
            await RemoteServer("http://127.0.0.1:8100", 5.0).start(bench.said.append)


async def test_a_checkpoint_cannot_take_an_aliass_name(tmp_path: Path) -> None:
    """Whoever asked for it would get what the alias means."""
    bench = Bench(tmp_path)
    async with bench.running():
        bench.registry.set_live("best", "base")
        for number, name in enumerate(("policy", "best")):
            path = write_checkpoint(tmp_path / name, name, 5.0 + number)
            answer = await bench.http.post("/admin/checkpoints", json={"path": str(path)})
            assert (answer.status_code, "is an alias" in answer.text) == (404, True)
        refused: Any = await bench.http.post("/admin/swap", json={"alias": "tuned", "checkpoint": "base"})
        assert (refused.status_code, "own name" in refused.text) == (404, True)
    with pytest.raises(RecipeError, match="'policy' is the alias"):
        load_recipe("nano", ["model.name=policy"])


async def test_files_that_the_gateway_cannot_write_are_no_fault_of_the_request(tmp_path: Path) -> None:
    """As on a full disk: it was told to give the path of a checkpoint's directory."""
    bench = Bench(tmp_path)
    async with bench.running():
        (tmp_path / "run" / "replicas.json").mkdir()
        refused = await bench.http.post("/admin/replicas", json={})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "ServerError")
        assert "the gateway cannot use its own files" in refused.json()["error"]["message"]
        assert "replicas.json" in refused.json()["error"]["message"]
        assert len(bench.fleet.replicas) == 1

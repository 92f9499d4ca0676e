"""`vcot push` against a hub that answers as the real one does, over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from tests.services.fake_vllm import write_checkpoint
from vcot.pipeline.errors import CheckpointError, InputError, MachineError, ServerError
from vcot.services.checkpoints.push import Destination, pack, push
from vcot.services.cli.checkpoint_commands import push_checkpoint, push_pairs
from vcot.services.cli.terminal import Terminal
from vcot.services.run.directory import open_run
from vcot.services.run.session import Session

PLACE = Destination("me/pairs", None, is_public=False)


class Hub(ThreadingHTTPServer):
    """What it holds: repositories by name, and the files that were committed to each branch."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.files, self.large, self.asked = {}, {}, {}, []
        self.tokens, self.status = {"hf_good"}, 200


class Handler(BaseHTTPRequestHandler):
    """The few endpoints that an upload needs."""

    def log_message(self, *_):
        pass

    def reply(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def read(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_one(self):
        hub, body, parts = self.server, self.read_body(), self.path.partition("?")[0].strip("/").split("/")
        hub.asked.append(f"{self.command} {self.path}")
        if parts[0] == "upload":
            hub.large[parts[1]] = body
            return self.reply({})
        if self.headers.get("Authorization") not in {f"Bearer {token}" for token in hub.tokens}:
            return self.reply({"error": "Invalid username or password."}, 401)
        if hub.status != 200:
            return self.reply({"error": "out of order"}, hub.status)
        return self.api(parts, body)

    def api(self, parts, body):
        hub = self.server
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.repos:
                return self.reply({"url": f"{hub.url}/{name}"}, 409)
            hub.repos[name] = asked
            return self.reply({"url": f"{hub.url}/{name}"})
        if parts[:2] == ["api", "validate-yaml"]:
            return self.reply({"errors": [], "warnings": []})
        if parts[-3:] == ["objects", "batch"] or parts[-2:] == ["objects", "batch"]:
            upload = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{hub.url}/upload/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": upload})
        name, rest = "/".join(parts[2:4]), parts[4:]
        if not rest:
            repo = hub.repos[name]
            private = repo.get("visibility", "private" if repo.get("private") else "public") == "private"
            return self.reply({"id": name, "private": private, "sha": "0" * 40, "siblings": [], "tags": []})
        if rest[0] == "branch":
            return self.reply({})
        if rest[0] == "tree":
            files = hub.files.get((name, rest[1]), {})
            return self.reply([{"type": "file", "path": f, "oid": "0" * 40, "size": len(files[f])} for f in files])
        if rest[0] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if _is_large(f["path"]) else "regular"} for f in files]
            return self.reply({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        assert rest[0] == "commit", self.path
        return self.commit(name, rest[1], [json.loads(line) for line in body.splitlines()])

    def commit(self, name, branch, lines):
        hub = self.server
        files = hub.files.setdefault((name, branch), {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "deletedFile":
                del files[value["path"]]
            if line["key"] == "lfsFile":
                files[value["path"]] = hub.large[value["oid"]]
        hub.summary = lines[0]["value"]["summary"]
        self.reply({"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1" * 40, "success": True})

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.read()
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_POST = do_PUT = do_HEAD = lambda self: self.handle_one()  # noqa: N815


def _is_large(path):
    return path.endswith((".parquet", ".safetensors"))


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_DISABLE_XET", True
    )  # its uploads are a protocol of their own
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def parcel(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Pairs\n")
    (folder / "train.parquet").write_bytes(b"PAR1" * 100)
    (folder / ".cache").write_text("not sent")
    return pack(folder, "dataset", "Preference pairs of nano")


def test_a_folder_arrives_as_it_lies_there_in_a_private_repository(hub, parcel):
    url = push(parcel, PLACE)
    assert url == f"{hub.url}/me/pairs/commit/1"
    assert (hub.repos["me/pairs"]["type"], hub.repos["me/pairs"]["visibility"]) == ("dataset", "private")
    sent = hub.files["me/pairs", "main"]
    assert {name: sent[name] for name, _ in parcel.files} == {
        name: (parcel.folder / name).read_bytes() for name in ("README.md", "train.parquet")
    }
    assert set(sent) == {"README.md", "train.parquet"}
    assert hub.large.keys() == {hashlib.sha256(b"PAR1" * 100).hexdigest()}
    assert hub.summary == "Preference pairs of nano"
    assert push(parcel, PLACE) == url, "a repository that exists is used again"


def test_a_branch_is_made(hub, parcel):
    push(parcel, Destination("me/pairs", "v1", is_public=True))
    assert hub.repos["me/pairs"]["visibility"] == "public"
    assert "POST /api/datasets/me/pairs/branch/v1" in hub.asked
    assert ("me/pairs", "v1") in hub.files


def test_what_a_loader_would_read_with_the_new_files_goes_and_nothing_else(hub, parcel, tmp_path):
    """The adapter of an earlier push would be added to the merged weights that hold it; an old split be trained on."""
    (parcel.folder / "validation.parquet").write_bytes(b"PAR1")
    push(parcel, PLACE)
    hub.files["me/pairs", "main"]["LICENSE"] = b"mine"
    (parcel.folder / "validation.parquet").unlink()
    push(parcel, PLACE)
    assert set(hub.files["me/pairs", "main"]) == {"README.md", "train.parquet", "LICENSE"}
    for name in ("adapter", "merged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("---\nlicense: unknown\n---\n")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter" / name).write_text("{}")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "merged" / name).write_text("{}")
    for name in ("adapter", "merged"):
        push(pack(tmp_path / name, "model", name), Destination("me/policy", None, is_public=False))
    assert set(hub.files["me/policy", "main"]) == {"README.md", "config.json", "model.safetensors"}


def test_nothing_goes_to_a_public_repository_unasked(hub, parcel):
    push(parcel, Destination("me/pairs", None, is_public=True))
    hub.files.clear()
    with pytest.raises(InputError, match="me/pairs exists and is public; add --public"):
        push(parcel, PLACE)
    assert hub.files == {}


@pytest.mark.parametrize(
    ("token", "status", "kind", "said"),
    [
        ("hf_bad", 200, MachineError, "the hub refuses me/pairs .401: .*set HF_TOKEN to a token that may write"),
        ("hf_good", 403, MachineError, "the hub refuses me/pairs .403"),
        ("hf_good", 500, ServerError, "the hub answered 500 for me/pairs .*the same command goes on"),
    ],
)
def test_what_the_hub_refuses_is_said_in_a_sentence(hub, parcel, monkeypatch, token, status, kind, said):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.status = status
    with pytest.raises(kind, match=said):
        push(parcel, PLACE)


def test_without_a_token_or_a_hub_or_a_name_nothing_is_sent(hub, parcel, monkeypatch, tmp_path):
    with pytest.raises(InputError, match="is no name of a repository"):
        push(parcel, Destination("a/b/c", None, is_public=False))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ServerError, match="cannot be reached"):
        push(parcel, PLACE)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(MachineError, match="HF_TOKEN is not set"):
        push(parcel, PLACE)
    assert not hub.asked


def test_a_folder_without_a_card_is_not_sent(tmp_path):
    with pytest.raises(InputError, match=r"has no README.md"):
        pack(tmp_path, "model", "m")


@pytest.fixture
async def session(tmp_path):
    base = write_checkpoint(tmp_path / "base", "base", 1.0, kind="base")
    with open_run(tmp_path / "run", "nano", [f"model.source={base}"]) as run:
        async with Session(run, Terminal()) as session:
            yield session


async def test_a_registered_checkpoint_is_sent_whole_and_a_dry_run_sends_nothing(hub, session, tmp_path, capsys):
    made = session.registry.register(write_checkpoint(tmp_path / "run" / "checkpoints" / "dpo-1", "dpo-1", 2.0))
    (made.directory / "README.md").write_text("---\nbase_model: nano\n---\n")
    place = Destination("me/policy", None, is_public=False)
    await push_checkpoint(session, place, "dpo-1", dry_run=True)
    said = capsys.readouterr()
    assert "as model to me/policy, branch main, private" in said.err
    assert "model.safetensors" in said.out
    assert not hub.asked
    await push_checkpoint(session, place, "dpo-1", dry_run=False)
    names = {path.relative_to(made.directory).as_posix() for path in made.directory.rglob("*") if path.is_file()}
    assert set(hub.files["me/policy", "main"]) == names >= {"README.md", "checkpoint.json"}
    assert hub.repos["me/policy"]["type"] == "model"


async def test_a_checkpoint_whose_files_were_changed_is_not_published_as_what_it_was(hub, session, tmp_path):
    made = session.registry.register(write_checkpoint(tmp_path / "run" / "checkpoints" / "dpo-1", "dpo-1", 2.0))
    (made.directory / "README.md").write_text("---\nbase_model: nano\n---\n")
    (made.directory / "model.safetensors").write_bytes(b"others")
    with pytest.raises(CheckpointError, match="its files were changed"):
        await push_checkpoint(session, Destination("me/policy", None, is_public=False), "dpo-1", dry_run=False)
    assert not hub.asked


async def test_the_base_and_what_is_not_there_are_not_sent(hub, session):
    with pytest.raises(InputError, match="base is the base model"):
        await push_checkpoint(session, PLACE, "base", dry_run=True)
    with pytest.raises(InputError, match="has no policy yet"):
        await push_checkpoint(session, PLACE, None, dry_run=True)
    with pytest.raises(CheckpointError, match="no checkpoint or alias 'dpo-2'"):
        await push_checkpoint(session, PLACE, "dpo-2", dry_run=True)
    with pytest.raises(InputError, match="run `vcot sample` first"):
        await push_pairs(session, PLACE, dry_run=True)
    assert not hub.asked

"""The whole loop as a user runs it: real vLLM, real TRL, killed in the middle, finished, and run again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.ledgers import count_good
from vcot.pipeline.records import Response

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SMALL = [
    "--set",
    "serve.port=0",
    "tasks.num_tasks=40",
    "eval.num_tasks=30",
    "eval.temperatures=[0.8]",
    "train.epochs=1",
    "train.num_evaluations=2",
]
DATA = Path(__file__).parents[3] / "shared" / "data"
VCOT = [sys.executable, "-m", "vcot.services.cli"]
MEASURED = """
import pathlib, re
from vcot.services.cli import outcome
try:
    outcome.main()
finally:
    status = pathlib.Path("/proc/self/status").read_text()  # not getrusage: its peak counts the test runner's, before exec
    print("peak", int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) // 1024, "MB")
"""
MAX_CLIENT_MB = 500


def command(*arguments, run):
    """One vcot command to its end; its own memory must stay small, whatever it starts."""
    line = [sys.executable, "-c", MEASURED, *arguments, "--run", str(run)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    peak = re.search(r"^peak (\d+) MB$", done.stdout, re.MULTILINE)
    assert peak, done.stdout
    assert int(peak[1]) < MAX_CLIENT_MB
    return done


def processes_naming(text):
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line and int(entry.parent.name) != os.getpid():
            found.append(line)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose first command was killed with -9 while it sampled."""
    run = tmp_path_factory.mktemp("demo") / "run"
    slow = ["sample.max_concurrency=1"]  # so that the kill finds it sampling
    arguments = [*VCOT, "demo", "--run", str(run), *SMALL, *slow]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=sys.stderr) as process:
        while count_good(run, Response) < 16 and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None, "the demo ended before it could be killed"
        process.send_signal(signal.SIGKILL)
    return run


def test_kill_9_loses_nothing_leaves_nothing_behind_and_the_same_command_finishes(run):
    kept = count_good(run, Response)
    assert 16 <= kept < 320
    deadline = time.monotonic() + 60
    while (left := processes_naming(str(run))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == [], "processes outlived the killed command"

    with subprocess.Popen([*VCOT, "serve", "--run", str(run)], stderr=sys.stderr) as server:
        try:
            while not (run / "serving.json").exists() and server.poll() is None:
                time.sleep(0.1)
            done = command("demo", run=run)
            assert done.returncode == 0, done.stderr
            assert re.search(rf"320 requested = {320 - kept} ok \+ {kept} cached", done.stderr)
            check_results(run, done)
            check_names(run)
            check_real_photos(run)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)
    assert not (run / "serving.json").exists()


def check_results(run, done):
    results = json.loads((run / "report" / "results.json").read_text())
    rows = results["results"]
    assert {(row["checkpoint"]["kind"], row["prompt"]) for row in rows} == {
        (kind, prompt) for kind in ("base", "merged") for prompt in ("zero_shot", "cot")
    }
    assert len({row["checkpoint"]["digest"] for row in rows}) == 2
    assert all(row["num_scored"] == 30 and row["num_failed"] == 0 for row in rows)
    assert "chance" in done.stdout
    umask = os.umask(0)
    os.umask(umask)
    modes = {path: oct(path.stat().st_mode & 0o777) for path in run.rglob("*") if path.is_file()}
    assert {path: mode for path, mode in modes.items() if mode != oct(0o666 & ~umask)} == {}
    page = (run / "report" / "index.html").read_text()
    assert "<svg" in page
    assert "data:image/png;base64," in page
    assert not re.search(r'(?:src|href)="https?://', page)


def check_names(run):
    """What README says can be asked for after a demo, and that an evaluation changes nothing of it."""
    url = json.loads((run / "serving.json").read_text())["url"]

    def served():
        with urllib.request.urlopen(f"{url}/v1/models") as answer:
            return {card["id"]: card["root"] for card in json.load(answer)["data"]}

    names = served()
    assert set(names) == {"policy", names["policy"].split("@")[0]}
    assert names["policy"].startswith("dpo-")
    body = json.dumps({"model": "base", "messages": [{"role": "user", "content": "?"}]}).encode()
    asked = urllib.request.Request(f"{url}/v1/chat/completions", body, {"content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asked)
    with refused.value as answer:
        assert "vcot swap policy base" in json.load(answer)["error"]["message"]
    results = (run / "report" / "results.json").read_bytes()
    done = command("eval", "base", "--set", "eval.seed=1", "eval.num_tasks=8", run=run)
    assert done.returncode == 0, done.stderr
    assert served() == names
    assert (run / "report" / "results.json").read_bytes() == results


def check_real_photos(run):
    """ScienceQA's photos and diagrams through the same server; its questions are no nano questions."""
    if not (DATA / "scienceqa").is_dir():
        sys.stderr.write(f"real photos not tried: {DATA / 'scienceqa'} is absent\n")
        return
    url = json.loads((run / "serving.json").read_text())["url"]
    source = ["--source", "scienceqa", "--path", str(DATA / "scienceqa")]
    photos = run.with_name("photos")
    done = command("sample", *source, "--set", "tasks.num_tasks=6", f"serve.url={url}", run=photos)
    assert done.returncode == 0, done.stderr
    assert "48 requested = 48 ok + 0 cached" in done.stderr
    assert count_good(photos, Response) == 48


def test_the_same_command_again_sends_nothing_and_starts_nothing(run):
    before = count_good(run, Response)
    done = command("demo", *SMALL, "--json", run=run)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[: done.stdout.rindex("peak ")])["results"], "one document, and nothing else"
    assert "serve" not in done.stderr
    assert count_good(run, Response) == before
    assert re.search(r"320 requested = 0 ok \+ 320 cached", done.stderr)

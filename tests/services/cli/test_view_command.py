"""`vcot view` as a person has it: a link, pages, an end that leaves nothing behind."""

import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from tests.services.cli.test_cli import vcot
from tests.services.view.view_run import own, prepared

__all__ = ["own", "prepared", "vcot"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_prints_a_link_serves_and_ends_when_told(own, number, code):
    command = [sys.executable, "-m", "vcot.services.cli", "view", str(own.directory)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            link = next(found[0] for line in process.stderr if (found := re.search(r"http://127\S+", line)))
            assert httpx.get(link.split("?")[0], trust_env=False).status_code == 403
            with httpx.Client(follow_redirects=True, trust_env=False) as client:
                page = client.get(link)
                assert (page.status_code, "vcot view" in page.text) == (200, True)
                assert "token" not in str(page.url)
        finally:
            process.send_signal(number)
        assert process.wait(timeout=30) == code
    assert not re.search(f"vcot.services.view.indexing {own.directory} ", list_commands()), (
        "the index's process went with it"
    )


def list_commands():
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_a_port_that_is_taken_is_one_sentence(prepared, vcot):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = vcot("view", prepared.directory, "--port", taken.getsockname()[1])
    assert (code, "give another with --port" in err) == (2, True), err

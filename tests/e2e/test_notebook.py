"""docs/notebook.md, cell by cell as it stands, against a real gateway: in a process where torch cannot be imported."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gateway import free_port
from tests.compose.engine import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
CODE, *_ = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs" / "notebook.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
)
RUN = """
import ast, asyncio, inspect, sys
sys.modules["torch"] = None
code = compile(open("notebook.py").read(), "notebook.py", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
async def main():
    await eval(code, {"__name__": "__main__"})
asyncio.run(main())
"""


def test_the_loop_takes_30_statements_beside_its_imports():
    body = [node for node in ast.parse(CODE).body if not isinstance(node, ast.Import | ast.ImportFrom)]
    assert len([node for top in body for node in ast.walk(top) if isinstance(node, ast.stmt)]) <= 30


@pytest.mark.slow
def test_it_runs_as_it_stands_and_again_for_nothing(tmp_path):
    port = free_port()
    (tmp_path / "notebook.py").write_text(CODE.replace(":8100", f":{port}"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "vcot.services.cli", "serve", "--run", "served", "--recipe", "nano"]
    with (tmp_path / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--set", f"serve.port={port}"], cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
    try:
        until(lambda: "is live" in (tmp_path / "serve.log").read_text(), 180)
        first, again = (
            subprocess.run(
                [sys.executable, "-c", RUN], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            for _ in range(2)
        )
    finally:
        server.terminate()
        server.wait()
    assert first.returncode == 0, first.stderr
    assert "requested=480, ok=480" in first.stdout.replace("\n", "")
    table = first.stdout[first.stdout.index("Accuracy in %") :]
    assert re.search(r"^dpo-\w+ *\n +zero_shot 0\.4 +\d", table, re.MULTILINE)
    assert "Paired differences" in table
    assert again.returncode == 0, again.stderr
    assert again.stdout.endswith(table)
    assert "ok=0, cached=480" in again.stdout.replace("\n", " ")

"""`vcot --install-completion`, in a real shell."""

import os
import subprocess
import sys


def test_a_shell_completes_commands_and_options(tmp_path):
    environment = os.environ | {"HOME": str(tmp_path), "SHELL": "/bin/bash"}
    command = [sys.executable, "-m", "vcot.services.cli", "--install-completion"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    script = tmp_path / ".local" / "share" / "bash-completion" / "completions" / "vcot"
    assert str(script) in (tmp_path / ".bashrc").read_text("utf-8")

    def complete(*words):
        ask = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _vcot; printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(
            ["bash", "-c", ask, str(script), "vcot", *words], check=True, capture_output=True, text=True
        )
        return done.stdout.split()

    assert complete("sam") == ["sample"]
    assert "list" in complete("checkpoints", "")
    assert complete("eval", "--pl") == ["--plan"]

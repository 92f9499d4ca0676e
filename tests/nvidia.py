"""A simulated machine: `nvidia-smi` as a script on the PATH."""

import stat
from pathlib import Path

FIELDS = "{index}, GPU-{index:04}, {name}, {driver}, {total}, {free}, Disabled"


def install_nvidia_smi(folder: Path, monkeypatch, *free_mib, total=81920, driver="580.65.06", name="NVIDIA A100"):
    """One GPU for each of `free_mib`."""
    lines = [
        FIELDS.format(index=index, name=name, driver=driver, total=total, free=free)
        for index, free in enumerate(free_mib)
    ]
    script = folder / "nvidia-smi"
    apps = "\n".join(f"GPU-{index:04}, 4711, python3, 1" for index in range(len(lines)))
    answers = f'*query-gpu*) cat <<"END"\n{chr(10).join(lines)}\nEND\n;;\n*query-compute*) cat <<"END"\n{apps}\nEND\n;;'
    script.write_text(f'#!/bin/sh\ncase "$*" in\n{answers}\n*) exit 6;;\nesac\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

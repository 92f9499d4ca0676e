"""The NVIDIA GPUs of this machine, as `nvidia-smi` shows them: their memory, what is free of it, and the driver. No torch.

Model: what a process of ours would see, so CUDA_VISIBLE_DEVICES counts. Where a GPU is cut into slices (MIG), a process sees
one slice; the largest stands for the machine then.

Limits: a slice's size is taken from its name, and all of it to be free.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from vcot.training.protocol.memory import GIB

Run = Callable[..., "subprocess.CompletedProcess[str]"]
_FIELDS = "index,uuid,name,driver_version,memory.total,memory.free,mig.mode.current"
_TIMEOUT_S = 20
_SLICE = re.compile(r"MIG (?P<name>\d+g\.(?P<gb>\d+)gb\S*)\s+Device\s+\d+: \(UUID: (?P<uuid>\S+)\)")
_OF_NAME = 0.95
"""A slice's memory in GiB, of the number in its name (3g.40gb has 39.3, 1g.10gb has 9.5)."""
_TAKEN_GIB = 1.0
"""Of a GPU's memory, by others, from which on it is asked who they are."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one slice of one."""

    index: int
    uuid: str
    name: str
    total_gib: float
    free_gib: float


@dataclass(frozen=True)
class Gpus:
    """Those that a process of ours would see."""

    seen: tuple[Gpu, ...] = ()
    driver: str | None = None
    """The driver's version, such as 580.65.06."""
    fault: str = ""
    """Why there is none."""
    users: tuple[str, ...] = ()
    """Processes that hold memory of them, where much of it is taken."""

    @property
    def total_gib(self) -> float:
        """Memory of the smallest; 0 where there is none."""
        return min((gpu.total_gib for gpu in self.seen), default=0.0)

    @property
    def free_gib(self) -> float:
        """What is free on the fullest."""
        return min((gpu.free_gib for gpu in self.seen), default=0.0)


def list_gpus(run: Run = subprocess.run, environment: Mapping[str, str] = os.environ) -> Gpus:
    """What `nvidia-smi` shows; `run` stands in for subprocess.run in tests."""
    text, fault = _ask(run, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.count(",") == 6]
    if not rows:
        return Gpus(fault=fault or "nvidia-smi shows no GPU")
    driver, all_gpus = rows[0][3], [_parse(row) for row in rows]
    if any(row[6] == "Enabled" for row in rows):
        all_gpus = _slices(_ask(run, "-L")[0])
    seen = _visible(all_gpus, environment.get("CUDA_VISIBLE_DEVICES"))
    if not seen:
        hidden = "CUDA_VISIBLE_DEVICES hides every GPU" if all_gpus else "MIG is on, and no GPU has a slice"
        return Gpus(driver=driver, fault=hidden)
    is_taken = any(gpu.total_gib - gpu.free_gib > _TAKEN_GIB for gpu in seen)
    return Gpus(tuple(seen), driver, users=_users(run, seen) if is_taken else ())


def _ask(run: Run, *arguments: str) -> tuple[str, str]:
    """What nvidia-smi prints, and why it printed nothing."""
    try:
        done = run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        return "", "nvidia-smi is not installed"
    except (OSError, subprocess.SubprocessError) as error:
        return "", f"nvidia-smi did not answer ({type(error).__name__})"
    if done.returncode:
        said = " ".join(f"{done.stdout} {done.stderr}".split())
        return "", said[:160] or f"nvidia-smi ended with {done.returncode}"
    return done.stdout, ""


def _parse(row: Sequence[str]) -> Gpu:
    index, uuid, name, _, total, free, _ = row
    return Gpu(int(index), uuid, name, _gib(total), _gib(free))


def _gib(mib: str) -> float:
    """Where the GPU has no memory of its own (`[N/A]`), the machine's."""
    if mib.replace(".", "").isdigit():
        return float(mib) / 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def _slices(listing: str) -> list[Gpu]:
    """The largest slice of `nvidia-smi -L`, as the one GPU of a process."""
    found = [(float(m["gb"]) * _OF_NAME, f"MIG {m['name']}", m["uuid"]) for m in _SLICE.finditer(listing)]
    found.sort(key=lambda one: -one[0])
    return [Gpu(0, uuid, name, gib, gib) for gib, name, uuid in found[:1]]


def _visible(gpus: Sequence[Gpu], setting: str | None) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names, in its order; it ends at the first name that is none."""
    if setting is None:
        return list(gpus)
    chosen: list[Gpu] = []
    for name in (part.strip() for part in setting.split(",")):
        match = [gpu for gpu in gpus if name and (str(gpu.index) == name or gpu.uuid.startswith(name))]
        if not match:
            break
        chosen.append(replace(match[0], index=len(chosen)))
    return chosen


def _users(run: Run, gpus: Sequence[Gpu]) -> tuple[str, ...]:
    text, _ = _ask(run, "--query-compute-apps=gpu_uuid,pid,process_name,used_memory", "--format=csv,noheader,nounits")
    uuids = {gpu.uuid for gpu in gpus}
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.count(",") == 3]
    return tuple(f"process {pid} ({name})" for uuid, pid, name, _ in rows if uuid in uuids)

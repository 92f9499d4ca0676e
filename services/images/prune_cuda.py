"""Delete the CUDA libraries that a CPU image never loads: torch from the package index is the CUDA build.

Run by the environment's own Python while the image is built. What torch and vLLM have mapped after their import, on a
machine without a GPU, stays (their loader wants it); cuDNN's engines, nvrtc, cuSOLVER and all headers go. A second import
in a new process shows that nothing was missed.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

_IMPORTS = """
import torch, torchvision, transformers, trl, peft
from vllm.platforms import current_platform
current_platform.import_kernels()  # those for this machine's processor: a library for another one would end this process
torch.ops._C.silu_and_mul  # a kernel that could not be imported is only warned of
"""
_LIST_MAPPED = f"{_IMPORTS}print(open('/proc/self/maps').read())"


def main() -> None:
    """Keep what is mapped, delete the rest, and import everything once more."""
    site = Path(sysconfig.get_path("purelib"))
    maps = subprocess.run([sys.executable, "-c", _LIST_MAPPED], check=True, stdout=subprocess.PIPE, text=True).stdout
    mapped = {Path(line.split()[-1]).resolve() for line in maps.splitlines() if line.endswith(".so") or ".so." in line}
    freed = 0
    for path in (site / "nvidia").rglob("*"):
        if path.is_file() and path.suffix != ".py" and path.resolve() not in mapped:
            freed += path.stat().st_size
            path.unlink()
    subprocess.run([sys.executable, "-c", _IMPORTS], check=True)
    sys.stdout.write(f"freed {freed / 2**20:.0f} MiB of CUDA libraries that nothing loads\n")


if __name__ == "__main__":
    main()

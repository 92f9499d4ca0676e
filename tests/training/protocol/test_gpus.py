"""What nvidia-smi says, from a script of that name on the PATH: several GPUs, slices, other processes, no driver."""

import stat

import pytest

from vcot.training.protocol.gpus import list_gpus

TWO = """\
0, GPU-aaaa, NVIDIA A100-SXM4-80GB, 580.65.06, 81920, 81153, Disabled
1, GPU-bbbb, NVIDIA A100-SXM4-80GB, 580.65.06, 81920, 60000, Disabled"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a script named nvidia-smi on the PATH, which prints an answer by the option that it is given."""

    def install(code=0, **answers):
        cases = "\n".join(f'*{option}*) cat <<"END"\n{answer}\nEND\n;;' for option, answer in answers.items())
        script = tmp_path / "nvidia-smi"
        script.write_text(
            f'#!/bin/sh\ncase "$*" in\n{cases.replace("query_", "query-")}\n*) exit 6;;\nesac\nexit {code}\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


def test_several_gpus_and_who_else_is_on_them(nvidia_smi):
    nvidia_smi(query_gpu=TWO, query_compute="GPU-bbbb, 4711, python3, 20000\nGPU-cccc, 5, other, 1")
    gpus = list_gpus()
    assert [gpu.name for gpu in gpus.seen] == ["NVIDIA A100-SXM4-80GB"] * 2
    assert (gpus.total_gib, round(gpus.free_gib, 1), gpus.driver) == (80.0, 58.6, "580.65.06")
    assert gpus.users == ("process 4711 (python3)",)


@pytest.mark.parametrize(
    ("setting", "free"), [("1", [58.6]), ("GPU-aaaa", [79.3]), ("1,0", [58.6, 79.3]), ("0,7,1", [79.3]), ("", [])]
)
def test_only_those_that_a_process_would_see_count(nvidia_smi, monkeypatch, setting, free):
    nvidia_smi(query_gpu=TWO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    gpus = list_gpus()
    assert [round(gpu.free_gib, 1) for gpu in gpus.seen] == free
    assert gpus.fault == ("" if free else "CUDA_VISIBLE_DEVICES hides every GPU")


def test_a_gpu_in_slices_is_its_largest_slice(nvidia_smi):
    listing = """\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-aaaa)
  MIG 1g.10gb     Device  0: (UUID: MIG-1111)
  MIG 3g.40gb     Device  1: (UUID: MIG-3333)"""
    nvidia_smi(query_gpu=TWO.splitlines()[0].replace("Disabled", "Enabled"), L=listing)
    gpus = list_gpus()
    assert [(gpu.name, gpu.total_gib) for gpu in gpus.seen] == [("MIG 3g.40gb", 38.0)]


def test_a_gpu_without_memory_of_its_own_has_the_machines(nvidia_smi):
    nvidia_smi(query_gpu="0, GPU-aaaa, NVIDIA GB10, 580.95.05, [N/A], [N/A], [N/A]")
    assert list_gpus().total_gib > 1


def test_no_driver_says_why(nvidia_smi, monkeypatch, tmp_path):
    said = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    nvidia_smi(code=9, query_gpu=said)
    assert list_gpus() == type(list_gpus())(fault=said)
    (tmp_path / "nvidia-smi").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list_gpus().fault == "nvidia-smi is not installed"

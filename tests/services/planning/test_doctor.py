"""`vcot doctor` on simulated machines, and the check that `vcot run` makes before anything is paid."""

import socket
import subprocess
import sys

import pytest

from tests.nvidia import install_nvidia_smi
from tests.services.cli.test_cli import vcot  # noqa: F401 - a fixture
from vcot.pipeline.errors import MachineError
from vcot.services.cli import commands
from vcot.services.planning import doctor, machine
from vcot.services.planning.doctor import inspect_machine
from vcot.services.planning.machine import check_machine, cuda_of_torch, driver_fault
from vcot.services.recipes.recipe import load_recipe
from vcot.services.run.session import Session


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """A machine with GPUs of which so many MiB are free."""
    (tmp_path / "bin").mkdir()
    return lambda *free, **fields: install_nvidia_smi(tmp_path / "bin", monkeypatch, *free, **fields)


@pytest.fixture(autouse=True)
def built_for_cuda_13(monkeypatch):
    for module in (machine, doctor):
        monkeypatch.setattr(module, "cuda_of_torch", lambda: "13.0")


def findings(tmp_path, *overrides):
    return {finding.what: finding for finding in inspect_machine(load_recipe("paper", overrides), tmp_path)}


def test_80_gb_fit_as_they_are(gpus, tmp_path):
    gpus(81000)
    found = findings(tmp_path)
    assert [found[what].verdict for what in ("driver", "GPU", "serving", "training")] == ["ok"] * 4
    assert "79.1 of 80.0 GiB free" in found["GPU"].found


def test_40_gb_get_the_flags_with_which_they_fit(gpus, tmp_path):
    gpus(40000, total=40960)
    found = findings(tmp_path, "serve.gpu_memory_utilization=0.45", "serve.while_training=keep")
    assert found["serving"].verdict == "missing"
    flags = found["serving"].remedy.removeprefix("--set ").split()
    found = findings(tmp_path, *flags)
    assert (found["serving"].verdict, found["training"].verdict) == ("ok", "ok")


def test_memory_that_others_hold_is_missed_and_they_are_named(gpus, tmp_path):
    gpus(81000, 8000)
    found = findings(tmp_path)
    assert "process 4711 (python3)" in found["GPU"].found
    assert found["serving"].verdict == found["training"].verdict == "missing"
    assert found["training"].remedy == "larger cards, or more of them; see below"


def test_a_second_card_that_the_recipe_leaves_unused_is_said(gpus, tmp_path):
    gpus(81000, 81000)
    assert "train.num_processes=2" in findings(tmp_path)["all cards"].remedy


def test_a_driver_too_old_for_torchs_cuda_is_said(gpus, tmp_path):
    gpus(81000, driver="550.90.07")
    found = findings(tmp_path)["driver"]
    assert found.verdict == "missing"
    assert found.remedy == "install driver 580 or newer"
    assert "550.90.07 is too old for CUDA 13.0" in found.found


def test_drivers_by_the_cuda_that_they_run():
    assert driver_fault("580.65.06", "13.0") == driver_fault("595.1", "13.2") == driver_fault("525.60", "12.9") == ""
    assert driver_fault("579.99", "13.0")
    assert driver_fault(None, "13.0") == driver_fault("550.1", None) == driver_fault("550.1", "99.0") == ""
    import torch

    assert cuda_of_torch() == torch.version.cuda


def test_no_driver_is_said_with_the_one_that_is_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = findings(tmp_path)
    assert (found["driver"].verdict, found["driver"].found) == ("missing", "nvidia-smi is not installed")
    assert "driver 580 or newer" in found["driver"].remedy
    assert found["GPU"].verdict == "missing"


def test_the_tables_say_what_fits_where_and_what_the_run_takes(gpus, vcot):  # noqa: F811
    gpus(81000)
    _, out, _ = vcot("doctor", "--recipe", "paper")
    for size in (24, 40, 48, 80):
        for num in (1, 2, 4, 8):
            assert f"{num} x {size} GB  fits " in out
    assert "up to 136,448 requests to gpt-4o-mini" in out
    assert "8 x H100 80 GB" in out
    _, out, _ = vcot("doctor", "--recipe", "paper", "--set", "model.source=Qwen/Qwen2.5-VL-72B-Instruct")
    assert "1 x 80 GB  no: vLLM has" in out
    assert "4 x 80 GB  fits with --set" in out
    _, out, _ = vcot("doctor")
    assert "GB  fits" not in out


def test_the_doctor_imports_no_torch(tmp_path):
    code = (
        "import sys; from vcot.services.cli import machine_commands, target; "
        "machine_commands.doctor(target.Target(recipe='paper')); "
        "sys.exit(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def check(*overrides, is_served=False):
    return check_machine(load_recipe("paper", overrides), is_served=is_served)


def test_what_fits_is_not_spoken_of_before_a_run(gpus):
    gpus(81000)
    assert check() == ""


def test_what_surely_does_not_fit_is_refused_with_the_flags_that_mend_it(gpus):
    gpus(40000, total=40960)
    with pytest.raises(MachineError, match=r"the training needs at least .* it fits with --set .*while_training"):
        check("serve.while_training=keep", "serve.gpu_memory_utilization=0.9")


def test_what_may_not_fit_is_a_warning(gpus):
    gpus(24000, total=24564)
    flags = "serve.gpu_memory_utilization=0.9", "serve.while_training=sleep", "train.batch_size=2"
    assert "the training may need" in check(*flags)


def test_the_runs_own_engine_is_not_another(gpus):
    gpus(40000)
    flags = "serve.gpu_memory_utilization=0.5", "serve.while_training=sleep"
    with pytest.raises(MachineError, match="are free"):
        check(*flags)
    assert check(*flags, is_served=True) == ""


def test_an_old_driver_is_refused(gpus):
    gpus(81000, driver="550.90.07")
    with pytest.raises(MachineError, match="install driver 580 or newer"):
        check()


def test_what_happens_elsewhere_is_not_judged_here(gpus, tmp_path, monkeypatch):
    gpus(8000)
    assert check("serve.url=http://elsewhere", "train.worker=remote") == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check() == ""
    assert check_machine(load_recipe("nano"), is_served=False) == ""


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_the_port_is_looked_for_where_the_gateway_would_listen(tmp_path, host, family):
    try:
        with socket.socket(family) as probe:
            probe.bind((host, 0))
    except OSError:
        pytest.skip(f"this machine has no {host}")
    recipe = load_recipe("nano", [f'serve.host="{host}"', "serve.port=0"])
    [found] = [finding for finding in inspect_machine(recipe, tmp_path) if finding.what == "port"]
    assert found.verdict == "ok"


def test_servers_on_a_ray_cluster_need_no_vllm_here(tmp_path):
    found = findings(tmp_path, "serve.ray_address=head:6379")["vLLM"]
    assert (found.verdict, "which are not looked at from here" in found.found) == ("ok", True)


def test_a_machine_whose_servers_are_on_ray_need_only_hold_the_training(gpus, tmp_path):
    """A run on a head node with a card too small for vLLM was refused."""
    gpus(24000, total=24564)
    flags = "serve.ray_address=head:6379", "train.batch_size=1"
    assert check(*flags) == ""
    found = findings(tmp_path, *flags)
    assert ("serving" in found, found["training"].verdict) == (False, "ok")


def test_a_machine_that_neither_serves_nor_trains_needs_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = findings(tmp_path, "serve.ray_address=head:6379", "train.worker=remote")
    assert (found["GPU"].verdict, found["GPU"].found, "driver" in found) == ("ok", "none; not needed", False)


def test_the_check_is_made_before_the_model_is_fetched_or_anything_is_asked(gpus, vcot, monkeypatch):  # noqa: F811
    gpus(8000, total=8192)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    monkeypatch.setattr(Session, "base", property(lambda _: pytest.fail("the model was looked for")))
    monkeypatch.setattr(commands, "sample_stage", lambda _: pytest.fail("something was sampled"))
    code, _, err = vcot("run", "--recipe", "paper")
    assert code == 2
    assert "vLLM has" in err
    assert "`vcot doctor --recipe paper` says what would fit" in err

"""Two real processes (gloo) that each hold a part of the weights: they answer as the whole model does, and train one that
neither of them may hold.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from tests.training import families
from vcot.training.nano.llava import Llava
from vcot.training.protocol.job import ADAPTER, STATUS, TrainStatus, read_record

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
MIB = 2**20
# For each checkpoint sharded and whole give the same logits, sharded also after one rank looked at its weights, and after a
# pass that raised.
COMPARING_RANK = """
import sys; from pathlib import Path
import torch; from accelerate import PartialState; from torch.distributed.tensor import DTensor
from tests.training.dpo.test_rows import make_row
from vcot.training.model.loading import load_model, load_processor
from vcot.training.dpo.rows import PairCollator
from vcot.training.model.sharded import load_sharded
def fail(*_):
    raise RuntimeError("in the midst of a pass")
state = PartialState(cpu=True)
for directory in map(Path, sys.argv[1:]):
    batch = PairCollator(load_processor(directory)[0], 336)([make_row(), make_row()])
    del batch["completion_mask"]
    sharded, whole = load_sharded(directory, torch.float32, 2), load_model(directory, torch.float32)
    parts = [p for p in sharded.parameters() if isinstance(p, DTensor)]
    assert sum(p.to_local().numel() for p in parts) < 0.6 * whole.num_parameters()
    for (name, ours), (_, theirs) in zip(sharded.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    with torch.no_grad():
        expected = whole(**batch).logits
        assert torch.equal(sharded(**batch).logits, expected)
        if state.is_main_process:
            sharded.state_dict()  # as when it writes a checkpoint
        assert torch.equal(sharded(**batch).logits, expected)
        failing = sharded.get_decoder().layers[-1].register_forward_hook(fail)
        try:
            sharded(**batch)
        except RuntimeError:
            failing.remove()
        else:
            raise AssertionError("nothing failed")
        assert torch.equal(sharded(**batch).logits, expected)
    sys.stdout.write("same\\n")
    sys.stdout.flush()
state.destroy_process_group()
"""
# A rank that a watcher, which the rank itself cannot hold up, ends when what it holds grows by more than LIMIT_MIB. Pages of
# files, such as the checkpoint's, are not counted: they are not held.
LIMITED_RANK = """
import os, signal, sys, time; from pathlib import Path
import torch._dynamo, vcot.training.dpo.fit, vcot.training.dpo.reference, vcot.training.worker.rank as rank
def held(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
def watch(pid, limit):
    while os.getppid() == pid and (now := held(pid)):
        if now > limit:
            Path(sys.argv[1], f"limited-{os.environ['RANK']}").touch()
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
fit = rank.fit
def limited(*arguments):
    pid, limit = os.getpid(), held("self") + float(os.environ["LIMIT_MIB"])
    if not os.fork():
        try:
            watch(pid, limit)
        finally:
            os._exit(0)
    fit(*arguments)
rank.fit = limited
if __name__ == "__main__": sys.exit(rank.main(Path(sys.argv[1])))
"""
WORKER = (
    "import sys; from vcot.training.protocol import launch; from vcot.training.worker import jobs; "
    "launch.RANK_MODULE = 'limited_rank'; sys.exit(jobs.main())"
)


def save_tied(directory: Path) -> Path:
    """A LLaVA whose head is its embedding."""
    processor = AutoProcessor.from_pretrained("training/checkpoints/nano")
    model = Llava().build_model(processor.tokenizer, width=32, num_layers=2)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def test_each_process_holds_a_part_and_all_answer_as_the_whole_model(checkpoint, qwen_checkpoint, tmp_path):
    others = [families.save(name, tmp_path / name) for name in ("llava_onevision", "qwen2_5_vl", "gemma3")]
    directories = [checkpoint, qwen_checkpoint, save_tied(tmp_path / "tied"), *others]
    (tmp_path / "comparing_rank.py").write_text(COMPARING_RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "comparing_rank.py"), *map(str, directories)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same") == 2 * len(directories)


def environment(*more: Path, **settings: str) -> dict[str, str]:
    """The environment, with this project and `more` where Python looks for modules."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *map(str, more)])} | settings


def save_wide(directory: Path) -> int:
    """A LLaVA in float16, in several files; returns its bytes in float32. As it is converted, no part of it stays mapped."""
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained("training/checkpoints/nano")
    model = Llava().build_model(processor.tokenizer, width=768, num_layers=28)
    model.half().save_pretrained(directory, max_shard_size="100MB")
    processor.save_pretrained(directory)
    assert len(list(directory.glob("*.safetensors"))) > 2
    return 4 * int(model.num_parameters())


def train_limited(job: Path, modules: Path, limit_mib: float) -> int:
    """The worker's exit code, its ranks being limited."""
    (modules / "limited_rank.py").write_text(LIMITED_RANK)
    settings = {"LIMIT_MIB": str(limit_mib), "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is no longer held
    with (job / "worker.log").open("ab") as log:
        command = [sys.executable, "-c", WORKER, str(job)]
        return subprocess.run(
            command, stdout=log, stderr=log, env=environment(modules, **settings), check=False
        ).returncode


def test_two_processes_train_a_model_that_one_of_them_may_not_hold(make_job, tmp_path):
    """An odd number of batches: a rank with one to compute less would be waited for by the other."""
    base = tmp_path / "wide"
    limit_mib = 0.85 * save_wide(base) / MIB
    settings = ("train.num_processes=2", "train.batch_size=1", "train.epochs=1", "train.lora_r=4")
    settings += ("train.gradient_checkpointing=true", "train.num_evaluations=1")
    sharded, whole = (
        make_job(*settings, f"train.accelerate_config={spread}", num_train=3, num_validation=1, base=base)
        for spread in ("fsdp", "ddp")
    )
    assert train_limited(sharded, tmp_path, limit_mib) == 0, (sharded / "worker.log").read_text()[-3000:]
    adapter = load_file(sharded / ADAPTER / "adapter_model.safetensors")
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)
    assert train_limited(whole, tmp_path, limit_mib) == 1
    assert "ended before its time" in read_record(whole / STATUS, TrainStatus).message
    assert list(whole.glob("limited-*"))
    assert not list(sharded.glob("limited-*"))

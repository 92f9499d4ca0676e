"""The checkpoints that bench/swap_mutations.py swaps in, and which wrong weights of them cannot change an answer.

What takes torch runs in processes of its own: the bench itself is a client.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import orjson
from safetensors.numpy import load_file

from bench.engine import NANO
from bench.mutations import Score, Target
from vcot.pipeline.identity import compute_digest, read_manifest, write_manifest

_ADAPTER = """
import sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from vcot.pipeline.identity import compute_digest, read_manifest, write_manifest
from vcot.pipeline.manifest import CheckpointManifest
from vcot.pipeline.records import CheckpointRef
from vcot.training.model.canary import build_canary
from vcot.training.model.loading import load_model, load_processor, quiet_libraries
quiet_libraries()
nano, out = Path(sys.argv[1]), Path(sys.argv[2])
torch.manual_seed(0)
layers = r".*language_model.*\\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
config = LoraConfig(r=8, lora_alpha=16, target_modules=layers, init_lora_weights=False)
model = get_peft_model(load_model(nano, torch.float32), config).eval()
model.save_pretrained(out)
ref = CheckpointRef(name=out.name, digest=compute_digest(out), kind="adapter", parent=read_manifest(nano).checkpoint.digest)
write_manifest(out, CheckpointManifest(checkpoint=ref, canary=build_canary(model, load_processor(nano)[0])))
"""
_SAME = """
import json, sys
from pathlib import Path
import torch
from vcot.training.model.canary import _image_side, _prompt_batch, draw_canary
from vcot.training.model.loading import load_model, load_processor, quiet_libraries
quiet_libraries()
right, wrongs = Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]]
processor, _ = load_processor(right)
batch = _prompt_batch(processor, draw_canary(_image_side(processor)))
draw = torch.Generator().manual_seed(0)
pixels = [batch["pixel_values"], *(torch.randn(batch["pixel_values"].shape, generator=draw) for _ in range(7))]

def logits(directory, dtype):
    model = load_model(directory, torch.float32).to(dtype)
    with torch.inference_mode():
        return torch.stack([model(**(batch | {"pixel_values": image.to(dtype)})).logits for image in pixels])

def are_same(wrong):
    if torch.equal(logits(wrong, torch.float32), logits(right, torch.float32)):
        return True
    return bool((logits(wrong, torch.float64) - logits(right, torch.float64)).abs().max() < 1e-12)

print(json.dumps([are_same(wrong) for wrong in wrongs]))
"""


def make_adapter(folder: Path) -> Path:
    subprocess.run([sys.executable, "-c", _ADAPTER, str(NANO), str(folder / "light")], check=True)
    return folder / "light"


def retemplated(target: Path, folder: Path) -> Path:
    """The same weights and another chat template, as a checkpoint of its own."""
    shutil.copytree(target, folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text("utf-8") + "{{ ' ' }}", "utf-8")
    manifest = read_manifest(folder)
    ref = manifest.checkpoint.model_copy(update={"name": folder.name, "digest": compute_digest(folder)})
    write_manifest(folder, manifest.model_copy(update={"checkpoint": ref}))
    return folder


def sort_out(score: Score, made: dict[str, Target], folder: Path) -> tuple[list[str], list[str]]:
    """Names of what was missed, and of what was equivalent."""
    missed = [name for _, name, mutation in score.passed if mutation is None]
    doubtful = [(name, mutation) for way, name, mutation in score.passed if mutation and way != "adapter"]
    missed += [name for way, name, mutation in score.passed if mutation and way == "adapter"]
    if not doubtful:
        return missed, list(score.harmless)
    target = made["tuned"]
    old, weights = load_file(NANO / target.file), target.weights
    wrongs = []
    for number, (_, mutation) in enumerate(doubtful):
        changed = mutation.of(weights, sorted(weights))
        assert changed is not None
        wrongs.append(str(target.write(folder / f"doubtful-{number}", old | changed)))
    command = [sys.executable, "-c", _SAME, str(target.directory), *wrongs]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    same = orjson.loads(done.stdout.splitlines()[-1])
    equivalent = [name for (name, _), is_same in zip(doubtful, same, strict=True) if is_same]
    return missed + [name for name, _ in doubtful if name not in equivalent], equivalent + score.harmless

"""Train a little, merge, and see that what is not the policy, or is only the base, never becomes a checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from vcot.pipeline.errors import CheckpointError, MachineError
from vcot.pipeline.files import write_record
from vcot.pipeline.identity import compute_digest, verify_checkpoint
from vcot.pipeline.records import CheckpointRef
from vcot.training.dpo import probe
from vcot.training.merge import build, merging
from vcot.training.model import loading
from vcot.training.model.model_card import find_hub_id, write_adapter_card
from vcot.training.protocol.agreement import Answers, read_probe
from vcot.training.protocol.job import (
    ADAPTER,
    JOB,
    MERGE_REPORT,
    PREFLIGHT,
    STATUS,
    MergeReport,
    Preflight,
    TrainJob,
    TrainStatus,
    read_record,
)
from vcot.training.worker import jobs

WEIGHTS = "adapter_model.safetensors"
UMASK = 0o027
"""Not the usual one, under which `trained` is made."""


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture(scope="module")
def trained(make_job, tmp_path_factory):
    """A job that was trained and merged by one worker."""
    out = tmp_path_factory.mktemp("checkpoints") / "merged"
    with umask(UMASK):
        job = make_job("train.learning_rate=1e-2", "train.lora_r=4")
        jobs.work(job, out)
    return job, out


@pytest.fixture
def job(trained, tmp_path):
    """A copy of the trained job that a test may change."""
    return shutil.copytree(trained[0], tmp_path / "job")


def test_worker_trains_and_merges(trained):
    directory, out = trained
    job = read_record(directory / JOB, TrainJob)
    manifest = verify_checkpoint(out)
    assert manifest.checkpoint == CheckpointRef(
        name=job.checkpoint_name, digest=manifest.checkpoint.digest, kind="merged", parent=job.base.digest
    )
    assert manifest.job == job.key
    assert read_record(directory / STATUS, TrainStatus).state == "done"
    report = read_record(out / MERGE_REPORT, MergeReport)
    assert report.max_abs_logprob < 1e-4
    assert report.differs_from_base > 1e-2
    assert report.retention.kept == pytest.approx(1, abs=1e-3)
    assert report.retention.error < 1e-3
    assert report.retention.before > 1e-3


def test_layout_is_the_hubs(trained, checkpoint):
    _, out = trained
    names = set(load_file(out / "model.safetensors"))
    assert names == set(load_file(checkpoint / "model.safetensors"))
    assert any(name.startswith("vision_tower.vision_model.") for name in names)
    files = {path.name for path in out.iterdir()}
    assert {"config.json", "processor_config.json", "tokenizer.json", "chat_template.jinja", "checkpoint.json"} <= files
    for path in checkpoint.iterdir():
        if path.name not in ("model.safetensors", "generation_config.json", "README.md"):
            assert (out / path.name).read_bytes() == path.read_bytes(), "other versions read the base's own files"
    sampling = json.loads((out / "generation_config.json").read_text())
    assert set(sampling) <= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
    assert not (out / "adapter_config.json").exists()


def test_cards_say_what_was_made_and_change_no_digest(trained):
    directory, out = trained
    job = read_record(directory / JOB, TrainJob)
    for card, library in ((out / "README.md", "transformers"), (directory / ADAPTER / "README.md", "peft")):
        text, data = card.read_text(), ModelCard.load(card).data
        assert (data.library_name, data.license, data.pipeline_tag) == (library, "unknown", "image-text-to-text")
        assert {"vcot", "dpo", "lora"} <= set(data.tags)
        for fact in (job.base.digest, job.pairs_digest, "DPO with LoRA", "| train.learning_rate | 0.01 |"):
            assert fact in text
        assert "Whether it answers better than its base" in text
        assert "The licence is the base's, which its files here do not say." in " ".join(text.split())
    assert verify_checkpoint(out).checkpoint.digest in (out / "README.md").read_text()
    before = verify_checkpoint(out)
    (out / "README.md").write_text("mine")
    assert verify_checkpoint(out) == before


BASE_CARD = "---\nlicense: other\nlicense_name: llama-2\nlicense_link: https://example.org/l\n---\n# Base\n"


def test_licence_and_data_sets_come_from_the_cards_of_base_and_pairs(trained, tmp_path):
    job = read_record(trained[0] / JOB, TrainJob)
    folders = {name: tmp_path / name for name in ("base", "pairs", "card")}
    for folder in folders.values():
        folder.mkdir()
    (folders["base"] / "README.md").write_text(BASE_CARD)
    (folders["pairs"] / "README.md").write_text("---\nsource_datasets:\n- HuggingFaceM4/A-OKVQA\n---\n")
    paths = {"base_path": str(folders["base"]), "pairs_path": str(folders["pairs"])}
    write_adapter_card(job.model_copy(update=paths), folders["card"])
    data = ModelCard.load(folders["card"] / "README.md").data.to_dict()
    assert {name: data[name] for name in ("license", "license_name", "license_link", "datasets")} == {
        "license": "other",
        "license_name": "llama-2",
        "license_link": "https://example.org/l",
        "datasets": ["HuggingFaceM4/A-OKVQA"],
    }
    for unreadable in ("no front matter", "---\n- a\n---\n", "---\n{: [\n---\n", "---\nlicense: &a [*a]\n---\n"):
        (folders["base"] / "README.md").write_text(unreadable)
        write_adapter_card(job.model_copy(update=paths), folders["card"])
        assert ModelCard.load(folders["card"] / "README.md").data.license == "unknown"


def test_a_card_names_what_the_loss_was(trained, tmp_path):
    """Losses of weights 1 and 0.1 were published as two losses."""
    job = read_record(trained[0] / JOB, TrainJob)
    changes = {"losses": ("robust", "sft"), "loss_weights": (1.0, 0.1), "label_smoothing": 0.2, "schedule": "constant"}
    for method, corruption in (("dpo", None), ("mdpo", "| train.corruption | noise |")):
        train = job.train.model_copy(update={**changes, "method": method, "corruption": "noise"})
        write_adapter_card(job.model_copy(update={"train": train}), tmp_path)
        rows = (tmp_path / "README.md").read_text().splitlines()
        assert {
            "| train.losses | robust, sft |", "| train.loss_weights | 1.0, 0.1 |", "| train.label_smoothing | 0.2 |",
            "| train.schedule | constant |",
        } <= set(rows)  # fmt: skip
        assert [row for row in rows if "train.corruption" in row] == ([corruption] if corruption else [])
    assert "| train.loss_weights | 1 each |" in (trained[0] / ADAPTER / "README.md").read_text()


@pytest.mark.parametrize(
    "name", ["</td><script>x</script>", "a|b\n---\nlicense: mit\n---", "{{ 7 * 7 }}", "\x1b[31m\u202e`x`"]
)
def test_hostile_names_stay_text_in_the_card(trained, tmp_path, name):
    job = read_record(trained[0] / JOB, TrainJob)
    write_adapter_card(job.model_copy(update={"base": job.base.model_copy(update={"name": name})}), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert ModelCard(text).data.to_dict() == ModelCard.load(trained[0] / ADAPTER / "README.md").data.to_dict()
    assert not re.search("<script|\x1b|\u202e|^license: mit", text, re.MULTILINE)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(row.count("|") == 3 for row in rows)


def test_what_is_made_names_no_path_of_this_machine_and_follows_the_umask(trained, job, checkpoint):
    """Whoever the umask lets read other files can read these: a server, a worker, a trainer have users of their own."""
    set_merge(job, serve_as="adapter")
    with umask(UMASK):
        assert merging.main([str(job), str(job / "alone")]) == 0
    directory, out = trained
    published = [path for folder in (directory / ADAPTER, out, job / "alone") for path in folder.rglob("*")]
    files = {path: oct(path.stat().st_mode & 0o777) for path in [*published, *directory.iterdir()] if path.is_file()}
    assert {"model.safetensors", WEIGHTS, "README.md", MERGE_REPORT, JOB} <= {path.name for path in files}
    assert {path: mode for path, mode in files.items() if mode != oct(0o666 & ~UMASK)} == {}
    for path in published:
        assert str(checkpoint.parent).encode() not in path.read_bytes(), path


def test_the_bases_hub_id_is_in_the_card(tmp_path):
    snapshot = tmp_path / "models--llava-hf--llava-1.5-7b-hf" / "snapshots" / "abc"
    assert find_hub_id(snapshot) == ("llava-hf/llava-1.5-7b-hf", "abc")
    assert find_hub_id(tmp_path) is find_hub_id(Path("nano")) is None


def test_sampling_settings_of_the_base_are_left_behind(job, checkpoint, tmp_path):
    """vLLM would sample every request that leaves them out with these."""
    base = shutil.copytree(checkpoint, tmp_path / "base")
    config = json.loads((base / "generation_config.json").read_text())
    sampling = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.3, "max_new_tokens": 5}
    (base / "generation_config.json").write_text(json.dumps(config | sampling))
    write_record(job / JOB, read_record(job / JOB, TrainJob).model_copy(update={"base_path": str(base)}))
    assert merging.main([str(job), str(job / "out")]) == 0
    assert not sampling.keys() & json.loads((job / "out" / "generation_config.json").read_text()).keys()


def test_stock_template_is_mended_for_training_and_saved(make_job, checkpoint, stock_template, tmp_path):
    stock = shutil.copytree(checkpoint, tmp_path / "stock")
    (stock / "chat_template.jinja").write_text(stock_template)
    directory = make_job("train.epochs=1", "train.learning_rate=1e-2")
    job = read_record(directory / JOB, TrainJob)
    base = job.base.model_copy(update={"digest": compute_digest(stock)})
    write_record(directory / JOB, job.model_copy(update={"base": base, "base_path": str(stock)}))
    jobs.work(directory, tmp_path / "out")
    assert "bos_token" in (tmp_path / "out" / "chat_template.jinja").read_text()
    example = read_record(directory / PREFLIGHT, Preflight).train.example
    assert example.startswith("<s>USER: <image>\n")
    assert example.endswith("</s>")


def test_done_already(trained, monkeypatch):
    directory, out = trained
    monkeypatch.setitem(sys.modules, "vcot.training.merge.merging.build", None)
    assert merging.main([str(directory), str(out)]) == 0
    monkeypatch.setattr(jobs, "exclusive", None)
    jobs.work(directory, out)


def test_other_things_are_not_overwritten(trained, job, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert merging.main([str(job), str(tmp_path / "out")]) == 2
    assert "is no checkpoint of vcot" in capsys.readouterr().err
    other = read_record(job / JOB, TrainJob)
    write_record(job / JOB, other.model_copy(update={"merge": other.merge.model_copy(update={"dtype": "float16"})}))
    assert merging.main([str(job), str(trained[1])]) == 2
    assert f"holds checkpoint {other.checkpoint_name}, not dpo-" in capsys.readouterr().err


def test_altered_checkpoint_is_not_taken_as_done(trained, job, tmp_path):
    out = shutil.copytree(trained[1], tmp_path / "out")
    (out / "config.json").write_text((out / "config.json").read_text() + " ")
    with pytest.raises(CheckpointError, match="were changed after it was made"):
        merging.find_merged(read_record(job / JOB, TrainJob), out)


def test_adapter_folder_and_missing_adapter(job, capsys):
    assert merging.main([str(job), str(job / ADAPTER / "merged")]) == 2
    assert "lies in the adapter's folder" in capsys.readouterr().err
    shutil.rmtree(job / ADAPTER)
    assert merging.main([str(job), str(job / "out")]) == 2
    assert "has no trained adapter" in capsys.readouterr().err


def scale_adapter(job, factor):
    path = job / ADAPTER / "adapter_model.safetensors"
    save_file({n: t * factor if "lora_B" in n else t for n, t in load_file(path).items()}, path, {"format": "pt"})


def test_untrained_adapter_is_refused(job, capsys):
    scale_adapter(job, 0.0)
    assert merging.main([str(job), str(job / "out")]) == 2
    assert "answers as its base does (0 tensors" in capsys.readouterr().err
    assert not (job / "out").exists()


def set_merge(job, **changes):
    record = read_record(job / JOB, TrainJob)
    write_record(job / JOB, record.model_copy(update={"merge": record.merge.model_copy(update=changes)}))


def round_base(job, dtype, tmp_path):
    """The job on a base that is written in `dtype`, as published ones are."""
    record = read_record(job / JOB, TrainJob)
    base = shutil.copytree(record.base_path, tmp_path / "base")
    weights = {name: tensor.to(dtype) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    ref = record.base.model_copy(update={"digest": compute_digest(base)})
    write_record(job / JOB, record.model_copy(update={"base": ref, "base_path": str(base)}))


def test_update_lost_in_bfloat16_is_refused_where_the_type_is_forced(job, tmp_path, capsys):
    round_base(job, torch.bfloat16, tmp_path)
    scale_adapter(job, 1e-3)
    set_merge(job, dtype="bfloat16")
    assert merging.main([str(job), str(job / "out")]) == 2
    assert re.search(r"in bfloat16 keeps .*% of the reward margins .*set merge.dtype = auto", capsys.readouterr().err)
    assert not (job / "out").exists()


def test_update_lost_in_bfloat16_is_merged_again_in_float32(job, tmp_path):
    round_base(job, torch.bfloat16, tmp_path)
    scale_adapter(job, 1e-3)
    set_merge(job, dtype="auto")
    assert merging.main([str(job), str(job / "out")]) == 0
    report = read_record(job / "out" / MERGE_REPORT, MergeReport)
    assert (report.dtype, [dtype for dtype, _ in report.dropped]) == ("float32", ["bfloat16"])
    assert report.dropped[0][1].error > 0.05 > report.retention.error
    assert {tensor.dtype for tensor in load_file(job / "out" / "model.safetensors").values()} == {torch.float32}


def test_large_update_stays_in_the_bases_own_type(job, tmp_path):
    round_base(job, torch.bfloat16, tmp_path)
    set_merge(job, dtype="auto")
    assert merging.main([str(job), str(job / "out")]) == 0
    assert {tensor.dtype for tensor in load_file(job / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_update_that_the_serving_type_loses_is_refused(job, tmp_path, capsys):
    round_base(job, torch.bfloat16, tmp_path)
    scale_adapter(job, 1e-3)
    set_merge(job, dtype="float32")
    record = read_record(job / JOB, TrainJob)
    write_record(job / JOB, record.model_copy(update={"serve_dtype": "bfloat16"}))
    assert merging.main([str(job), str(job / "out")]) == 2
    assert "set a wider serve.dtype" in capsys.readouterr().err


def test_adapter_alone_is_named_like_the_bases_files(job, checkpoint):
    set_merge(job, serve_as="adapter")
    assert merging.main([str(job), str(job / "out")]) == 0
    out = job / "out"
    manifest = verify_checkpoint(out)
    assert (manifest.checkpoint.kind, manifest.checkpoint.parent) == ("adapter", compute_digest(checkpoint))
    known = set(load_file(checkpoint / "model.safetensors"))
    modules = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in load_file(out / WEIGHTS)}
    assert {f"{module}.weight" for module in modules} < known
    assert any(module.startswith("vision_tower.vision_model.") for module in modules)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    report = read_record(out / MERGE_REPORT, MergeReport)
    assert not report.is_served_exactly, "vLLM drops the tower's part"
    assert report.max_abs_logprob < 1e-5 < report.differs_from_base
    again = json.loads((job / ADAPTER / "adapter_config.json").read_text())
    again["target_modules"].reverse()
    (job / ADAPTER / "adapter_config.json").write_text(json.dumps(again))
    assert merging.main([str(job), str(job / "again")]) == 0
    assert verify_checkpoint(job / "again").checkpoint == manifest.checkpoint


def test_language_model_adapter_is_served_exactly(make_job, tmp_path):
    directory = make_job(
        "train.learning_rate=1e-2", "train.lora_r=4", "train.target_modules=language-model", "merge.serve_as=adapter"
    )
    jobs.work(directory, tmp_path / "out")
    assert read_record(tmp_path / "out" / MERGE_REPORT, MergeReport).is_served_exactly


def test_adapter_that_the_base_does_not_name_is_refused(job, capsys):
    set_merge(job, serve_as="adapter")
    path = job / ADAPTER / WEIGHTS
    tensors = load_file(path)
    extra = {f"base_model.model.model.other.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    save_file({**tensors, **extra}, path, {"format": "pt"})
    assert merging.main([str(job), str(job / "out")]) == 2
    assert "adapts 'model.other', which the files of base" in capsys.readouterr().err


def test_probe_holds_the_rows_as_they_were_trained(trained, processor):
    probe = read_probe(trained[1])
    assert len(probe.pairs) == 4, "the validation pairs"
    assert len(probe.base) == len(probe.policy) == len(probe.stored) == 8
    for pair, logprobs in zip(probe.pairs, probe.policy[::2], strict=True):
        assert pair.prompt[0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
        completion = pair.chosen.tokens[-len(logprobs) :]
        assert processor.tokenizer.decode(completion).strip() == f"{pair.chosen.text.strip()}</s>"
        assert pair.chosen.tokens.count(processor.image_token_id) == 4


def test_adapter_whose_keys_do_not_fit_is_refused(job, capsys):
    """PEFT loads an adapter with foreign names without an error, and leaves its own weights at zero."""
    path = job / ADAPTER / "adapter_model.safetensors"
    save_file({f"other.{name}": tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert merging.main([str(job), str(job / "out")]) == 2
    assert "adapts 'other.base_model" in capsys.readouterr().err


def test_altered_base_is_refused(job, checkpoint, tmp_path, capsys):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    (base / "config.json").write_text((base / "config.json").read_text() + " ")
    write_record(job / JOB, read_record(job / JOB, TrainJob).model_copy(update={"base_path": str(base)}))
    assert merging.main([str(job), str(job / "out")]) == 2
    assert "is not the one that the adapter was trained on" in capsys.readouterr().err


def rebase(job, tmp_path, change):
    """The job on a copy of its base that `change` has changed."""
    record = read_record(job / JOB, TrainJob)
    base = shutil.copytree(record.base_path, tmp_path / "base")
    change(base)
    ref = record.base.model_copy(update={"digest": compute_digest(base)})
    write_record(job / JOB, record.model_copy(update={"base": ref, "base_path": str(base)}))
    return base


def shard(base, num=3, convert=lambda name, tensor: tensor):
    """Split the one file of weights into `num`, with an index."""
    tensors = {name: convert(name, tensor) for name, tensor in load_file(base / "model.safetensors").items()}
    (base / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i in range(num):
        file = f"model-{i + 1:05}-of-{num:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::num]}, base / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names[i::num], file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def read_shards(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_shards_and_index_are_the_bases(job, tmp_path):
    base = rebase(job, tmp_path, shard)
    set_merge(job, dtype="auto")
    assert merging.main([str(job), str(job / "out")]) == 0
    index = "model.safetensors.index.json"
    assert (job / "out" / index).read_bytes() == (base / index).read_bytes()
    weight_map = json.loads((base / index).read_text())["weight_map"]
    for file in sorted(set(weight_map.values())):
        assert {name for name, where in weight_map.items() if where == file} == set(load_file(job / "out" / file))


def test_each_tensor_keeps_its_own_type(job, tmp_path):
    """A base may keep a few tensors in a wider type; `auto` leaves each as it is."""

    def in_two_types(name, tensor):
        return tensor if "norm" in name else tensor.bfloat16()

    base = rebase(job, tmp_path, lambda base: shard(base, 2, in_two_types))
    set_merge(job, dtype="auto")
    assert merging.main([str(job), str(job / "out")]) == 0
    stored = {name: tensor.dtype for name, tensor in read_shards(base).items()}
    assert {name: tensor.dtype for name, tensor in read_shards(job / "out").items()} == stored
    assert read_record(job / "out" / MERGE_REPORT, MergeReport).dtype == "bfloat16"


def test_another_type_is_said_in_config_and_index(job, tmp_path):
    def in_half(base):
        shard(base, 2, lambda name, tensor: tensor.half())
        config = json.loads((base / "config.json").read_text())
        config["torch_dtype"] = config["text_config"]["torch_dtype"] = "float16"
        (base / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))

    base = rebase(job, tmp_path, in_half)
    set_merge(job, dtype="float32")
    assert merging.main([str(job), str(job / "out")]) == 0
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, job / "out"))
    assert (after["dtype"], after["torch_dtype"], after["text_config"]["torch_dtype"]) == ("float32",) * 3
    assert {name for name in after if after[name] != before[name]} == {"dtype", "torch_dtype", "text_config"}
    sizes = [
        json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        for folder in (base, job / "out")
    ]
    assert sizes[1] == 2 * sizes[0] == sum(tensor.nbytes for tensor in read_shards(job / "out").values())


def test_a_mended_template_is_the_only_one(job, stock_template, tmp_path):
    """transformers and vLLM read it from any of these files."""

    def with_stock(base):
        (base / "chat_template.jinja").write_text(stock_template)
        (base / "chat_template.json").write_text(json.dumps({"chat_template": stock_template}))
        config = json.loads((base / "tokenizer_config.json").read_text())
        (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": stock_template}))

    rebase(job, tmp_path, with_stock)
    assert merging.main([str(job), str(job / "out")]) == 0
    assert "bos_token" in (job / "out" / "chat_template.jinja").read_text()
    assert not (job / "out" / "chat_template.json").exists()
    assert "chat_template" not in json.loads((job / "out" / "tokenizer_config.json").read_text())


def test_weights_that_have_no_room_are_read_from_disk(job, tmp_path, monkeypatch):
    """What is written is the same, to the bit, and what is asked up to float32's rounding, as with all in memory."""
    rebase(job, tmp_path, lambda base: shard(base, 2, lambda name, tensor: tensor.half()))
    set_merge(job, dtype="auto")
    assert merging.main([str(job), str(job / "whole")]) == 0
    set_merge(job, dtype="auto", serve_as="adapter")
    assert merging.main([str(job), str(job / "whole-adapter")]) == 0
    size = sum(4 * tensor.numel() for tensor in read_shards(tmp_path / "base").values())
    monkeypatch.setattr(loading, "free_bytes", lambda: {"cpu": 2 * size // 3})
    monkeypatch.setattr(loading, "_WORKSPACE", 0)
    held = []
    monkeypatch.setattr(build, "ask", lambda model, questions: held.append(model) or probe.ask(model, questions))
    assert merging.main([str(job), str(job / "spread-adapter")]) == 0
    set_merge(job, serve_as="merged")
    assert merging.main([str(job), str(job / "spread")]) == 0
    assert len(held) == 6
    for model in held:
        assert any(parameter.is_meta for parameter in model.parameters()), "some weights are on disk"
    for name in ("", "-adapter"):
        spread, whole = (job / f"{how}{name}" for how in ("spread", "whole"))
        assert verify_checkpoint(spread).checkpoint == verify_checkpoint(whole).checkpoint
        canary, expected = (verify_checkpoint(directory).canary for directory in (spread, whole))
        assert canary.tokens == expected.tokens
        assert canary.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
        probes = [read_probe(directory) for directory in (spread, whole)]
        for answers in ("base", "policy", "stored"):
            found, known = (Answers.of(getattr(probe, answers)) for probe in probes)
            assert found.difference(known) < 1e-5


def test_no_room_for_a_layer_is_said(checkpoint, monkeypatch):
    monkeypatch.setattr(loading, "free_bytes", lambda: {"cpu": 10})
    with pytest.raises(MachineError, match=r"no layer of .* has room in the"):
        loading.load_model(checkpoint, torch.float32, "spread")

"""Train a little, merge, and see that what is not the policy, or is only the base, never becomes a checkpoint."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoints import compute_digest, verify_checkpoint
from pipeline.errors import CheckpointError
from pipeline.records import CheckpointRef
from training import merge, worker
from training.export import count_changed_tensors
from training.job import (
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
    write_record,
)
from training.parity import read_probe

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(make_job, tmp_path_factory):
    """A job that was trained and merged by one worker."""
    job = make_job("train.learning_rate=1e-2", "train.lora_r=4")
    out = tmp_path_factory.mktemp("checkpoints") / "merged"
    worker.work(job, out)
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
    assert (out / "chat_template.jinja").read_text() == (checkpoint / "chat_template.jinja").read_text()
    assert json.loads((out / "tokenizer.json").read_text()) == json.loads((checkpoint / "tokenizer.json").read_text())
    assert json.loads((out / "processor_config.json").read_text())["num_additional_image_tokens"] == 1
    sampling = json.loads((out / "generation_config.json").read_text())
    assert set(sampling) <= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
    assert not (out / "adapter_config.json").exists()


def test_sampling_settings_of_the_base_are_left_behind(job, checkpoint, tmp_path):
    """vLLM would sample every request that leaves them out with these."""
    base = shutil.copytree(checkpoint, tmp_path / "base")
    config = json.loads((base / "generation_config.json").read_text())
    sampling = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.3, "max_new_tokens": 5}
    (base / "generation_config.json").write_text(json.dumps(config | sampling))
    write_record(job / JOB, read_record(job / JOB, TrainJob).model_copy(update={"base_path": str(base)}))
    assert merge.main([str(job), str(job / "out")]) == 0
    assert not sampling.keys() & json.loads((job / "out" / "generation_config.json").read_text()).keys()


def test_stock_template_is_mended_for_training_and_saved(make_job, checkpoint, stock_template, tmp_path):
    stock = shutil.copytree(checkpoint, tmp_path / "stock")
    (stock / "chat_template.jinja").write_text(stock_template)
    directory = make_job("train.epochs=1", "train.learning_rate=1e-2")
    job = read_record(directory / JOB, TrainJob)
    base = job.base.model_copy(update={"digest": compute_digest(stock)})
    write_record(directory / JOB, job.model_copy(update={"base": base, "base_path": str(stock)}))
    worker.work(directory, tmp_path / "out")
    assert "bos_token" in (tmp_path / "out" / "chat_template.jinja").read_text()
    example = read_record(directory / PREFLIGHT, Preflight).train.example
    assert example.startswith("<s>USER: <image>\n")
    assert example.endswith("</s>")


def test_done_already(trained, monkeypatch):
    directory, out = trained
    monkeypatch.setitem(sys.modules, "training.build", None)
    assert merge.main([str(directory), str(out)]) == 0
    monkeypatch.setattr(worker, "exclusive", None)
    worker.work(directory, out)


def test_other_things_are_not_overwritten(trained, job, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert merge.main([str(job), str(tmp_path / "out")]) == 2
    assert "is no checkpoint of vcot" in capsys.readouterr().err
    other = read_record(job / JOB, TrainJob)
    write_record(job / JOB, other.model_copy(update={"merge": other.merge.model_copy(update={"dtype": "float16"})}))
    assert merge.main([str(job), str(trained[1])]) == 2
    assert f"holds checkpoint {other.checkpoint_name}, not dpo-" in capsys.readouterr().err


def test_altered_checkpoint_is_not_taken_as_done(trained, job, tmp_path):
    out = shutil.copytree(trained[1], tmp_path / "out")
    (out / "config.json").write_text((out / "config.json").read_text() + " ")
    with pytest.raises(CheckpointError, match="were changed after it was made"):
        merge.find_merged(read_record(job / JOB, TrainJob), out)


def test_adapter_folder_and_missing_adapter(job, capsys):
    assert merge.main([str(job), str(job / ADAPTER / "merged")]) == 2
    assert "lies in the adapter's folder" in capsys.readouterr().err
    shutil.rmtree(job / ADAPTER)
    assert merge.main([str(job), str(job / "out")]) == 2
    assert "has no trained adapter" in capsys.readouterr().err


def scale_adapter(job, factor):
    path = job / ADAPTER / "adapter_model.safetensors"
    save_file({n: t * factor if "lora_B" in n else t for n, t in load_file(path).items()}, path, {"format": "pt"})


def test_untrained_adapter_is_refused(job, capsys):
    scale_adapter(job, 0.0)
    assert merge.main([str(job), str(job / "out")]) == 2
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
    assert merge.main([str(job), str(job / "out")]) == 2
    assert re.search(r"in bfloat16 keeps .*% of the reward margins .*set merge.dtype = auto", capsys.readouterr().err)
    assert not (job / "out").exists()


def test_update_lost_in_bfloat16_is_merged_again_in_float32(job, tmp_path):
    round_base(job, torch.bfloat16, tmp_path)
    scale_adapter(job, 1e-3)
    set_merge(job, dtype="auto")
    assert merge.main([str(job), str(job / "out")]) == 0
    report = read_record(job / "out" / MERGE_REPORT, MergeReport)
    assert (report.dtype, [dtype for dtype, _ in report.dropped]) == ("float32", ["bfloat16"])
    assert report.dropped[0][1].error > 0.05 > report.retention.error
    assert {tensor.dtype for tensor in load_file(job / "out" / "model.safetensors").values()} == {torch.float32}


def test_large_update_stays_in_the_bases_own_type(job, tmp_path):
    round_base(job, torch.bfloat16, tmp_path)
    set_merge(job, dtype="auto")
    assert merge.main([str(job), str(job / "out")]) == 0
    assert {tensor.dtype for tensor in load_file(job / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_update_that_the_serving_type_loses_is_refused(job, tmp_path, capsys):
    round_base(job, torch.bfloat16, tmp_path)
    scale_adapter(job, 1e-3)
    set_merge(job, dtype="float32")
    record = read_record(job / JOB, TrainJob)
    write_record(job / JOB, record.model_copy(update={"serve_dtype": "bfloat16"}))
    assert merge.main([str(job), str(job / "out")]) == 2
    assert "set a wider serve.dtype" in capsys.readouterr().err


def test_adapter_alone_is_named_like_the_bases_files(job, checkpoint):
    set_merge(job, serve_as="adapter")
    assert merge.main([str(job), str(job / "out")]) == 0
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
    assert merge.main([str(job), str(job / "again")]) == 0
    assert verify_checkpoint(job / "again").checkpoint == manifest.checkpoint


def test_language_model_adapter_is_served_exactly(make_job, tmp_path):
    directory = make_job(
        "train.learning_rate=1e-2", "train.lora_r=4", "train.target_modules=language-model", "merge.serve_as=adapter"
    )
    worker.work(directory, tmp_path / "out")
    assert read_record(tmp_path / "out" / MERGE_REPORT, MergeReport).is_served_exactly


def test_adapter_that_the_base_does_not_name_is_refused(job, capsys):
    set_merge(job, serve_as="adapter")
    path = job / ADAPTER / WEIGHTS
    tensors = load_file(path)
    extra = {f"base_model.model.model.other.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    save_file({**tensors, **extra}, path, {"format": "pt"})
    assert merge.main([str(job), str(job / "out")]) == 2
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
    with pytest.warns(UserWarning, match="missing adapter keys"):
        assert merge.main([str(job), str(job / "out")]) == 2
    assert "answers as its base does" in capsys.readouterr().err


def test_altered_base_is_refused(job, checkpoint, tmp_path, capsys):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    (base / "config.json").write_text((base / "config.json").read_text() + " ")
    write_record(job / JOB, read_record(job / JOB, TrainJob).model_copy(update={"base_path": str(base)}))
    assert merge.main([str(job), str(job / "out")]) == 2
    assert "is not the one that the adapter was trained on" in capsys.readouterr().err


def test_names_that_vllm_drops_are_refused(checkpoint, tmp_path):
    tensors = load_file(checkpoint / "model.safetensors")
    renamed = {name.replace("vision_tower.vision_model.", "vision_tower."): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"which base .* does not have"):
        count_changed_tensors(checkpoint, tmp_path)
    save_file(
        {**tensors, "language_model.lm_head.weight": tensors["language_model.lm_head.weight"] + 1},
        tmp_path / "model.safetensors",
    )
    assert count_changed_tensors(checkpoint, tmp_path) == 1

"""Train a little, merge, and see that what is not the policy, or is only the base, never becomes a checkpoint."""

from __future__ import annotations

import json
import shutil

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
from training.parity import Answers, check_merge, distortion, retention


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
    report = read_record(directory / MERGE_REPORT, MergeReport)
    assert report.max_abs_logprob < 1e-4
    assert report.differs_from_base > 1e-2
    assert report.retention == pytest.approx(1, abs=1e-3)
    assert report.distortion < 1e-3


def test_layout_is_the_hubs(trained, checkpoint):
    _, out = trained
    names = set(load_file(out / "model.safetensors"))
    assert names == set(load_file(checkpoint / "model.safetensors"))
    assert any(name.startswith("vision_tower.vision_model.") for name in names)
    files = {path.name for path in out.iterdir()}
    assert {"config.json", "processor_config.json", "tokenizer.json", "chat_template.jinja", "checkpoint.json"} <= files
    assert (out / "chat_template.jinja").read_text() == (checkpoint / "chat_template.jinja").read_text()
    assert json.loads((out / "processor_config.json").read_text())["num_additional_image_tokens"] == 1
    sampling = json.loads((out / "generation_config.json").read_text())
    assert set(sampling) <= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
    assert not (out / "adapter_config.json").exists()


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
    monkeypatch.setattr(merge, "_build", None)
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


def test_update_lost_in_bfloat16_is_refused(job, capsys):
    record = read_record(job / JOB, TrainJob)
    scale_adapter(job, 1e-5)
    write_record(job / JOB, record.model_copy(update={"merge": record.merge.model_copy(update={"dtype": "bfloat16"})}))
    assert merge.main([str(job), str(job / "out")]) == 2
    assert "use a wider merge.dtype" in capsys.readouterr().err


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


def make_report(**changes):
    ref = CheckpointRef(name="dpo-x", digest="sha256:1", kind="merged")
    numbers = {"max_abs_logprob": 1e-6, "differs_from_base": 0.1, "retention": 1.0, "distortion": 0.0}
    return MergeReport(checkpoint=ref, **{"num_changed_tensors": 3, **numbers, **changes})


def test_gate():
    check_merge(make_report(), "float32")
    check_merge(make_report(max_abs_logprob=0.1), "bfloat16")
    for changes in ({"max_abs_logprob": 0.002}, {"max_abs_logprob": float("nan")}, {"max_abs_logprob": float("inf")}):
        with pytest.raises(CheckpointError, match="otherwise than base \\+ adapter"):
            check_merge(make_report(**changes), "float32")
    for value in (0.7, float("nan")):
        with pytest.raises(CheckpointError, match="keeps 28% of what training changed"):
            check_merge(make_report(retention=0.28, distortion=value), "bfloat16")
    for changes in ({"num_changed_tensors": 0}, {"differs_from_base": 1e-7}):
        with pytest.raises(CheckpointError, match="as its base does"):
            check_merge(make_report(**changes), "float32")


def test_answers_are_compared_token_by_token():
    base = Answers(torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]))
    policy = Answers(torch.tensor([[-0.5, -2.0], [-4.0, 0.0]]))
    assert policy.difference(base) == 1.0
    assert policy.difference(Answers(base.logprobs * torch.nan)) == float("inf")
    assert policy.change(base).tolist() == [[0.5, 0.0], [-1.0, 0.0]]


def test_what_a_merge_keeps():
    policy = torch.tensor([[0.5, 0.5], [-2.0, 1.0]])
    assert (retention(policy, policy), distortion(policy, policy)) == (1, 0)
    assert (retention(policy, policy / 2), distortion(policy, policy / 2)) == (0.5, 0.5)
    noise = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    assert retention(policy, policy + noise) == 1
    assert distortion(policy, policy + noise) > 0.8

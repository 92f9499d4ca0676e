"""A loss of one's own is a file outside the repository and a line in a recipe; the page's is trained word for word."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from tests.pages import read_block
from vcot.pipeline.errors import InputError, RecipeError, ServerError
from vcot.pipeline.files import write_record
from vcot.services.jobs import trainer as worker
from vcot.services.recipes.recipe import load_recipe
from vcot.training.dpo import fit
from vcot.training.protocol.job import ADAPTER, JOB, PROGRESS, TrainJob, digest_losses, read_record
from vcot.training.protocol.launch import check_installed
from vcot.training.worker import jobs

ROOT = Path(__file__).parents[2]
START = math.log(2)
CODE = read_block("A loss", "python")
LINE = read_block("A loss", "toml").removeprefix("[train]\n").strip()
SAME_AS_DPO = """
from torch.nn.functional import logsigmoid

def sigmoid(chosen, rejected, reference_chosen, reference_rejected, beta):
    return -logsigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected)))

def mean(chosen, rejected, reference_chosen, reference_rejected, beta):
    return -chosen.mean()

def number(*_):
    return 1.0
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in the PYTHONPATH of this process and of those that it starts."""
    folder = tmp_path / "losses"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    yield folder
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


def write_loss(folder, name, code=SAME_AS_DPO):
    (folder / f"{name}.py").write_text(code)
    return f"{name}:sigmoid"


def named(*losses):
    return f"train.losses={json.dumps(losses)}"


def read_points(job):
    return [json.loads(line) for line in (job / PROGRESS).read_text().splitlines()]


def test_the_page_shows_less_than_30_lines():
    assert len((CODE + LINE).splitlines()) < 30


async def test_the_pages_loss_is_trained_by_the_worker(folder, make_job, tmp_path, monkeypatch):
    """In a process of its own, which imports nothing from the folder that the command is given in."""
    (folder / "my_losses.py").write_text(CODE)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "my_losses.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(elsewhere)
    directory = make_job(f"train.{LINE}", "train.epochs=1")
    status = await worker.train(read_record(directory / JOB, TrainJob), directory, lambda *_: None)
    assert (status.state, (directory / ADAPTER).is_dir()) == ("done", True)
    points = read_points(directory)
    assert [point["loss"] for point in points[:2]] == pytest.approx([START] * 2, abs=1e-3), (
        "as the code says of no change"
    )
    assert points[-1]["terms"] == {"my_losses:dpop": pytest.approx(points[-1]["loss"], abs=1e-4)}
    assert "my_losses" not in sys.modules, "only the worker has imported it"


def test_dpo_written_by_hand_trains_what_trls_does(folder, build, tmp_path):
    settings, ends = ("train.epochs=1", "train.learning_rate=1e-2", "train.loss_weights=[0.5]"), []
    for number, loss in enumerate(["sigmoid", write_loss(folder, "mine_a")]):
        trainer, recipe = build(*settings, named(loss))
        (tmp_path / str(number)).mkdir()
        fit.run_training(trainer, recipe, tmp_path / str(number))
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert (ends[0] - ends[1]).abs().max() < 1e-6
    ours, theirs = ([point["loss"] for point in read_points(tmp_path / str(number))] for number in (1, 0))
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_it_is_added_to_trls_and_to_mdpos_by_its_weight(folder, build, disturb, first_batch):
    trainer, recipe = build(
        "train.method=mdpo", named("hinge", write_loss(folder, "mine_b")), "train.loss_weights=[1.0, 3.0]"
    )
    disturb(trainer)
    trainer.model.eval()
    batch = first_batch(trainer)
    with torch.no_grad():
        policy = trainer.score(trainer.model, batch).log_probs.sum(dim=1).view(3, -1)
        margins = recipe.beta * (policy - trainer.reference_logprobs(batch))[:2]
        loss = trainer.compute_loss(trainer.model, batch).item()
    terms = {
        name.removeprefix("terms/"): values[-1] for name, values in trainer._metrics["eval"].items() if "/" in name
    }
    margin = margins[0] - margins[1]
    own, hinge = -logsigmoid(margin).mean().item(), torch.relu(1 - margin).mean().item()
    assert terms["mine_b:sigmoid"] == pytest.approx(own, abs=1e-5)
    assert terms["preference"] == pytest.approx(hinge + 3 * own, abs=1e-5)
    assert loss == pytest.approx(hinge + 3 * own + terms["conditional"] + terms["anchor"], abs=1e-5)


@pytest.mark.parametrize(("name", "found"), [("mean", r"shape \(\)"), ("number", "float")])
def test_what_is_not_one_number_a_pair_is_refused(folder, build, first_batch, name, found):
    write_loss(folder, "mine_c")
    trainer, _ = build(named(f"mine_c:{name}"))
    with pytest.raises(RecipeError, match=rf"mine_c:{name} returned {found}, and must return a tensor of shape \(4,\)"):
        trainer.compute_loss(trainer.model, first_batch(trainer))


def test_an_adapter_that_is_not_new_is_noticed_though_the_loss_is_not_known(folder, build, disturb, tmp_path):
    trainer, recipe = build(named(write_loss(folder, "mine_d")))
    disturb(trainer)
    with pytest.raises(ServerError, match="the adapter moves log-probs by up to"):
        fit.run_training(trainer, recipe, tmp_path)


def test_a_changed_loss_is_another_job_and_trls_losses_have_no_file(folder, make_job):
    def submit(*losses):
        return read_record(make_job(named(*losses)) / JOB, TrainJob)

    name = write_loss(folder, "mine_e")
    before, trls = submit("sigmoid", name), submit("sigmoid")
    assert (before.loss_sources.keys(), trls.loss_sources) == ({name}, {})
    assert submit("sigmoid", name).key == before.key
    write_loss(folder, "mine_e", SAME_AS_DPO.replace("-logsigmoid", "-2 * logsigmoid"))
    assert submit("sigmoid", name).key != before.key
    assert "mine_e" not in sys.modules


def test_a_worker_with_another_file_refuses_the_job(folder, make_job, capsys):
    directory = make_job(named(write_loss(folder, "mine_f")))
    write_loss(folder, "mine_f", SAME_AS_DPO + "\n")
    assert jobs.main([str(directory)]) == 2
    assert "the file of loss mine_f:sigmoid is not the one that the job was submitted with" in capsys.readouterr().err


def test_a_job_without_the_hash_of_its_loss_is_refused(folder, make_job, capsys):
    directory = make_job(named(write_loss(folder, "mine_g")))
    job = read_record(directory / JOB, TrainJob)
    write_record(directory / JOB, job.model_copy(update={"loss_sources": {}}))
    assert jobs.main([str(directory)]) == 2
    assert "not the one that the job was submitted with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (None, r"mine_h cannot be read \(ModuleNotFoundError: No module named 'mine_h'\); .* into PYTHONPATH"),
        ("def sigmoid(:", r"mine_h cannot be read \(SyntaxError"),
        ("from mine_i import sigmoid", "mine_h.py does not define sigmoid; name the module that does"),
        ("import mine_i as sigmoid", "mine_h.py does not define sigmoid; name the module that does"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_sampled(folder, code, said):
    if code is not None:
        write_loss(folder, "mine_h", code)
    recipe = load_recipe("nano", [named("mine_h:sigmoid")]).train
    with pytest.raises(InputError, match=said):
        check_installed(recipe)


@pytest.mark.parametrize(
    "code", ["class sigmoid: pass", "sigmoid = print", "sigmoid: object = print", "a, sigmoid = 1, 2"]
)
def test_an_object_is_defined_in_any_usual_way(folder, code):
    write_loss(folder, "mine_j", code)
    assert digest_losses(load_recipe("nano", [named("mine_j:sigmoid")]).train).keys() == {"mine_j:sigmoid"}

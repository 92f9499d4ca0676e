"""What is asked of accelerate, and what is refused before it is started (tests/e2e/test_distributed.py starts it)."""

import importlib.util

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from vcot.pipeline.errors import InputError, MachineError, ServerError
from vcot.pipeline.files import write_record
from vcot.services.recipes.recipe import load_recipe
from vcot.training.protocol import launch
from vcot.training.protocol.job import TrainStatus, tell_fault


def make_recipe(**settings):
    return load_recipe("nano", [f"train.{name}={value}" for name, value in settings.items()]).train


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2", "zero3"])
def test_bundled_configs_are_accelerates(name):
    """A key that accelerate does not know makes it refuse the file."""
    config = load_config_from_file(str(launch.find_config(name)))
    assert config.distributed_type == ("DEEPSPEED" if name.startswith("zero") else "MULTI_GPU")
    assert config.mixed_precision is None, "the recipe's dtype decides"


def test_a_config_of_ones_own_and_one_that_is_not_there(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: MULTI_GPU\n")
    assert launch.find_config(str(own)) == own
    with pytest.raises(InputError, match=r"'zero9' is neither one of ddp, fsdp, zero2, zero3 nor a file"):
        launch.find_config("zero9")


def test_what_the_machine_cannot_do_is_refused():
    assert not launch.is_distributed(make_recipe())
    assert launch.is_distributed(make_recipe(num_processes=2))
    assert launch.is_distributed(make_recipe(accelerate_config="zero2"))
    launch.check_machine(make_recipe(num_processes=2), num_gpus=0)
    with pytest.raises(MachineError, match=r"= 4, but this machine has 2 GPU"):
        launch.check_machine(make_recipe(num_processes=4), num_gpus=2)
    launch.check_machine(make_recipe(num_processes=2, accelerate_config="fsdp"), num_gpus=0)
    with pytest.raises(MachineError, match="silently do DDP"):
        launch.check_machine(make_recipe(num_processes=2, accelerate_config="own.yaml"), num_gpus=0)


def test_packages_that_the_recipe_names_are_looked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    launch.check_installed(make_recipe(accelerate_config="fsdp"))
    with pytest.raises(MachineError, match="'zero3' needs the package deepspeed, which is not installed"):
        launch.check_installed(make_recipe(accelerate_config="zero3"))
    with pytest.raises(MachineError, match=r"train\.report_to needs the package trackio"):
        launch.check_installed(make_recipe(report_to='["trackio"]'))


@pytest.fixture
def refused(tmp_path):
    """A recipe for two processes, whose config accelerate refuses: it ends with 1, as it does for a rank that died."""
    own = tmp_path / "own.yaml"
    own.write_text("a_key_that_accelerate_does_not_know: 1\n")
    return make_recipe(num_processes=2, accelerate_config=f'"{own}"')


@pytest.mark.parametrize(("fault", "kind"), [(MachineError("no"), InputError), (ServerError("no"), ServerError)])
def test_a_ranks_sentence_becomes_the_workers(tmp_path, refused, fault, kind):
    """accelerate's agent ends with 1, whatever its ranks ended with: the status carries it."""
    tell_fault(tmp_path, fault)
    with pytest.raises(kind, match=r"^no$"):
        launch.launch(refused, tmp_path)


def test_ranks_that_say_nothing(tmp_path, refused):
    write_record(tmp_path / "status.json", TrainStatus(state="running"))
    with pytest.raises(ServerError, match="one of the 2 training processes ended before its time"):
        launch.launch(refused, tmp_path)

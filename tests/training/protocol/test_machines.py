"""How machines find each other for one training (tests/e2e/test_machines.py trains on two)."""

import threading
import time

import pytest

from vcot.pipeline.errors import InputError, MachineError, RecipeError
from vcot.services.recipes.recipe import load_recipe
from vcot.training.protocol import launch, machines
from vcot.training.protocol.job import exclusive
from vcot.training.protocol.machines import CALL, await_start, calling, find_difference, is_held, open_call, place_lock


def make_recipe(**settings):
    settings = {"num_processes": 3, "num_machines": 3, "address": "127.0.0.1"} | settings
    return load_recipe("nano", [f"train.{name}={value}" for name, value in settings.items()]).train


@pytest.fixture
def job(tmp_path):
    directory = tmp_path / "runs" / "run" / "training" / "key"
    directory.mkdir(parents=True)
    return directory


def test_the_first_waits_for_every_place_and_then_says_where_to_meet(job):
    said, met, done = [], [], threading.Event()

    def help_as(place):
        with exclusive(job, place_lock(place)):
            met.append(await_start(job))
            done.wait(10)

    helpers = [threading.Thread(target=help_as, args=(place,)) for place in (1, 2)]

    def hear(message):
        said.append(message)
        seen.append(open_call(job))
        helpers[len(said) - 1].start()
        while not is_held(job, len(said)):
            time.sleep(0.01)

    seen = []
    with calling(make_recipe(), job, hear) as call:
        assert open_call(job) is None, "every place is taken"
        while len(met) < 2:
            time.sleep(0.01)
        assert met == [call, call]
        assert (call.address, call.num_machines) == ("127.0.0.1", 3)
        assert call.port
    done.set()
    for helper in helpers:
        helper.join()
    remedy = f"start `vcot worker {job.parents[2]}` on each"
    assert said == [f"waiting for {left} of 3 machines; {remedy}" for left in (2, 1)]
    assert all(call is not None and call.port is None for call in seen)
    assert not (job / CALL).exists()


def test_a_call_of_a_machine_that_is_gone_is_none(job):
    machines.write_record(job / CALL, machines.Call(num_machines=2, versions={}))
    assert open_call(job) is None
    assert await_start(job) is None
    with exclusive(job, place_lock(0)):
        assert open_call(job) is not None
    (job / CALL).write_text("{")
    with exclusive(job, place_lock(0)):
        assert open_call(job) is None


def test_a_machine_with_other_versions_would_train_another_model():
    here = machines.installed_versions()
    assert here["torch"] != "none"
    assert find_difference(machines.Call(num_machines=2, versions=here)) is None
    other = machines.Call(num_machines=2, versions=here | {"trl": "0.1"})
    assert find_difference(other) == f"trl is {here['trl']} here and 0.1 on the machine that calls"
    without = {name: number for name, number in here.items() if name != "peft"}
    assert "peft" in (find_difference(machines.Call(num_machines=2, versions=without)) or "")


@pytest.mark.parametrize(
    ("address", "fault"),
    [("192.0.2.77", r"not an address of this machine"), ("no.such.name.invalid", r"is no address")],
)
def test_an_address_that_the_others_would_not_find_us_at_is_refused(job, address, fault):
    with pytest.raises(MachineError, match=fault), calling(make_recipe(address=address), job, print):
        pass
    assert not (job / CALL).exists()


def test_the_interface_is_the_one_that_leads_there():
    assert machines.find_interface("127.0.0.1") == "lo"


def test_what_several_machines_cannot_share_is_refused():
    with pytest.raises(RecipeError, match="2 machines cannot share 3 processes evenly"):
        make_recipe(num_machines=2)
    launch.check_machine(make_recipe(num_processes=8, num_machines=2), num_gpus=4)
    with pytest.raises(MachineError, match=r"= 8 on 2 machines, but this machine has 3 GPU"):
        launch.check_machine(make_recipe(num_processes=8, num_machines=2), num_gpus=3)
    with pytest.raises(InputError, match="DeepSpeed, which vcot starts on one machine only"):
        launch.check_installed(make_recipe(accelerate_config="zero3"))

"""What fits on which cards, and the least change that makes it fit."""

import shlex

import pytest

from vcot.services.planning.assumptions import SIZES
from vcot.services.planning.capacity import ASLEEP_GIB, Cards, estimate_serving, find_fit, make_plan
from vcot.services.recipes.recipe import load_recipe
from vcot.training.protocol.shape import find_shape, read_shape

SEVEN, THIRTEEN, LARGE = (
    read_shape(find_shape(name))
    for name in ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf", "Qwen/Qwen2.5-VL-72B-Instruct")
)
HALF = "serve.gpu_memory_utilization=0.45"


def cards(num, size, free=None):
    return Cards(num, SIZES[size], SIZES[size] if free is None else free)


def fit(*overrides, size=80, free=None, shape=SEVEN):
    return find_fit(load_recipe("paper", (HALF, *overrides)), shape, cards(1, size, free))


def plan(num, size, *overrides, shape=SEVEN, free=None):
    return make_plan(load_recipe("paper", (HALF, *overrides)), shape, cards(num, size, free))


def test_vllm_holds_keys_and_values_in_what_is_left_of_its_share():
    serve = load_recipe("paper", (HALF,)).serve
    found = estimate_serving(SEVEN, serve, 80.0)
    assert found.kv_bytes_per_token == 2 * 32 * 4096 * 2
    assert found.share == 36.0
    assert found.kv_tokens == int((36.0 - found.weights - found.overhead) * 2**30 / found.kv_bytes_per_token)
    halved = estimate_serving(SEVEN, serve.model_copy(update={"devices": ("0,1",)}), 80.0)
    assert (halved.weights, halved.kv_bytes_per_token) == (found.weights / 2, found.kv_bytes_per_token / 2)
    assert estimate_serving(LARGE, serve, 80.0).kv_bytes_per_token == 2 * 80 * 1024 * 2


def test_the_share_that_suits_80_gb_is_too_small_on_40():
    """It was called ok, and vLLM would have refused to start."""
    assert fit(size=80).fits
    found = fit(size=40)
    assert "not serve.max_model_len = 4,096" in found.serving_fault
    assert fit("serve.gpu_memory_utilization=0.9", size=40).serving_fault == ""


def test_questions_with_several_images_need_room_for_all_of_them():
    long = ("serve.max_images=4", "serve.max_model_len=8192", "train.max_length=8192")
    assert fit(*long).training.longest_row == 4 * 576 + 256 + 1024
    needed = plan(1, 24, *long).recipe
    assert 4 * 576 + 256 + 1024 <= needed.serve.max_model_len < 8192, "the context is shortened, and holds each request"
    assert needed.train.max_length > 4 * 576


def test_what_others_hold_counts():
    assert "30.0 GiB are free" in fit(free=30.0).serving_fault


def test_a_training_gets_what_the_engine_leaves():
    share = 0.45 * SIZES[80]
    left = {way: fit(f"serve.while_training={way}").left_gib for way in ("keep", "sleep", "stop")}
    assert left == {"keep": SIZES[80] - share, "sleep": SIZES[80] - ASLEEP_GIB, "stop": SIZES[80]}
    kept = fit("serve.while_training=keep", "serve.gpu_memory_utilization=0.9", size=80)
    assert kept.training_fault.startswith("the training needs at least")
    assert fit("serve.while_training=auto").left_gib == left["sleep"]
    assert fit("serve.url=http://elsewhere").left_gib == SIZES[80]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num", [1, 2, 4, 8])
def test_the_papers_recipe_fits_every_card_with_the_flags_that_are_printed(size, num):
    found = plan(num, size)
    assert found.fit.fits, found.fault
    flags = shlex.split(found.flags)[1:]
    again = load_recipe("paper", (HALF, *flags))
    assert again == found.recipe
    assert find_fit(again, SEVEN, cards(num, size)).fits
    train = again.train
    assert train.num_processes * train.batch_size * train.gradient_accumulation == 32
    assert (train.num_processes, again.serve.replicas) == (num, num)


def test_nothing_is_changed_that_need_not_be():
    assert plan(1, 80, "serve.while_training=keep").flags == ""
    assert plan(1, 80).flags == "--set serve.gpu_memory_utilization=0.9"  # at no cost, as the engine sleeps
    for size in (40, 48, 80):
        assert make_plan(load_recipe("paper"), SEVEN, cards(1, size)).flags == ""
    small = plan(1, 24, "serve.while_training=keep")
    assert shlex.split(small.flags) == [
        "--set",
        "serve.gpu_memory_utilization=0.9",
        "serve.while_training=sleep",
        "train.batch_size=1",
        "train.gradient_accumulation=32",
    ]
    flags = shlex.split(small.flags)[1:]
    for index in range(len(flags) - 2):
        less = load_recipe("paper", (HALF, "serve.while_training=keep", *flags[:index], *flags[index + 1 :]))
        assert not find_fit(less, SEVEN, cards(1, 24)).fits, flags[index]


def test_what_changes_the_result_comes_last():
    """Rows are only shortened where the batch is one pair, the engine stops, and it still does not fit."""
    found = plan(1, 24, free=19.4)
    assert found.fit.fits, found.fault
    assert found.recipe.serve.while_training == "stop"
    assert found.recipe.train.max_length < 1856
    assert found.recipe.serve.gpu_memory_utilization == 0.88  # of what is free


def test_a_model_that_no_card_holds_goes_over_several():
    found = plan(4, 24, shape=THIRTEEN)
    assert found.recipe.serve.devices == ("0,1", "2,3")
    assert found.recipe.train.accelerate_config == "fsdp"
    assert "no card" not in found.fault
    assert found.fit.fits
    assert not plan(1, 24, shape=THIRTEEN).fit.fits


RAY = "serve.ray_address=head:6379"


def test_servers_on_a_ray_cluster_are_spread_by_what_ray_is_told():
    """The plan named serve.devices, which a recipe with serve.ray_address refuses, and the doctor ended in a traceback."""
    assert "serve.replicas=4" in shlex.split(plan(4, 80, RAY).flags)
    large = plan(8, 80, RAY, shape=LARGE).recipe.serve
    assert (large.devices, large.replicas, large.gpus_per_replica) == ((), 2, 4)
    own = plan(8, 80, RAY, "serve.replicas=3", "serve.gpus_per_replica=2")
    assert (own.recipe.serve.replicas, own.recipe.serve.gpus_per_replica) == (3, 2)
    too_many = fit(RAY, "serve.replicas=3", "serve.gpus_per_replica=2")
    assert too_many.serving_fault == "serve.replicas and serve.gpus_per_replica ask for 6 cards, and there are 1"


def test_servers_that_may_be_elsewhere_take_nothing_of_this_machines_cards():
    recipe, small = load_recipe("paper", (RAY,)), Cards(2, SIZES[24], SIZES[24], serves=False)
    found = find_fit(recipe, SEVEN, small)
    assert (found.serving_fault, found.left_gib) == ("", SIZES[24])
    assert "serve." not in make_plan(recipe, SEVEN, small).flags
    assert "serve." not in plan(2, 24, "serve.url=http://elsewhere").flags


@pytest.mark.parametrize("shape", [SEVEN, LARGE])
@pytest.mark.parametrize("num", [1, 2, 8])
@pytest.mark.parametrize("place", [(), (RAY,), (RAY, "serve.gpus_per_replica=0"), ("serve.upstreams=['http://a:1']",)])
@pytest.mark.parametrize(
    "training",
    [
        (),
        ("train.base_weights=nf4",),
        ("train.accelerate_config=zero3", "train.num_processes=4", "train.num_machines=1"),
        ("train.num_processes=4", "train.num_machines=2"),
        ("train.method=mdpo", "train.accelerate_config=own.yaml"),
    ],
)
def test_what_is_proposed_is_a_recipe_whatever_was_given(num, shape, place, training):
    found = plan(num, 24, *place, *training, shape=shape)
    again = load_recipe("paper", (HALF, *place, *training, *shlex.split(found.flags)[1:]))
    assert again == found.recipe


def test_72_billion_parameters_need_four_cards_of_80_gb_or_eight_of_48():
    which = {(num, size) for size in SIZES for num in (1, 2, 4, 8) if plan(num, size, shape=LARGE).fit.fits}
    assert which == {(4, 80), (8, 80), (8, 48)}
    assert plan(8, 80, shape=LARGE).recipe.serve.devices == ("0,1,2,3", "4,5,6,7")
    assert plan(6, 80, shape=LARGE).recipe.serve.devices == ("0,1,2,3",), "two cards serve nothing, and none is made up"
    assert plan(6, 80, shape=LARGE).fit.serving_fault == ""
    assert plan(2, 80, shape=LARGE).fault.startswith("vLLM has 71.2 GiB")


def test_a_base_in_4_bits_is_the_last_resort_and_rows_are_then_not_shortened_without_need():
    found = plan(1, 24, free=16.0)
    assert not found.fit.training_fault
    assert found.recipe.train.base_weights == "nf4"
    assert found.recipe.train.max_length == 4096
    assert found.recipe.train.max_image_side == 672  # rows would be refused, not made smaller
    large = plan(2, 80, shape=LARGE)
    assert (large.recipe.train.base_weights, large.recipe.train.accelerate_config) == ("nf4", "ddp")
    assert not large.fit.training_fault
    assert large.fit.serving_fault

"""What a command says of a training that has ended."""

from __future__ import annotations

from vcot.services.run.training_steps import describe_training
from vcot.training.protocol.job import TrainProgress, TrainStatus

STATUS = TrainStatus(state="done", num_steps=4, num_train=10, num_adapted_modules=7)


def test_a_training_without_a_validation_pair_is_described_and_goes_on() -> None:
    """The preflight had refused the only one: after all of the training, each command ended in an IndexError."""
    trained = TrainProgress(kind="train", step=4, num_steps=4, epoch=1, loss=0.6, elapsed_s=1)
    assert describe_training(STATUS, [trained]).endswith(
        "no validation pair could be used, so there is no validation loss"
    )
    points = [
        trained.model_copy(update={"kind": "validation", "step": step, "loss": loss, "gap": gap})
        for step, loss, gap in ((0, 0.69, None), (4, 0.5, -0.1))
    ]
    assert describe_training(STATUS, [*points, trained]) == (
        "4 steps over 10 pairs, 7 modules adapted; validation loss 0.6900 -> 0.5000, gap -0.1000"
    )

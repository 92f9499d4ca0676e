"""What is checked of a model that was loaded in parts (tests/e2e/test_sharded.py loads some)."""

import pytest
import torch

from vcot.pipeline.errors import ServerError
from vcot.training.model.sharded import check_filled


def test_weights_and_buffers_that_were_not_loaded_are_found():
    model = torch.nn.BatchNorm1d(2, affine=False)
    check_filled(model)
    model.running_var = model.running_var.to("meta")
    with pytest.raises(ServerError, match="1 weights were not loaded, the first running_var"):
        check_filled(model)

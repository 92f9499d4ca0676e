"""Keys of APIs."""

import pytest

from vcot.pipeline.bearer import read_key
from vcot.pipeline.errors import MachineError
from vcot.pipeline.judges.model import read_api_key
from vcot.pipeline.sections import JudgeSection
from vcot.services.gateway import admin
from vcot.services.run.measuring import read_gateway_key


def test_a_key_is_taken_without_the_space_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file that ends with a line break gives it; the gateway takes it in the same way."""
    monkeypatch.setenv("VCOT_API_KEY", " secret\n")
    assert read_gateway_key() == "secret"
    monkeypatch.setenv("VCOT_API_KEY", "")
    assert read_gateway_key() == "none"


@pytest.mark.parametrize("key", ["schl\u00fcssel", "one\ntwo", "a\u2028b", "a\tb"])
async def test_a_key_that_no_request_can_carry_is_said_to_be_one_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Each was a traceback, or a message with the key in it that spoke of the address."""
    for variable in ("VCOT_API_KEY", "VCOT_ADMIN_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(variable, key)
        with pytest.raises(MachineError, match=f"{variable} holds a line break or a character") as told:
            read_key(variable)
        assert key not in str(told.value)
    with pytest.raises(MachineError):
        read_gateway_key()
    with pytest.raises(MachineError):
        read_api_key(JudgeSection(kind="pointwise"))
    with pytest.raises(MachineError):
        await admin.fetch_state("http://127.0.0.1:9")

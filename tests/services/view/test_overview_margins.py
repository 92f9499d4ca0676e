"""Margins in the viewer's overview: as the report shows them; of an evaluation that goes on, as far as it has come."""

from tests.services.view.view_run import own, prepared
from vcot.pipeline.odds import OptionScores
from vcot.pipeline.option_scores import key_options
from vcot.services.run.directory import open_run

__all__ = ["own", "prepared"]


def tell_options(own, checkpoint):
    """How likely a checkpoint finds the options: the right one by two nats."""

    def put(session):
        for request in session.questions("test").option_requests(checkpoint.ref):
            logps = tuple(2.0 * is_right for is_right in request.task.right_options)
            fields = {"key": key_options(request), "task": request.task.id, "checkpoint": checkpoint.ref.digest}
            session.run.ledger.put([OptionScores(logps=logps, **fields)])

    own.change(put)


def read_overview(own):
    own.summarise()
    return own.client().get("/runs/0/").text


def test_the_overview_has_the_margins_that_there_are(own):
    with open_run(own.directory, None, ["eval.margins=true"], save=True, access="alone"):
        pass
    page = read_overview(own)
    assert "Accuracy in %" in page, "an evaluation whose margins are owed is shown as far as it has come"
    assert "Margins: log p(right option)" not in page
    tell_options(own, own.base)
    page = read_overview(own)
    assert "Margins: log p(right option) - log p(best wrong option), in nats" in page
    assert "With its own image base finds the right option 2.00 nats likelier than the best wrong one" in page
    assert "With its own image dpo-x finds" not in page

"""The pointwise judge with a transport that a test chooses; a recipe names it as one of one's own."""

from vcot.pipeline.judges.pointwise import PointwiseJudge

TRANSPORTS = []
"""The last one is used; the network where there is none."""
KIND = f"{__name__}:SimulatedJudge"


class SimulatedJudge(PointwiseJudge):
    def __init__(self, section, images):
        super().__init__(section, images, transport=TRANSPORTS[-1] if TRANSPORTS else None)

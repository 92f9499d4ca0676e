"""Trackers besides the run's own files: Weights & Biases and trackio, through transformers' callbacks.

Both get every logged step and evaluation, the gap between the two losses among them, the settings of trainer and adapter,
and the checkpoint's name as the run's. A job is one run there, whichever process does it: one that resumes goes on in it,
and one that follows in the same process begins its own. Weights & Biases writes into the job's directory, and nowhere
else with WANDB_MODE=offline; trackio into its own local database (TRACKIO_DIR).
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

from vcot.pipeline.errors import MachineError
from vcot.training.protocol.job import TrainJob

PROJECT = "vcot"


def check_account() -> None:
    """Raise MachineError where Weights & Biases would ask for a key, which nobody could type into a worker."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host or "")  # where `wandb login` keeps it
    except (OSError, netrc.NetrcParseError):
        known = None
    if known is None:
        raise MachineError(
            "train.report_to names wandb, and there is no key for it: set WANDB_API_KEY, or WANDB_MODE=offline, which "
            "needs none"
        )


@contextmanager
def tracking(job: TrainJob, job_directory: Path) -> Iterator[None]:
    """The job's training, in a run of its own; called by the first rank only.

    transformers takes the wandb run that it finds: left alone, a process's second job would go on in its first one's.
    """
    if "wandb" not in job.train.report_to:
        yield
        return
    import wandb

    project, directory = os.environ.get("WANDB_PROJECT", PROJECT), os.environ.get("WANDB_DIR", str(job_directory))
    with wandb.init(project=project, dir=directory, id=job.key[:16], name=job.checkpoint_name, resume="allow"):
        yield

"""One of the processes that train together; the worker calls `accelerate launch --module vcot.training.worker.rank JOB_DIR`.

The first rank holds the job's rank.lock while it trains: should a killed worker have left ranks behind, the next worker's
do not write beside them.
"""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from vcot.pipeline.errors import VcotError
from vcot.training.dpo.preflight import open_pairs
from vcot.training.model.loading import load_processor, quiet_libraries
from vcot.training.protocol.job import JOB, RANK_LOCK, TrainJob, exclusive, read_record, tell_fault
from vcot.training.worker.jobs import fit, set_up_process

_TIMEOUT = timedelta(days=1)
"""How long a rank waits for the others: the first computes the reference's log-probs alone. A dead one ends all at once."""
_log = logging.getLogger(__name__)


def main(job_directory: Path) -> int:
    """Train as this rank; returns the exit code, which accelerate's agent turns into its own."""
    set_up_process()
    quiet_libraries()
    # Joins the group, and takes this rank's GPU.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=_TIMEOUT)
    try:
        with ExitStack() as held:
            if state.is_main_process:
                held.enter_context(exclusive(job_directory, RANK_LOCK))
            job = read_record(job_directory / JOB, TrainJob)
            processor, _ = load_processor(Path(job.base_path))
            fit(job, job_directory, processor, open_pairs(job, job_directory, processor, _log.info))
            state.wait_for_everyone()
    except VcotError as error:
        if state.is_main_process:
            tell_fault(job_directory, error)
        _log.error("rank %d: %s", state.process_index, error)
        return error.exit_code
    state.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

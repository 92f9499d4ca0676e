"""This machine's share of a job that several train: `python -m vcot.training.worker.share JOB_DIR PLACE`.

A `vcot worker` calls it, and holds the place meanwhile.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vcot.pipeline.errors import VcotError
from vcot.training.model.loading import num_gpus
from vcot.training.protocol.job import JOB, TrainJob, read_record
from vcot.training.protocol.launch import check_installed, check_machine, help_train
from vcot.training.worker.jobs import set_up_process


def main(job_directory: Path, place: int) -> int:
    """Help to the end; returns the exit code."""
    set_up_process()
    try:
        recipe = read_record(job_directory / JOB, TrainJob).train
        check_installed(recipe)
        check_machine(recipe, num_gpus())
        return help_train(job_directory, place)
    except VcotError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))

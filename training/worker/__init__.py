"""The process that does training jobs: `python -m vcot.training.worker JOB_DIR ...`."""

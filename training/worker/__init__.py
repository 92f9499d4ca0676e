"""The process that does training jobs: `python -m training.worker JOB_DIR ...`."""

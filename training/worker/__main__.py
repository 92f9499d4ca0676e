"""`python -m training.worker`: does training jobs."""

import sys

from training.worker.work import main

if __name__ == "__main__":
    sys.exit(main())

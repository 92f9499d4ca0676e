"""`python -m vcot.training.worker`: does training jobs."""

import sys

from vcot.training.worker.jobs import main

if __name__ == "__main__":
    sys.exit(main())

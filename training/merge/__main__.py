"""`python -m vcot.training.merge`: merges a trained job into a checkpoint."""

import sys

from vcot.training.merge.merging import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m vcot.training.mini FOLDER`: SmolLM2-135M-Instruct as an ordinary checkpoint, for vLLM to serve as a judge."""

import sys
from pathlib import Path

from vcot.training.mini.smollm import write_smollm

write_smollm(Path(sys.argv[1]))

"""Make the modules beside this file and those of tests/gguf importable."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "gguf")]

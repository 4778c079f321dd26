"""Make the modules beside this file, and GGUF's tiny models, importable with importlib mode."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "gguf")]

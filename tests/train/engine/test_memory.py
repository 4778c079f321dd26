"""P10: what a step holds grows with a layer by the activation that is kept of it, and no more."""

import subprocess
import sys
from pathlib import Path

from loraformat.ops.convert import convert
from tests.train.tiny_bundles import make_dense

PROGRAM = Path(__file__).parent / "memory_of_a_step.py"
TOKENS, HIDDEN = 1024, 256


def bundle(directory, layers):
    """Write a model of so many layers."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 256, "head_dim": 64}
    make_dense(directory / "dense", "llama", num_hidden_layers=layers, **sizes)
    convert(directory / "dense", directory / "bundle")
    return str(directory / "bundle")


def test_memory_grows_by_one_activation_per_layer(tmp_path):
    few, many = 4, 20
    bundles = [bundle(tmp_path / str(layers), layers) for layers in (few, many)]
    command = [sys.executable, PROGRAM, str(TOKENS), *bundles]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    of_few, of_many = map(int, printed.split())
    measured = of_many - of_few
    kept = (many - few) * TOKENS * HIDDEN * 4
    assert 0.9 * kept < measured < 1.25 * kept

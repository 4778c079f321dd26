"""P10: what a step holds grows with a layer by the activation that is kept of it, and no more."""

import os
import subprocess
import sys
from pathlib import Path

from loraformat.ops.convert.convert import convert
from tests.tiny_models import make_model

HERE = Path(__file__).parent
TOKENS, HIDDEN = 1024, 256


def bundle(directory, layers):
    """Write a model of so many layers."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 256, "head_dim": 64}
    make_model("llama", directory / "dense", num_hidden_layers=layers, **sizes)
    convert(directory / "dense", directory / "bundle")
    return str(directory / "bundle")


def printed(program, *arguments):
    """Run a program in a process of its own, and return the words that it prints."""
    words = [sys.executable, HERE / program, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[2])}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr
    return done.stdout.split()


def test_memory_grows_by_one_activation_per_layer(tmp_path):
    few, many = 4, 20
    bundles = [bundle(tmp_path / str(layers), layers) for layers in (few, many)]
    of_few, of_many = map(int, printed("memory_of_a_step.py", TOKENS, *bundles))
    measured = of_many - of_few
    kept = (many - few) * TOKENS * HIDDEN * 4
    assert 0.9 * kept < measured < 1.25 * kept


def test_a_step_runs_under_a_hard_limit_that_bites(tmp_path):
    """What 20 layers hold while each is computed would be several times the limit."""
    layers, activation = 20, TOKENS * HIDDEN * 4
    kept, one_layer = layers * activation, 17 * activation  # as plan_memory reckons it
    limits = kept // 2, kept + one_layer + (8 << 20)
    assert limits[1] < layers * one_layer // 5
    # The limit that bites comes last: a step that broke off leaves holes in the heap.
    found = printed("step_under_a_limit.py", bundle(tmp_path, layers), TOKENS, *reversed(limits))
    assert found == ["done", "refused"]

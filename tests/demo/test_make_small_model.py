"""The script that makes the small model: what it reads, and that it repeats itself."""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from loraformat.demo import HELDOUT

torch = import_module("torch")
import_module("transformers")

SCRIPT = Path(__file__).parents[2] / "tools" / "make_small_model.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_small_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["os.py", "json/decoder.py", "unittest/mock.py"])
def test_library_modules_are_wanted(script: Any, name: str) -> None:
    assert script.is_wanted(name)


@pytest.mark.parametrize(
    "name",
    [
        "queue.py",
        "test/test_os.py",
        "ctypes/test/test_init.py",
        "idlelib/idle_test/mock_tk.py",
        "site-packages/torch/nn.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "encodings/cp037.py",
    ],
)
def test_tests_tables_and_strangers_are_not(script: Any, name: str) -> None:
    assert not script.is_wanted(name)


def test_documents_are_sorted_unique_and_not_held_out(script: Any, tmp_path: Path) -> None:
    contents = {
        "b.py": "b = 1\n",
        "a.py": "a = 1\n",
        "copy_of_a.py": "a = 1\n",
        "queue.py": "held = 'out'\n",
        "copy_of_queue.py": "held = 'out'\n",
        "own.py": "# Permission to use, copy, modify ...\n",
        "paths.py": f"prefix = {str(tmp_path)!r}\n",
        "empty.py": "\n",
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    assert [d.name for d in script.training_documents(tmp_path)] == ["a.py", "b.py"]


def test_every_byte_of_a_document_counts_in_the_hash(script: Any) -> None:
    one, other = (script.describe([script.Document("a.py", text)]) for text in ("a", "b"))
    assert one["sha256"] != other["sha256"]
    assert (one["files"], one["bytes"]) == (1, 1)


def test_the_rate_warms_up_and_falls(script: Any) -> None:
    recipe = script.Recipe(steps=1000)
    rates = [recipe.rate(step) for step in range(1000)]
    assert max(rates) == pytest.approx(recipe.learning_rate, rel=1e-3)
    assert rates[0] < rates[50] < rates[99]
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(recipe.learning_rate * recipe.final_fraction, rel=0.01)


def test_batches_hold_consecutive_tokens(script: Any) -> None:
    recipe = script.Recipe(batch=3, window=8)
    source = script.batches(torch.arange(100), recipe)
    for _ in range(10):
        rows = next(source)
        assert rows.shape == (3, 9)
        assert torch.equal(rows.diff(), torch.ones(3, 8, dtype=rows.dtype))


def test_the_same_seed_trains_the_same_weights(script: Any) -> None:
    documents = [script.Document("heldout.txt", HELDOUT.read_bytes().decode()[:20_000])]
    recipe = script.Recipe(steps=2, batch=2, window=16)
    weights = []
    for _ in range(2):
        tokenizer = script.train_tokenizer(documents)
        torch.manual_seed(recipe.seed)
        model = script.new_model(tokenizer)
        script.train(model, script.encode(tokenizer, documents), recipe)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

"""Extraction and combination hold tiles, never the model, and never a dense delta."""

import sys
from pathlib import Path

import pytest
import torch

from loraformat import plugins
from loraformat.ops.adapter_output.output import write_adapter
from loraformat.ops.convert.convert import convert
from loraformat.testing import checkpoint, dense, save
from tests.adapters.memory_adapters import adapter, delta
from tests.anonymous_memory import grown

MB = 1_000_000
ROWS, COLUMNS = 2048, 4096
LARGEST = 2 * ROWS * COLUMNS


def models(folder, count, rows=ROWS, columns=COLUMNS):
    """A base and a fine-tune of `count` matrices, on disk."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=random) * 0.02
    change = torch.randn(rows, 8, generator=random) @ torch.randn(8, columns, generator=random)
    for name, values in (("base", weight), ("tuned", weight + 1e-3 * change)):
        names = (f"model.layers.{i}.mlp.up_proj.weight" for i in range(count))
        held = checkpoint(
            *(dense(name, values.bfloat16()) for name in names), config={"model_type": "llama"}
        )
        save(plugins.get("safetensors"), held, folder / name)
    return folder / "base", folder / "tuned"


linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@linux
@pytest.mark.parametrize("base_format", ["safetensors", "loraformat"])
def test_extraction(tmp_path: Path, base_format: str) -> None:
    def call(name, *pair):
        base, tuned = pair
        if base_format != "safetensors":
            convert(base, tmp_path / f"{name}-bundle", to_format=base_format)
            base = tmp_path / f"{name}-bundle"
        return ["extract", base, tuned, "-o", tmp_path / f"{name}-out", "--rank", "16", "--force"]

    small = call("small", *models(tmp_path / "small", 2, 256, 256))
    found = {}
    for count in (3, 6):
        large = call(f"large-{count}", *models(tmp_path / str(count), count))
        (found[count],) = grown(small, large)
    # Tiles and what is decoded of them take 50 to 90 MB, whatever the tensor; the difference in
    # float32 is twice as large as that. The two models have 200 MB.
    assert max(found.values()) < 4 * LARGEST + 100 * MB
    assert found[6] < found[3] + 2 * LARGEST


@linux
@pytest.mark.parametrize("method", ["svd", "ties", "dare_linear"])
def test_combination(tmp_path: Path, method: str) -> None:
    """Two embeddings, whose dense deltas would be 33 MB each: tiles, and one result."""

    def call(name, rows, columns):
        paths = []
        for seed in (0, 1):
            random = torch.Generator().manual_seed(seed)
            factors = [torch.randn(rows, 4, generator=random), torch.randn(4, columns)]
            path = tmp_path / f"{name}-{seed}"
            write_adapter(adapter(*(delta(f"m.{i}.weight", *factors) for i in range(3))), path)
            paths.append(path)
        return ["combine", *paths, "-o", tmp_path / f"{name}-out", "--method", method]

    dense_delta = 4 * ROWS * COLUMNS
    bound = 10 * MB if method == "svd" else dense_delta + 40 * MB
    (used,) = grown(call("small", 256, 256), call("large", ROWS, COLUMNS))
    assert used < bound

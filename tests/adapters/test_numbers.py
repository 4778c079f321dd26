"""Weights and scalings that no runtime can use are refused; errors are those of what is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraformat.demo import ADAPTERS
from loraformat.errors import InputError, LoraFormatError, UnsupportedError, UsageError
from loraformat.ops.adapter_output.output import write_adapter
from loraformat.ops.combine.combine import combine
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge
from loraformat.ops.opening.adapter import open_adapter
from loraformat.ops.reduce import reduce
from tests.adapters.memory_adapters import distance, effects, random_adapter
from tests.adapters.merging import Q, adapter, delta, small
from tests.torch_tensors import numbers

NOT_NUMBERS = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("weight", NOT_NUMBERS)
def test_a_weight_is_a_finite_number(tmp_path, weight):
    base, _ = small(tmp_path)
    with pytest.raises(UsageError, match="not a finite number"):
        merge(base, [adapter(delta(Q, 32, 32))], tmp_path / "out", weight=[weight])
    write_adapter(adapter(delta(Q, 32, 32)), tmp_path / "a")
    for method in ("svd", "cat", "linear", "ties"):
        with pytest.raises(UsageError, match="not a finite number"):
            combine([tmp_path / "a"], tmp_path / "b", method=method, weight=[weight])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


@pytest.mark.parametrize("beside", [False, True])
def test_a_weight_times_a_scaling_fits_into_float32(tmp_path, beside):
    base, _ = small(tmp_path)
    if beside:
        convert(base, tmp_path / "bundle")
        base = tmp_path / "bundle"
    before = set(tmp_path.iterdir())
    with pytest.raises(UsageError, match="exceeds float32; give a smaller --weight"):
        merge(base, [adapter(delta(Q, 32, 32))], tmp_path / "out", weight=[1e308],
              to="loraformat" if beside else None)  # fmt: skip
    assert set(tmp_path.iterdir()) == before
    write_adapter(adapter(delta(Q, 32, 32)), tmp_path / "a")
    for method in ("svd", "cat", "linear", "ties"):
        with pytest.raises(UsageError, match="exceeds float32"):
            combine([tmp_path / "a"], tmp_path / "b", method=method, weight=[1e308])
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "changes", [{"lora_alpha": 1e308}, {"lora_alpha": -1e300, "use_rslora": True},
                {"alpha_pattern": {"q_proj": 1e200}}]
)  # fmt: skip
def test_an_alpha_whose_scaling_exceeds_float32_is_refused_in_every_verb(tmp_path, changes):
    shutil.copytree(ADAPTERS["manual"], tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=r"adapter_config\.json: lora_alpha of model\.layers"):
        open_adapter(tmp_path / "a")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_merge_that_overflows_is_refused(tmp_path, dtype, quantized):
    base, _ = small(tmp_path)
    huge = adapter(delta(Q, 32, 32, scale=1e10, scaling=1e30))
    if quantized:
        convert(base, tmp_path / "bundle")
        base = tmp_path / "bundle"
    before = {path: path.read_bytes() for path in Path(base).iterdir() if path.is_file()}
    with pytest.raises(UnsupportedError, match=rf"{Q}.* exceed the range of {dtype.upper()}"):
        merge(base, [huge], tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()
    assert {path: path.read_bytes() for path in before} == before


def test_a_base_that_holds_infinity_already_is_merged(tmp_path):
    base, tensors = small(tmp_path)
    tensors[Q][0, 0] = float("inf")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    merge(base, [adapter(delta(Q, 32, 32))], tmp_path / "out")
    assert (tmp_path / "out").exists()


#: What is computed, and how exactly the share that it keeps is known.
ALGEBRA = {
    "reduce": (lambda a, out, **o: reduce(a, out, rank=3, dtype=o.pop("dtype"), **o), 0),
    "same": (lambda a, out, **o: reduce(a, out, rank=8, dtype=o.pop("dtype"), **o), 0),
    "linear": (
        lambda a, out, **o: combine(
            [a, a], out, method="linear", dtype=o.pop("dtype"), weight=[0.25, 0.75], **o
        ),
        0,
    ),
    "ties": (
        lambda a, out, **o: combine(
            [a], out, method="ties", density=1.0, dtype=o.pop("dtype"), **o
        ),
        5e-4,  # the square root of a share in float32
    ),
}


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", None])
@pytest.mark.parametrize("name", ALGEBRA)
def test_errors_are_those_of_what_is_written(tmp_path, name, dtype):
    call, precision = ALGEBRA[name]
    before = random_adapter()
    write_adapter(before, tmp_path / "a")
    planned = call(tmp_path / "a", tmp_path / "out", dtype=dtype, dry_run=True)
    report = call(tmp_path / "a", tmp_path / "out", dtype=dtype)
    assert planned.modules == report.modules
    with open_adapter(tmp_path / "out") as found:
        for module in report.modules:
            true = distance(effects(found)[module.target], effects(before)[module.target])
            assert module.error == pytest.approx(true, rel=0.1, abs=1e-6 + precision)
            assert module.energy == pytest.approx(1 - module.error**2)


def test_factors_that_the_dtype_cannot_hold_are_refused(tmp_path):
    write_adapter(adapter(delta(Q, 32, 32, scaling=1e12)), tmp_path / "a")
    for call in (
        lambda: reduce(tmp_path / "a", tmp_path / "b", rank=2, dtype="f16"),
        lambda: combine([tmp_path / "a"], tmp_path / "b", dtype="f16"),
    ):
        with pytest.raises(LoraFormatError, match=r"exceed the range of F16.*--dtype f32"):
            call()
    assert not (tmp_path / "b").exists()


def test_factors_are_finite_in_float32_at_the_largest_scaling(tmp_path):
    write_adapter(adapter(delta(Q, 32, 32, scaling=1e38)), tmp_path / "a")
    reduce(tmp_path / "a", tmp_path / "b", rank=2)
    with open_adapter(tmp_path / "b") as found:
        assert torch.isfinite(numbers(found.deltas[Q].b)).all()

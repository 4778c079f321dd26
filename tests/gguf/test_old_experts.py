"""Mixtral files of early 2024, with a tensor for each expert."""

from __future__ import annotations

import pytest
import torch
from bases import apart, by_transformers, make_base
from loraformat_converters.gguf.container.reader import open_gguf
from loraformat_converters.gguf.container.types import GGMLType
from loraformat_converters.gguf.container.writer import PlannedTensor, write_gguf
from safetensors.torch import load_file

from loraformat.errors import InputError
from loraformat.ops.convert.convert import convert
from loraformat.storage.atomic_file import AtomicFile


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A tiny Mixtral, and its GGUF file in float16."""
    source = make_base("mixtral", tmp_path_factory.mktemp("base") / "mixtral")
    convert(source, source.with_suffix(".gguf"), dtype="f16")
    return source, source.with_suffix(".gguf")


def unstack(source, target, leave_out=(), widths=()):
    """Write the experts of a file as tensors of their own, without any key of ours."""
    with open_gguf(source) as file, AtomicFile(target, plan="old") as output:
        metadata = {k: v for k, v in file.metadata.items() if not k.startswith("loraformat.")}
        tensors = []
        for tensor in file.tensors.values():
            data = file.load(tensor.name)
            if not tensor.name.endswith("_exps.weight"):
                pieces = {tensor.name: (tensor.shape, data)}
            else:
                size = tensor.nbytes // tensor.shape[0]
                stem = tensor.name.removesuffix("_exps.weight")
                pieces = {
                    f"{stem}.{n}.weight": (tensor.shape[1:], data[n * size : (n + 1) * size])
                    for n in range(tensor.shape[0])
                }
            for name, (shape, raw) in pieces.items():
                if name in widths:
                    shape, raw = (shape[0] // 2, *shape[1:]), raw[: len(raw) // 2]
                if name not in leave_out:
                    tensors.append(PlannedTensor(name, shape, tensor.type, lambda d=raw: [d]))
        write_gguf(output, metadata, tensors)
        output.commit()
    return target


def test_they_are_what_the_stacked_ones_are(mixtral, tmp_path):
    source, new = mixtral
    old = unstack(new, tmp_path / "old.gguf")
    with open_gguf(old) as file:
        assert file.tensors["blk.1.ffn_down.3.weight"].type is GGMLType.F16
        assert not any("_exps" in name for name in file.tensors)
    convert(old, tmp_path / "from-old", to_format="safetensors")
    convert(new, tmp_path / "from-new", to_format="safetensors")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("from-old", "from-new"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    wanted = by_transformers(source, "mixtral")
    assert apart(by_transformers(tmp_path / "from-old", "mixtral"), wanted) < 1e-2  # float16


def test_they_can_be_made_anew_for_llama_cpp_of_today(mixtral, tmp_path):
    _, new = mixtral
    convert(unstack(new, tmp_path / "old.gguf"), tmp_path / "anew.gguf", dtype="f16")
    with open_gguf(tmp_path / "anew.gguf") as ours, open_gguf(new) as wanted:
        assert ours.tensors.keys() == wanted.tensors.keys()
        for name in wanted.tensors:
            assert ours.load(name) == wanted.load(name), name


@pytest.mark.parametrize("changes", [{"leave_out": ("blk.1.ffn_up.2.weight",)},
                                     {"widths": ("blk.0.ffn_gate.1.weight",)}])  # fmt: skip
def test_one_that_is_missing_or_odd_is_named(mixtral, changes, tmp_path):
    old = unstack(mixtral[1], tmp_path / "old.gguf", **changes)
    with pytest.raises(InputError, match=next(iter(*changes.values()))):
        convert(old, tmp_path / "dense", to_format="safetensors")

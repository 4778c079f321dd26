"""The scales of Q4_0 to Q5_1: smaller errors than ggml's, and none that lean to one side."""

from __future__ import annotations

import ggml_oracle
import numpy as np
import pytest
import torch
from bases import SMALL
from llama_runtime import log_probabilities
from loraformat_converters.gguf.container.reader import open_gguf
from loraformat_converters.gguf.container.types import GGMLType
from loraformat_converters.gguf.container.writer import PlannedTensor, write_gguf
from loraformat_converters.gguf.quantization.blocks import dequantize, quantize
from loraformat_converters.gguf.quantization.scale_search import offset_codes, signed_codes

from loraformat.ops.convert.convert import convert
from loraformat.storage.atomic_file import AtomicFile
from tests import torch_codec as codec

SEARCHED = [GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1]
SHAPE = (128, 1024)


def read(stored, kind, shape=SHAPE):
    return torch.from_numpy(dequantize(memoryview(stored), kind, shape))


def in_nf4(weight, block_size=64, double_quant=True):
    codes = codec.quantize(weight, block_size=block_size, double_quant=double_quant)
    return codec.dequantize(codes, dtype=torch.float32).view(weight.shape)


def sources():
    draw = torch.Generator().manual_seed(5)
    normal = torch.randn(SHAPE, generator=draw) * 0.02
    tailed = normal * torch.randn(SHAPE, generator=draw).abs().pow(1.5)
    found = {"normal": normal, "tailed": tailed, "shifted": normal + 0.01}
    found |= {
        "nf4": in_nf4(normal),
        "nf4 tailed": in_nf4(tailed),
        "nf4 in bf16": in_nf4(normal).bfloat16().float(),
        "nf4 in blocks of 32": in_nf4(normal, 32),
        "nf4 in blocks of 256": in_nf4(normal, 256, double_quant=False),
    }
    for kind in (*SEARCHED, GGMLType.Q8_0, GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.IQ4_NL):
        found[kind.name] = read(ggml_oracle.quantize(normal.numpy(), kind), kind)
    return found


SOURCES = sources()


def figures(weight, found):
    """Return RMS and mean of the error, in units of the weights' RMS."""
    error, unit = (found - weight).double(), weight.double().square().mean().sqrt()
    return float(error.square().mean().sqrt() / unit), float(error.mean() / unit)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", [*SEARCHED, GGMLType.Q8_0], ids=lambda kind: kind.name)
def test_no_error_leans_to_one_side(kind, source):
    """A constant on every weight adds up over the layers, as noise of its size does not."""
    weight = SOURCES[source]
    size, mean = figures(weight, read(quantize(weight.numpy(), kind), kind))
    assert abs(mean) < 1e-2
    if kind in SEARCHED:
        assert abs(mean) < 0.12 * size + 1e-6
    if source == "nf4":
        assert abs(mean) < 3e-3


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", SEARCHED, ids=lambda kind: kind.name)
def test_errors_are_smaller_than_those_of_ggmls_encoders(kind, source):
    """Its plain one, and the search that it does for an imatrix, here one of equal columns."""
    weight, ones = SOURCES[source], np.ones(SHAPE[1], np.float32)
    size, _ = figures(weight, read(quantize(weight.numpy(), kind), kind))
    plain, _ = figures(weight, read(ggml_oracle.quantize(weight.numpy(), kind), kind))
    searched, _ = figures(weight, read(ggml_oracle.quantize(weight.numpy(), kind, ones), kind))
    if plain < 1e-3:  # it holds the source exactly, and so do we, but for single blocks
        assert size < 2e-3
    else:
        assert size < plain
    if source not in GGMLType.__members__:  # on whose grids luck decides
        assert size < 1.06 * searched


def test_ggmls_plain_encoder_leans_from_nf4():
    """What the bounds above would not let pass."""
    weight = SOURCES["nf4"]
    for kind, least in ((GGMLType.Q4_0, 0.03), (GGMLType.Q5_0, 0.005)):
        size, mean = figures(weight, read(ggml_oracle.quantize(weight.numpy(), kind), kind))
        assert mean > least and mean > 0.1 * size


@pytest.mark.parametrize("kind", SEARCHED, ids=lambda kind: kind.name)
def test_blocks_at_the_ends_of_float16(kind):
    """Zeros, equal numbers, denormals, the largest and the smallest that there are."""
    rows = [
        np.zeros(32), np.full(32, 3.0), np.full(32, -3.0), np.full(32, 1e-45), np.full(32, 65504.0),
        np.resize([65504.0, -65504.0], 32), np.resize([1e-38, 65504.0], 32), np.full(32, 6e-8),
        1000 + np.arange(32) * 1e-3, np.arange(32) * 1e-5, np.arange(32) * -1e-6,
    ]  # fmt: skip
    weight = torch.tensor(np.stack(rows), dtype=torch.float32)
    ours = read(quantize(weight.numpy(), kind), kind, weight.shape)
    theirs = read(ggml_oracle.quantize(weight.numpy(), kind), kind, weight.shape)
    assert ours.isfinite().all()
    off, plain = ((found - weight).norm(dim=1) for found in (ours, theirs))
    assert (off <= 1.01 * plain + 3e-4 * weight.norm(dim=1)).all()


def test_what_is_found_is_the_best_of_its_tries():
    """Against a search in float64 that tries four hundred scales for each block."""
    block = SOURCES["normal"][:8].reshape(-1, 32).T.contiguous()
    found = signed_codes(block.numpy(), 16, (1.0, 0.9, 0.94, 1.04, 1.08, 1.12))
    scales, codes = map(torch.from_numpy, found)
    found = (scales.double() * (codes.double() - 8) - block.double()).square().sum()
    extreme = block.gather(0, block.abs().argmax(0, keepdim=True))[0].double()
    best = torch.full_like(extreme, torch.inf)
    for stretch in torch.linspace(0.7, 1.3, 400).tolist():
        whole = (block.double() * (-8 * stretch / extreme)).round().clamp(-8, 7)
        fitted = (whole * block).sum(0) / whole.square().sum(0)
        best = torch.minimum(best, (fitted * whole - block).square().sum(0))
    assert found < 1.04 * best.sum()
    found = offset_codes(block.numpy(), 16, (1.0, 0.93, 0.86))
    scales, minima, codes = map(torch.from_numpy, found)
    lines = scales.double() * codes.double() + minima.double()
    assert (lines - block.double()).square().sum() < 0.85 * best.sum(), "one number more to fit"


def test_in_llama_cpp_nf4_goes_to_four_bits_with_less_loss(tmp_path):
    """Beside a file that is the same but for the bytes that ggml's plain encoder makes."""
    convert(SMALL, tmp_path / "bundle")
    for dtype in ("f32", "q4_0"):
        convert(tmp_path / "bundle", tmp_path / f"{dtype}.gguf", dtype=dtype)
    with (
        open_gguf(tmp_path / "f32.gguf") as exact,
        open_gguf(tmp_path / "q4_0.gguf") as ours,
        AtomicFile(tmp_path / "plain.gguf", plan="plain") as output,
    ):
        tensors = []
        for tensor in ours.tensors.values():
            data = ours.load(tensor.name)
            if tensor.type is GGMLType.Q4_0:
                values = dequantize(exact.load(tensor.name), GGMLType.F32, tensor.shape)
                data = memoryview(ggml_oracle.quantize(values, GGMLType.Q4_0))
            tensors.append(
                PlannedTensor(tensor.name, tensor.shape, tensor.type, lambda d=data: [d])
            )
        write_gguf(output, ours.metadata, tensors)
        output.commit()
    prompts = [[0, *range(first, first + 12)] for first in range(100, 1100, 50)]
    wanted, found, plain = (
        log_probabilities(tmp_path / f"{name}.gguf", prompts) for name in ("f32", "q4_0", "plain")
    )
    lost, lost_plainly = (
        float((np.exp(wanted) * (wanted - other)).sum(1).mean()) for other in (found, plain)
    )
    assert lost < 0.8 * lost_plainly and lost < 0.1, (lost, lost_plainly)

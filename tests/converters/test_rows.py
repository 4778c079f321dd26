"""Rows: of every kind of lazy tensor, the same bytes as of the whole."""

import math

import pytest
import torch
from loraformat_converters import safetensors

from loraformat.errors import NonFiniteError
from loraformat.model.checkpoint import DenseTensor
from loraformat.nf4 import codec
from loraformat.ops.encoding.encode import QuantizationPolicy, cast, dequantized, quantized
from loraformat.ops.encoding.one_dtype import aligned
from loraformat.plugins import WriteOptions
from loraformat.storage.atomic_output import AtomicOutput
from loraformat.testing import checkpoint, dense, nf4

W = "model.layers.0.mlp.up_proj.weight"
SHAPES = [(96, 128), (7, 33), (1, 4100), (300, 1), (3, 50, 70), (129,)]


def gauss(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def by_rows(values, name=W, dtype="F32"):
    """The same tensor, computed by rows; which ones is written down."""
    asked, matrix = [], values.numpy().reshape(math.prod(values.shape[:-1]), values.shape[-1])

    def read(start, stop):
        asked.append((start, stop))
        return matrix[start:stop]

    tensor = DenseTensor.by_rows(name, dtype, tuple(values.shape), lambda: read)
    return tensor, asked


def lazily(kind, shape):
    weight = gauss(*shape)
    return {
        "stored": lambda: dense(W, weight),
        "computed": lambda: by_rows(weight)[0],
        "rounded": lambda: by_rows(weight, dtype="BF16")[0],
        "NF4": lambda: nf4(W, weight, double_quant=False),
        "NF4 of bfloat16": lambda: nf4(W, weight.bfloat16()),
        "NF4 of Conv1D": lambda: nf4("h.0.mlp.c_fc.weight", weight, model_type="gpt2"),
        "decoded": lambda: dequantized(nf4(W, weight), "F16"),
        "cast": lambda: cast(dense(W, weight), "BF16"),
        "cast twice": lambda: cast(cast(by_rows(weight)[0], "F16"), "F32"),
    }[kind]()


KINDS = ["stored", "computed", "rounded", "NF4", "NF4 of bfloat16", "decoded", "cast", "cast twice"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [*KINDS, "NF4 of Conv1D"])
def test_rows_are_those_of_the_whole(kind, shape):
    if kind == "NF4 of Conv1D" and len(shape) != 2:
        shape = (64, 48)
    tensor = lazily(kind, shape)
    rows, columns = tensor.matrix_shape
    whole = tensor.array().reshape(rows, columns)
    read = tensor.row_reader()
    for start, stop in [(0, rows), (rows // 2, rows), (rows - 1, rows), (rows // 3, rows // 2)]:
        wanted = whole[start:stop].tobytes()
        assert tensor.rows(start, stop).tobytes() == wanted
        assert read(start, stop).tobytes() == wanted


@pytest.mark.parametrize("kind", ["computed", "rounded", "decoded", "cast", "cast twice"])
@pytest.mark.parametrize("shape", [*SHAPES, (4000, 600), (2, 3_000_000), (0, 4), (4, 0)])
def test_what_is_loaded_in_pieces_is_what_is_loaded_at_once(kind, shape):
    if kind == "decoded" and 0 in shape:
        return
    tensor = lazily(kind, shape)
    pieces = [bytes(piece) for piece in tensor.chunks()]
    assert b"".join(pieces) == bytes(tensor.load())
    assert all(len(piece) <= 8 << 20 or shape[0] == 2 for piece in pieces)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(70, 129), (1, 300_000), (1500, 700), (3, 100_001)])
def test_codes_of_rows_are_those_of_the_weight(shape, double_quant):
    weight = gauss(*shape)
    policy = QuantizationPolicy(64, double_quant)
    source, asked = by_rows(weight)
    found, wanted = (quantized(one, policy, None).load() for one in (source, dense(W, weight)))
    assert found.by_suffix() == wanted.by_suffix()
    assert found.relative_rms_error == wanted.relative_rms_error
    assert len(asked) > 1 or weight.numel() <= 1 << 18


def test_the_number_that_is_not_finite_is_named():
    weight = gauss(700, 1000)
    weight[650, 17] = torch.inf
    with pytest.raises(NonFiniteError, match="650017"):
        codec.quantize(by_rows(weight)[0].elements())


@pytest.mark.parametrize("shape", [(6000, 700), (0, 5), (5, 0), (1,)])
def test_a_writer_takes_pieces(tmp_path, shape):
    weight = gauss(*shape)
    written = []
    for number, tensor in enumerate([by_rows(weight)[0], dense(W, weight)]):
        model = checkpoint(tensor, dense("model.norm.weight", torch.ones(4)))
        told = []
        options = WriteOptions(shard_limit=1 << 30, progress=told.append)
        with AtomicOutput(tmp_path / str(number), plan="") as output:
            done = safetensors.CONVERTER.write(model, output, options)
            output.commit()
        assert sorted(told) == sorted([tensor.nbytes, 16])
        raw = (tmp_path / str(number) / "model.safetensors").read_bytes()
        written.append((done.shards.tensors[W].sha256, raw))
    assert written[0] == written[1]


def test_the_loss_of_a_cast_is_measured_by_pieces():
    name = "model.layers.0.post_attention_layernorm.weight"
    model = checkpoint(
        nf4(W, gauss(64, 64).bfloat16()), dense("lm_head.weight", gauss(64, 64).bfloat16()),
        by_rows(torch.full((3, 400), 1.0 + 2**-12), name)[0],
        dense("model.norm.weight", torch.tensor([1.0, 1.0 + 2**-10])),
        config={"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    )  # fmt: skip
    made, found = aligned(model)
    assert found.names == [name, "model.norm.weight"]
    assert "without a loss" not in " ".join(found.notes()) and found.errors == []
    for one in found.names:
        assert made.tensors[one].dtype == "BF16"
        assert sum(map(len, made.tensors[one].chunks())) == made.tensors[one].nbytes
    assert sorted(found.errors) == pytest.approx([2**-12, 2**-10], rel=1e-2)
    assert "up to 0.00098" in " ".join(found.notes())

"""HQQ: decoded by the arithmetic of its own module, whose tensors transformers saves."""

import pytest
import torch

from loraformat import plugins
from tests.converters.quantized_models import (
    Q,
    change,
    check_conversions,
    check_refused,
    make_models,
    quantize,
    replaced,
    without,
)

SETTINGS = {"quant_method": "hqq", "quant_config": {"nbits": 4}, "skip_modules": ["lm_head"]}
#: Codes in a word, by bits.
EACH = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


def text(word):
    return torch.tensor(list(word.encode()), dtype=torch.uint8)


def grouped(weight, size, axis):
    return weight.reshape(-1, size) if axis == 1 else weight.reshape(size, -1)


def packed(codes, bits):
    """Put rows that lie far from each other into one, the first of them in the highest bits."""
    each = EACH[bits]
    step = -(-len(codes) // each)
    padded = torch.zeros(step * each, codes.shape[1], dtype=torch.int32)
    padded[: len(codes)] = codes
    words = torch.zeros(step, codes.shape[1], dtype=torch.int32)
    for part in range(each):
        words |= padded[part * step : (part + 1) * step] << bits * (each - 1 - part)
    return words if bits == 3 else words.to(torch.uint8)


def hqq(bits=4, axis=1, size=64, dtype=torch.float16, as_float=False):
    def parts(weight):
        numbers = grouped(weight, size, axis)
        shape = (len(numbers), 1) if axis == 1 else (1, numbers.shape[1])
        words = packed(torch.randint(0, 1 << bits, numbers.shape), bits)
        name = "3bit_32" if bits == 3 else f"{bits}bit_u8"
        return {
            "W_q": words.view(dtype) if as_float else words,
            "scale": (torch.rand(shape) * 0.01).to(dtype),
            "zero": (torch.rand(shape) * (1 << bits)).to(dtype),
            "nbits": torch.tensor(bits, dtype=torch.int32),
            "group_size": torch.tensor(size, dtype=torch.int32),
            "axis": torch.tensor(axis, dtype=torch.int32),
            "shape": torch.tensor(list(weight.shape)),
            "packing": text(name),
            "view_as_float": torch.tensor(int(as_float), dtype=torch.uint8),
            "unpack_view_dtype": text("torch.int32" if bits == 3 else "torch.uint8"),
            "compute_dtype": text(str(dtype)),
            "offload_meta": torch.tensor(0, dtype=torch.uint8),
            "encoded_state_dict": torch.tensor(1, dtype=torch.uint8),
            "stores_quant_config": torch.tensor(1, dtype=torch.uint8),
        }

    return parts


def decoded(parts):
    """Return (code - zero) * scale, in float32, rounded once."""
    bits, axis, size = (int(parts[name]) for name in ("nbits", "axis", "group_size"))
    shape = tuple(parts["shape"].tolist())
    words = parts["W_q"].view(torch.int32 if bits == 3 else torch.uint8).int()
    shifts = [bits * (EACH[bits] - 1 - part) for part in range(EACH[bits])]
    codes = torch.cat([words >> shift & (1 << bits) - 1 for shift in shifts])
    codes = codes[: len(grouped(torch.empty(shape), size, axis))]
    exact = (codes - parts["zero"].float()) * parts["scale"].float()
    return exact.reshape(shape).to(parts["scale"].dtype)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


CASES = [
    *(("llama", bits, axis, torch.float16, False) for bits in EACH for axis in (0, 1)),
    ("llama", 4, 0, torch.bfloat16, True),
    ("moe", 4, 1, torch.float16, False),
]


@pytest.mark.parametrize(("source", "bits", "axis", "dtype", "as_float"), CASES)
def test_what_is_documented(models, tmp_path, source, bits, axis, dtype, as_float):
    parts = hqq(bits, axis, 32 if bits == 3 else 64, dtype, as_float)
    modules = quantize(models / source, tmp_path / "m", parts, SETTINGS)
    assert plugins.sniff(tmp_path / "m").name == "hqq"
    wanted = {f"{owner}.weight": decoded(made) for owner, made in modules.items()}
    count = 7 if source == "llama" else 16
    check_conversions(tmp_path / "m", wanted, tmp_path, count=count, named=f"HQQ int{bits}")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [3, 4])
def test_some_rows(models, tmp_path, bits, axis):
    modules = quantize(models / "llama", tmp_path / "m", hqq(bits, axis, 32), SETTINGS)
    with plugins.sniff(tmp_path / "m").read(tmp_path / "m", plugins.ReadOptions()) as model:
        tensor = model.tensors[f"{Q}.weight"]
        whole = decoded(modules[Q]).numpy()
        for start, stop in [(0, 64), (63, 64), (5, 9), (31, 33), (7, 7)]:
            assert tensor.rows(start, stop).tobytes() == whole[start:stop].tobytes()


def set_to(suffix, value):
    return lambda tensors: tensors.update({f"{Q}.{suffix}": value})


BAD = {
    "no scales": (without("scale"), "scale is missing"),
    "no zeros": (without("zero"), "zero is missing"),
    "no shape": (without("shape"), "shape is missing"),
    "no packing": (without("packing"), "packing is missing"),
    "no axis": (without("axis"), "axis is missing"),
    "fewer scales": (replaced("scale", lambda t: t[:-1]), "scale is F16"),
    "fewer codes": (replaced("W_q", lambda t: t[:-1]), "wanted codes of 4 bits"),
    "another shape": (set_to("shape", torch.tensor([64, 32])), "wanted codes of 4 bits"),
    "a shape that is none": (set_to("shape", torch.tensor([-64, -64])), "wanted codes of"),
    "a shape of three": (set_to("shape", torch.tensor([64, 8, 8])), "shape is I64"),
    "groups that do not divide": (set_to("group_size", torch.tensor(60).int()), "groups of 60"),
    "no groups": (set_to("group_size", torch.tensor(0).int()), "groups of 0"),
    "another axis": (set_to("axis", torch.tensor(2).int()), "along axis 2"),
    "unknown bits": (set_to("packing", text("7bit_u8")), "has packing 7bit_u8"),
    "quantized scales": (set_to("quant_scale", torch.tensor(1).byte()), "scales that are"),
    "a tensor more": (set_to("zero_q", torch.ones(2)), "zero_q belongs to"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_wrong_input_is_refused(models, tmp_path, wrong):
    edit, said = BAD[wrong]
    quantize(models / "llama", tmp_path / "m", hqq(), SETTINGS)
    check_refused(change(tmp_path / "m", edit), tmp_path / "out", said, from_format="hqq")

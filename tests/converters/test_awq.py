"""AWQ: decoded to what compressed-tensors' converter of AutoAWQ's checkpoints makes of it."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from compressed_tensors.quantization import QuantizationScheme

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

SETTINGS = {
    "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": ["lm_head"],
}  # fmt: skip
SCHEME = QuantizationScheme.model_validate({
    "targets": ["Linear"], "format": "pack-quantized",
    "weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
})  # fmt: skip


def words(*shape):
    return torch.randint(-(1 << 31), 1 << 31, shape).to(torch.int32)


def awq(dtype=torch.float16):
    def parts(weight):
        out, into = weight.shape
        return {
            "qweight": words(into, out // 8), "qzeros": words(into // 32, out // 8),
            "scales": (torch.rand(into // 32, out) * 0.01).to(dtype),
        }  # fmt: skip

    return parts


def decompressed(modules):
    """Return what compressed-tensors makes of the weights."""
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    found = {}
    for owner, parts in modules.items():
        named = {f"{owner}.{name}": part for name, part in parts.items()}
        theirs = AutoAWQConverter(group_size=32).process(named)
        local = {name.rpartition(".")[2]: part for name, part in theirs.items()}
        found[f"{owner}.weight"] = compressor.decompress(local, SCHEME)["weight"].contiguous()
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("source", "count", "dtype"),
    [("llama", 7, torch.float16), ("llama", 7, torch.bfloat16), ("moe", 16, torch.float16),
     ("tied", 7, torch.float16)],
)  # fmt: skip
def test_what_the_library_converts(models, tmp_path, source, count, dtype):
    modules = quantize(models / source, tmp_path / "m", awq(dtype), SETTINGS)
    assert plugins.sniff(tmp_path / "m").name == "awq"
    wanted = decompressed(modules)
    assert wanted[f"{Q}.weight"].dtype == dtype
    check_conversions(tmp_path / "m", wanted, tmp_path, count=count, named="AWQ int4")


def test_the_order_in_a_word(models, tmp_path):
    """AutoAWQ's: the lowest bits are output feature 0, the next 2, 4, 6, then 1, 3, 5, 7."""
    quantize(models / "llama", tmp_path / "m", awq(), SETTINGS)

    def edit(tensors):
        word = sum(feature << 4 * n for n, feature in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
        tensors[f"{Q}.qweight"].fill_(word)
        tensors[f"{Q}.qzeros"].fill_(0)
        tensors[f"{Q}.scales"].fill_(1)

    change(tmp_path / "m", edit)
    with plugins.sniff(tmp_path / "m").read(tmp_path / "m", plugins.ReadOptions()) as model:
        tensor = model.tensors[f"{Q}.weight"]
        assert tensor.array()[:, 0].tolist() == list(range(8)) * 8
        for start, stop in [(3, 5), (7, 17), (0, 64), (63, 64), (9, 9)]:
            assert tensor.rows(start, stop)[:, 0].tolist() == [n % 8 for n in range(start, stop)]


def test_scales_of_the_cache_stay_behind(models, tmp_path):
    quantize(models / "llama", tmp_path / "m", awq(), SETTINGS)
    name = Q.replace("q_proj", "k_proj.k_scale")
    change(tmp_path / "m", lambda tensors: tensors.update({name: torch.ones(())}))
    with plugins.sniff(tmp_path / "m").read(tmp_path / "m", plugins.ReadOptions()) as model:
        assert name not in model.tensors
        assert any("1 scales of activations" in said for said in model.left_behind)


BAD = {
    "no scales": (without("scales"), {}, "scales is missing"),
    "no zeros": (without("qzeros"), {}, "qzeros is missing"),
    "fewer words": (replaced("qweight", lambda t: t[:, :-1]), {}, "wanted I32"),
    "a vector": (replaced("qweight", lambda t: t.flatten()), {}, "wanted I32"),
    "words of another type": (replaced("qweight", lambda t: t.long()), {}, "wanted I32"),
    "fewer scales": (replaced("scales", lambda t: t[:-1]), {}, "wanted I32"),
    "groups that do not divide": (
        replaced("qweight", lambda t: t[:-1]), {}, "with groups that divide in"),
    "another number of bits": (None, {"bits": 8}, "AWQ of 8 bits"),
    "another layout": (None, {"version": "gemv"}, "the layout gemv"),
    "a layout that is none": (None, {"version": ["gemm"]}, "only 4 bits in the layout gemm"),
    "a scaled activation, as of Falcon and MPT": (
        lambda t: t.update({"model.layers.0.mlp.act.scales": torch.ones(64)}), {},
        "act.scales divides activations"),
    "a factor of activations": (
        lambda t: t.update({f"{Q}.act_scale": torch.ones(64)}), {}, "act_scale belongs to"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", BAD)
def test_wrong_input_is_refused(models, tmp_path, wrong):
    edit, more, said = BAD[wrong]
    quantize(models / "llama", tmp_path / "m", awq(), SETTINGS)
    change(tmp_path / "m", edit, **more)
    check_refused(tmp_path / "m", tmp_path / "out", said, from_format="awq")

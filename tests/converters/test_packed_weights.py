"""Weights that others quantized are told from dense ones by their tensors, not by a config."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraformat import plugins
from loraformat.demo import SMALL_MODEL
from loraformat.errors import UnsupportedError
from loraformat.model.packed_weights import packed_weights
from loraformat.ops.convert.convert import convert
from loraformat.testing import dense


def codes(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


def scales(*shape):
    return torch.ones(shape, dtype=torch.float16)


#: Parts of one weight, by their suffixes, as the method's own tools write them.
PACKED = {
    "EXL2": {".q_weight": codes(4, 64), ".q_scale": codes(1, 8), ".q_groups": codes(2)},
    "EXL3": {".trellis": codes(2, 4, 16, dtype=torch.int16), ".suh": scales(64)},
    "AQLM": {".codes": codes(64, 4, 1, dtype=torch.int8), ".codebooks": scales(1, 256, 1, 8)},
    "optimum-quanto": {".weight._data": codes(64, 32, dtype=torch.int8),
                       ".weight._scale": scales(64, 1)},
    "an unknown method": {".weight": codes(64, 32, dtype=torch.int8),
                          ".weight_scale": scales(64, 1)},
}  # fmt: skip
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def checkpoint(tmp_path):
    """The small model with its first query projection packed, as a function of the parts."""

    def make(parts, **config):
        shutil.copytree(SMALL_MODEL, tmp_path / "base")
        tensors = load_file(tmp_path / "base/model.safetensors")
        del tensors[f"{Q}.weight"]
        tensors |= {Q + suffix: part for suffix, part in parts.items()}
        save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
        path = tmp_path / "base/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return tmp_path / "base"

    return make


@pytest.mark.parametrize("target", ["bundle", "model.gguf"])
@pytest.mark.parametrize("method", PACKED)
def test_codes_are_never_taken_for_weights(checkpoint, tmp_path, method, target):
    base = checkpoint(PACKED[method])
    with pytest.raises(UnsupportedError) as refused:
        convert(base, tmp_path / target)
    assert f"is quantized with {method}, not dense ({Q}" in str(refused.value)
    assert "start from the original, unquantized model" in str(refused.value)
    assert not (tmp_path / target).exists()


def test_the_card_says_which_model_was_quantized(checkpoint, tmp_path):
    base = checkpoint(PACKED["AQLM"])
    (base / "README.md").write_text("---\nbase_model:\n- org/original\n---\n")
    with pytest.raises(UnsupportedError, match="unquantized model: org/original"):
        convert(base, tmp_path / "bundle")


def test_a_method_that_the_config_names_is_believed(checkpoint, tmp_path):
    base = checkpoint(
        {".weight": torch.zeros(192, 192)}, quantization_config={"quant_method": "spqr"}
    )
    with pytest.raises(UnsupportedError, match="is quantized with spqr"):
        convert(base, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("embeddings.position_ids", torch.arange(8).reshape(1, 8)),
        ("transformer.h.0.attn.bias", torch.ones(1, 1, 8, 8, dtype=torch.uint8)),
        ("transformer.h.0.attn.bias", torch.ones(1, 1, 8, 8, dtype=torch.bool)),
        ("layers.0.ffn.gate.tid2eid", torch.zeros(16, 2, dtype=torch.int64)),
        ("layers.0.attn.relative_position_index", torch.zeros(4, 4, dtype=torch.int64)),
        ("batch_norm.num_batches_tracked", torch.zeros((), dtype=torch.int64)),
        ("model.layers.0.mlp.up_proj.weight", torch.ones(2, 2)),
        ("model.layers.0.scales", torch.ones(2, 2)),
    ],
)
def test_integers_that_are_no_codes(name, tensor):
    assert packed_weights({name: dense(name, tensor)}) is None


def test_a_conversion_that_quantizes_nothing_says_so(tmp_path):
    tensors = {"model.embed_tokens.weight": torch.ones(8, 8), "model.norm.weight": torch.ones(8)}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    report = convert(tmp_path / "base", tmp_path / "bundle")
    assert report.quantized == 0
    assert any("nothing was quantized" in note for note in report.notes)
    report = convert(tmp_path / "base", tmp_path / "second", include=["*embed*"])
    assert report.quantized == 1
    assert not any("nothing was quantized" in note for note in report.notes)


def test_a_pattern_includes_weights_but_no_biases_or_norms(tmp_path):
    prefix = "model.layers.0.mlp.experts"
    tensors = {
        f"{prefix}.gate_up_proj": torch.ones(4, 64, 128),
        f"{prefix}.gate_up_proj_bias": torch.ones(4, 128),
        f"{prefix}.down_proj_bias": torch.ones(4, 64),
        f"{prefix}.norms.weight": torch.ones(4, 64),
        f"{prefix}.0.ln_1.weight": torch.ones(4, 64),
        f"{prefix}.0.up_proj.weight": torch.ones(64, 64),
    }
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    report = convert(tmp_path / "base", tmp_path / "bundle", include=["*experts*"])
    with plugins.sniff(tmp_path / "bundle").read(
        tmp_path / "bundle", plugins.ReadOptions()
    ) as model:
        quantized = {tensor.name for tensor in model.nf4_weights}
    assert quantized == {f"{prefix}.gate_up_proj", f"{prefix}.0.up_proj.weight"}
    assert report.quantized == 2

"""What the package writes, the minireader accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vectors import minireader

import loraformat


def _model(path: Path, dtype: str) -> Path:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(7)
    kind = getattr(torch, dtype)
    shapes = {
        "model.embed_tokens.weight": (32, 48),
        "model.norm.weight": (48,),
        "lm_head.weight": (32, 48),
    }
    for layer in range(2):
        shapes |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": (48, 48),
            f"model.layers.{layer}.mlp.up_proj.weight": (65, 48),
            f"model.layers.{layer}.input_layernorm.weight": (48,),
        }
    path.mkdir()
    tensors = {name: torch.randn(shape).to(kind) for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shard_limit", [2_000_000_000, 20_000, 1000])
def test_minireader_accepts_our_bundles(
    tmp_path: Path, dtype: str, double_quant: bool, shard_limit: int
) -> None:
    source = _model(tmp_path / "model", dtype)
    loraformat.convert(
        source, tmp_path / "bundle", double_quant=double_quant, max_shard_size=shard_limit
    )
    tensors, weights = minireader.verify(tmp_path / "bundle")
    encodings = {record["encoding"] for record in tensors.values()}
    assert encodings == {"dense", "nf4"}
    name = "model.layers.1.mlp.up_proj.weight"
    values = minireader.decode(tensors[name], weights[name])
    with loraformat.open_bundle(tmp_path / "bundle") as bundle:
        assert bundle.tensors[name].dequantize("F32").flatten().tolist() == values

"""The tables: names as gguf-py has them, both directions, what is refused; rows of transforms."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import transformers
from bases import MODELS, make_model
from loraformat_converters.gguf.architectures import (
    ARCHITECTURES,
    lora_module,
    lora_places,
    of_config,
    to_gguf,
    to_huggingface,
)
from loraformat_converters.gguf.architectures.transforms import (
    HeadOrder,
    Identity,
    MinusOne,
    PlusOne,
    Transpose,
)
from safetensors import safe_open

from loraformat.errors import InputError, UnsupportedError


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Return a function: config and shapes of a model that transformers wrote."""
    made = {}

    def make(name):
        if name not in made:
            path = make_model(name, tmp_path_factory.mktemp("tiny") / name)
            shapes = {}
            for file in path.glob("*.safetensors"):
                with safe_open(file, "pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118
                        shapes[key] = tuple(tensors.get_slice(key).get_shape())
            made[name] = json.loads((path / "config.json").read_bytes()), shapes
        return made[name]

    return make


@pytest.fixture(params=MODELS)
def any_model(request, model):
    return model(request.param)


def test_names_are_those_of_gguf_py(any_model):
    config, shapes = any_model
    architecture, values = of_config(config)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    theirs = gguf.get_tensor_name_map(kinds[architecture.name], values.layers)
    recipes = to_gguf(architecture, values, shapes)
    assert recipes.tensors
    for recipe in recipes.tensors:
        source = recipe.sources[0].removeprefix("language_model.")
        if len(recipe.sources) > 1:  # experts: gguf-py knows the stacked tensor's name
            source = source.replace("block_sparse_moe.experts.0.w", "feed_forward.experts.w")
            source = source.replace("experts.0.", "experts.")
            source = source.removeprefix("model.") if "feed_forward" in source else source
        assert theirs.get_name(source, try_suffixes=(".weight", ".bias")) == recipe.name


def test_names_come_back(any_model):
    config, shapes = any_model
    architecture, values = of_config(config)
    recipes = to_gguf(architecture, values, shapes)
    back = to_huggingface(architecture, values, {r.name: r.shape for r in recipes.tensors})
    found = {recipe.name: recipe.shape for recipe in back}
    wanted = {name: shape for name, shape in shapes.items() if name not in recipes.unused}
    assert found == {name.removeprefix("language_model."): wanted[name] for name in wanted}


@pytest.mark.parametrize("model_type", [t for r in ARCHITECTURES.values() for t in r.models])
def test_defaults_are_those_of_transformers(model_type):
    config = transformers.AutoConfig.for_model(model_type).get_text_config()
    theirs = {**config.to_dict(), "num_experts": getattr(config, "num_experts", None)}
    record, _ = of_config({"model_type": model_type})
    for key, value in record.defaults[model_type].items():
        assert theirs[key] == value, key


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_tensor_is_named(model, missing):
    config, shapes = model("llama")
    rest = {name: shape for name, shape in shapes.items() if name != missing}
    with pytest.raises(InputError, match=f"{missing} is missing"):
        to_gguf(*of_config(config), rest)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"hidden_size": 128}),
        ("llama", {"intermediate_size": 95}),
        ("llama", {"head_dim": 32}),
        ("llama", {"num_key_value_heads": 4}),
        ("gpt2", {"n_inner": None}),
        ("phi3", {"intermediate_size": 192}),
        ("mixtral", {"num_local_experts": 2}),
        ("qwen3_moe", {"moe_intermediate_size": 96}),
        ("bert", {"hidden_size": 32}),
    ],
)
def test_shapes_that_the_config_does_not_promise(model, name, change):
    config, shapes = model(name)
    with pytest.raises((InputError, UnsupportedError), match=r"hyperparameters say|no place"):
        to_gguf(*of_config({**config, **change}), shapes)


def test_a_head_that_is_promised_is_missed(model):
    config, shapes = model("llama")
    del (rest := dict(shapes))["lm_head.weight"]
    with pytest.raises(InputError, match=r"lm_head\.weight is missing"):
        to_gguf(*of_config(config), rest)


def test_a_strange_tensor_is_named(model):
    config, shapes = model("qwen3")
    strange = {**shapes, "model.layers.0.self_attn.o_proj.bias": (64,)}
    with pytest.raises(UnsupportedError, match=r"o_proj\.bias has no place in llama.cpp's qwen3"):
        to_gguf(*of_config(config), strange)


def test_a_strange_gguf_tensor_is_named(model):
    config, shapes = model("qwen3")
    found = of_config(config)
    names = {r.name: r.shape for r in to_gguf(*found, shapes).tensors}
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_sinks has no place"):
        to_huggingface(*found, {**names, "blk.0.attn_sinks": (4,)})


def test_a_fused_qkv_is_cut(model):
    """As llama.cpp's converter makes it with --fuse-qkv."""
    config, shapes = model("qwen2")
    found = of_config(config)
    names = {r.name: r.shape for r in to_gguf(*found, shapes).tensors}
    for suffix, rest in (("weight", (64,)), ("bias", ())):
        for kind in "qkv":
            del names[f"blk.0.attn_{kind}.{suffix}"]
        names[f"blk.0.attn_qkv.{suffix}"] = (64 + 32 + 32, *rest)
    back = {r.name: r for r in to_huggingface(*found, names)}
    assert {name: r.shape for name, r in back.items()} == shapes
    (part,) = back["model.layers.0.self_attn.v_proj.weight"].parts
    assert (part.source, part.start, part.shape) == ("blk.0.attn_qkv.weight", 96, (32, 64))


def test_experts_in_one_parameter(model):
    """As transformers 5 holds them in memory, and as merged or bundled models may store them."""
    config, shapes = model("mixtral")
    found = of_config(config)
    fused = {name: shape for name, shape in shapes.items() if "block_sparse_moe" not in name}
    for layer in range(2):
        moe = f"model.layers.{layer}.mlp"
        fused[f"{moe}.gate.weight"] = (4, 64)
        fused[f"{moe}.experts.gate_up_proj"] = (4, 192, 64)
        fused[f"{moe}.experts.down_proj"] = (4, 64, 96)
    one = {r.name: r.shape for r in to_gguf(*found, fused).tensors}
    other = {r.name: r.shape for r in to_gguf(*found, shapes).tensors}
    assert one == other
    up = next(r for r in to_gguf(*found, fused).tensors if r.name == "blk.1.ffn_up_exps.weight")
    assert [(part.expert, part.start) for part in up.parts] == [(i, 96) for i in range(4)]


REFUSED = {
    "qwen3_moe": [({"norm_topk_prob": False}, "add to 1"), ({"mlp_only_layers": [0]}, "every")],
    "gemma2": [({"query_pre_attn_scalar": 256}, "computes with 24")],
    "gemma3_text": [({"query_pre_attn_scalar": 256}, "computes with 24")],
    "llama": [
        ({"hidden_act": "gelu"}, "silu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "0.5"),
    ],
    "qwen2": [({"rope_scaling": {"type": "llama3"}, "rope_parameters": None}, "llama3")],
    "qwen2-yarn": [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "beta_fast")
    ],
    "gpt2": [({"scale_attn_by_inverse_layer_idx": True}, "all layers alike")],
}


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [(name, *case) for name, cases in REFUSED.items() for case in cases],
)
def test_what_llama_cpp_would_compute_differently_is_refused(model, name, change, reason):
    config, _ = model(name)
    architecture, values = of_config({**config, **change})
    with pytest.raises(UnsupportedError, match=reason):
        architecture.metadata(values)


@pytest.mark.parametrize("value", [0, -1, 2**40, "4", True, 1.5, [4]])
def test_impossible_numbers_are_refused(model, value):
    config, _ = model("llama")
    architecture, values = of_config({**config, "num_attention_heads": value})
    with pytest.raises(InputError, match="num_attention_heads"):
        architecture.metadata(values)


def test_unknown_model_types_are_refused():
    with pytest.raises(UnsupportedError, match="mamba"):
        of_config({"model_type": "mamba"})


def test_head_order_is_that_of_llama_cpp():
    """``LlamaModel.permute`` of its converter, written out."""
    weight = np.arange(24.0)[:, None] * np.ones((24, 3))
    theirs = weight.reshape(2, 2, 6, 3).swapaxes(1, 2).reshape(24, 3)
    order = HeadOrder(2)
    assert np.array_equal(order.rows(weight, 0, 24), theirs)
    assert np.array_equal(order.inverse.rows(theirs, 0, 24), weight)
    assert np.array_equal(order.rows(weight, 5, 9), theirs[5:9])


@pytest.mark.parametrize("transform", [Identity(), PlusOne(), MinusOne(), Transpose()])
def test_transforms_are_undone(transform):
    weight = np.random.default_rng(0).standard_normal((8, 8), np.float32)
    there = np.concatenate([transform.rows(weight, start, start + 2) for start in range(0, 8, 2)])
    back = transform.inverse.rows(there, 0, 8)
    np.testing.assert_allclose(back, weight, rtol=0, atol=3e-7)


def test_lora_places(model):
    config, _ = model("llama")
    found = of_config(config)
    (query,) = lora_places(*found, "model.layers.1.self_attn.q_proj")
    assert (query.tensor, query.rows) == ("blk.1.attn_q.weight", HeadOrder(4))
    b = np.random.default_rng(0).standard_normal((96, 3))
    assert np.array_equal(query.to_huggingface(query.to_gguf(b)), b)
    assert lora_places(*found, "lm_head")[0].tensor == "output.weight"
    assert lora_places(*found, "model.embed_tokens")[0].embedding
    assert lora_places(*found, "model.layers.2.self_attn.q_proj") == []
    assert lora_places(*found, "model.layers.0.self_attn.strange") == []
    tied = of_config({**config, "tie_word_embeddings": True})
    assert lora_places(*tied, "lm_head") == []


def test_lora_places_of_experts(model):
    config, _ = model("mixtral")
    found = of_config(config)
    gate, up = lora_places(*found, "model.layers.0.mlp.experts.gate_up_proj")
    assert (gate.tensor, gate.half, up.half) == ("blk.0.ffn_gate_exps.weight", 0, 1)
    assert gate.experts == 4
    b = np.random.default_rng(0).standard_normal((4, 192, 2))
    assert np.array_equal(np.concatenate([gate.to_gguf(b), up.to_gguf(b)], 1), b)
    (one,) = lora_places(*found, "model.layers.0.block_sparse_moe.experts.3.w2")
    assert (one.tensor, one.expert) == ("blk.0.ffn_down_exps.weight", 3)
    (router,) = lora_places(*found, "model.layers.0.mlp.gate")
    assert router.tensor == "blk.0.ffn_gate_inp.weight"


def test_lora_modules_come_back(any_model):
    config, shapes = any_model
    found = of_config(config)
    for recipe in to_gguf(*found, shapes).tensors:
        if not recipe.name.endswith(".weight") or len(recipe.shape) < 2:
            continue
        place = lora_module(*found, recipe.name)
        assert recipe.name in [p.tensor for p in lora_places(*found, place.module)]


def test_conv1d_needs_no_transpose_in_lora(model):
    config, _ = model("gpt2")
    (place,) = lora_places(*of_config(config), "transformer.h.0.attn.c_attn")
    assert (place.tensor, place.rows) == ("blk.0.attn_qkv.weight", Identity())

"""Bases in: transformers computes with what we read what llama.cpp computes with the file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from bases import MODELS, SMALL, apart, by_llama_cpp, by_transformers, make_base, tolerance
from ggml_oracle import quantize
from llama_runtime import log_probabilities
from loraformat_converters.gguf.container.reader import open_gguf
from loraformat_converters.gguf.container.types import GGMLType, ValueType
from loraformat_converters.gguf.container.values import GGUFValue
from loraformat_converters.gguf.quantization.blocks import dequantize
from peer_files import tiny_llama, write_peer_base
from rewriting import rewrite
from safetensors.torch import load_file

from loraformat.errors import InputError, UnsupportedError, UsageError
from loraformat.ops.convert.convert import convert
from loraformat.ops.info.model import info


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Return a function: a tiny model, and its GGUF file in float32."""
    known = {}

    def make(name):
        if name not in known:
            source = make_base(name, tmp_path_factory.mktemp("base") / name)
            convert(source, source.with_suffix(".gguf"), dtype="f32")
            known[name] = source, source.with_suffix(".gguf")
        return known[name]

    return make


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The small real model in float32: its rows fill the blocks of K-quants."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    convert(SMALL, path, dtype="f32")
    return path


BLOCK_PROMPTS = [[0, *range(100, 130)], [0, 500, 900, 1200]]


@pytest.fixture(scope="session")
def original():
    """What the small real model says before it is quantized."""
    return by_transformers(SMALL, "llama", BLOCK_PROMPTS)


def text_name(name):
    return "gemma3_text" if name == "gemma3" else name


@pytest.mark.parametrize("name", MODELS)
def test_without_any_help_of_ours(made, name, tmp_path):
    """As llama.cpp's converter would have written it: the config is inferred."""
    _, path = made(name)
    rewrite(path, tmp_path / "model.gguf", drop=("loraformat.",))
    convert(tmp_path / "model.gguf", tmp_path / "dense", to_format="safetensors")
    ours = by_transformers(tmp_path / "dense", text_name(name))
    assert apart(by_llama_cpp(path, name), ours) < tolerance(name)


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_is_bit_exact(made, name, tmp_path):
    source, path = made(name)
    convert(path, tmp_path / "dense", to_format="safetensors")
    ours, theirs = load_file(tmp_path / "dense" / "model.safetensors"), load_file(
        source / "model.safetensors"
    )  # fmt: skip
    theirs = {key.removeprefix("language_model."): value for key, value in theirs.items()}
    for key, value in ours.items():
        if "gemma" in name and "norm" in key:  # 1 + w has been rounded to float32
            torch.testing.assert_close(value, theirs.pop(key), rtol=0, atol=3e-7)
        else:
            assert torch.equal(value, theirs.pop(key)), key
    assert not [key for key in theirs if "vision" not in key and "multi_modal" not in key
                and "pooler" not in key]  # fmt: skip
    if name != "gemma3":
        for file in ("config.json", "generation_config.json"):
            if (source / file).exists():
                assert (tmp_path / "dense" / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2"])
def test_gguf_to_safetensors_to_gguf(made, name, dtype, tmp_path):
    """Float types give the same bytes; dequantized numbers quantize to themselves, nearly."""
    source, _ = made(name)
    convert(source, tmp_path / "one.gguf", dtype=dtype)
    convert(tmp_path / "one.gguf", tmp_path / "dense", to_format="safetensors", dtype="f32")
    convert(tmp_path / "dense", tmp_path / "other.gguf", dtype=dtype)
    with open_gguf(tmp_path / "one.gguf") as one, open_gguf(tmp_path / "other.gguf") as other:
        assert list(one.tensors) == list(other.tensors)
        for key, tensor in one.tensors.items():
            if tensor.type.name in ("F32", "F16", "BF16"):
                assert one.load(key) == other.load(key), key
            else:
                a, b = (
                    dequantize(file.load(key), tensor.type, tensor.shape) for file in (one, other)
                )
                assert np.linalg.norm(a - b) < 2e-3 * np.linalg.norm(a), key


@pytest.mark.parametrize(
    "kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q8_0", "Q4_0"]
)
def test_block_types(small, original, kind, tmp_path):
    """Exactly ggml's numbers; in llama.cpp only its rounding of activations differs."""
    path = rewrite(small, tmp_path / "model.gguf", kind=GGMLType[kind])
    convert(path, tmp_path / "dense", to_format="safetensors", dtype="f32")
    ours = by_transformers(tmp_path / "dense", "llama", BLOCK_PROMPTS)
    theirs = log_probabilities(path, BLOCK_PROMPTS)
    divergence = [float((np.exp(p) * (p - q)).sum()) for p, q in zip(ours, theirs, strict=True)]
    assert max(divergence) < 1e-2
    assert apart(ours, original) > 1e-2, "the weights are really quantized"
    convert(path, tmp_path / "again.gguf", dtype="f32")
    assert apart(ours, list(log_probabilities(tmp_path / "again.gguf", BLOCK_PROMPTS))) < 5e-5


def test_info_says_what_is_stored_and_not_what_it_becomes(made, tmp_path):
    source, _ = made("mixtral")
    convert(source, tmp_path / "model.gguf", dtype="q4_0")
    summary = info(tmp_path / "model.gguf")
    with open_gguf(tmp_path / "model.gguf") as file:
        stored = list(file.tensors.values())
    assert summary.weight_bytes == sum(tensor.nbytes for tensor in stored)
    assert summary.bits_per_weight < 10
    kinds = {tensor.type.name for tensor in stored}
    assert set(summary.dtypes) == kinds == {"Q4_0", "Q8_0", "F32"}
    experts = [t for t in summary.tensors if ".experts." in t.name]
    assert {t.encoding for t in experts} == {"q4_0"}
    assert {t.dtype for t in experts} == {"BF16"}


def test_block_types_are_rounded_where_that_is_asked_for(small, tmp_path):
    path = rewrite(small, tmp_path / "model.gguf", kind=GGMLType.Q6_K, drop=("loraformat.",))
    convert(path, tmp_path / "dense", to_format="safetensors", dtype="bf16")
    convert(path, tmp_path / "exact", to_format="safetensors")
    rounded, exact = (
        load_file(tmp_path / name / "model.safetensors") for name in ("dense", "exact")
    )
    for key, value in rounded.items():
        assert value.dtype == torch.bfloat16 and exact[key].dtype == torch.float32
        assert torch.equal(value, exact[key].to(value.dtype))
    assert json.loads((tmp_path / "dense" / "config.json").read_bytes())["dtype"] == "bfloat16"


def test_experts_of_block_types(made, tmp_path):
    source, path = made("mixtral")
    quantized = rewrite(path, tmp_path / "model.gguf", kind=GGMLType.Q8_0)
    convert(quantized, tmp_path / "dense", to_format="safetensors", dtype="f32")
    ours = load_file(tmp_path / "dense" / "model.safetensors")
    for key, value in load_file(source / "model.safetensors").items():
        if ".experts." in key:
            stored = memoryview(quantize(value.numpy(), GGMLType.Q8_0))
            wanted = dequantize(stored, GGMLType.Q8_0, tuple(value.shape))
            assert np.array_equal(ours[key].numpy(), wanted), key


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2", "gemma2"])
def test_gguf_to_bundle_to_gguf(made, name, tmp_path):
    """What the bundle's NF4 codes say is what llama.cpp computes with in the end."""
    source, path = made(name)
    report = convert(path, tmp_path / "bundle")
    assert report.quantized
    convert(source, tmp_path / "direct")
    convert(tmp_path / "bundle", tmp_path / "back.gguf", dtype="f32")
    convert(tmp_path / "direct", tmp_path / "direct.gguf", dtype="f32")
    with open_gguf(tmp_path / "back.gguf") as one, open_gguf(tmp_path / "direct.gguf") as other:
        for key in one.tensors:
            if "norm" not in key:
                assert one.load(key) == other.load(key), key
    convert(tmp_path / "bundle", tmp_path / "dense", to_format="safetensors", dtype="f32")
    ours = by_transformers(tmp_path / "dense", name)
    assert apart(ours, by_llama_cpp(tmp_path / "back.gguf", name)) < tolerance(name)


def test_a_file_of_gguf_py(tmp_path):
    """Nothing in it is ours."""
    model = tiny_llama()
    path = write_peer_base(tmp_path / "peer.gguf", model)
    convert(path, tmp_path / "dense", to_format="safetensors")
    for key, value in load_file(tmp_path / "dense" / "model.safetensors").items():
        assert torch.equal(value, model.state_dict()[key]), key
    config = transformers.AutoConfig.from_pretrained(tmp_path / "dense")
    for key in ("hidden_size", "num_key_value_heads", "vocab_size", "rms_norm_eps"):
        assert getattr(config, key) == getattr(model.config, key)


def test_the_tokenizer_comes_back(small, tmp_path):
    convert(small, tmp_path / "dense", to_format="safetensors")
    text = "def f(x):\n\treturn x['ключ'] + 12345  # 🙂 漢字\n"
    ours, theirs = (
        transformers.AutoTokenizer.from_pretrained(path) for path in (tmp_path / "dense", SMALL)
    )
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.eos_token == theirs.eos_token


def test_edited_metadata_win_over_the_stored_config(made, tmp_path):
    _, path = made("llama")
    changed = {"llama__rope__freq_base": GGUFValue.of(ValueType.FLOAT32, 5e5)}
    rewrite(path, tmp_path / "model.gguf", **changed)
    convert(tmp_path / "model.gguf", tmp_path / "dense", to_format="safetensors")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "dense")
    assert config.rope_parameters["rope_theta"] == 5e5
    ours = by_transformers(tmp_path / "dense", "llama")
    assert apart(ours, by_llama_cpp(tmp_path / "model.gguf", "llama")) < 1e-5


def test_a_config_that_is_named_is_used_and_checked(made, tmp_path):
    source, path = made("llama-3.1")
    bare = rewrite(path, tmp_path / "model.gguf", drop=("loraformat.",))
    convert(bare, tmp_path / "dense", to_format="safetensors", config=source / "config.json")
    assert (tmp_path / "dense" / "config.json").read_bytes() == (
        source / "config.json"
    ).read_bytes()
    wrong = json.loads((source / "config.json").read_bytes())
    for change, reason in [
        ({"num_key_value_heads": 4}, "head_count_kv 4, and the file 2"),
        ({"vocab_size": 4096}, "vocab_size is 4096"),
        ({"model_type": "qwen2"}, "architecture qwen2"),
        ({"rope_parameters": {"rope_theta": 1e5}}, "rope_freqs"),
    ]:
        (tmp_path / "wrong.json").write_text(json.dumps({**wrong, **change}), encoding="utf-8")
        with pytest.raises(InputError, match=reason):
            convert(bare, tmp_path / "no", to_format="safetensors",
                    config=tmp_path / "wrong.json")  # fmt: skip


def test_rope_factors_of_an_unknown_rule_need_a_config(made, tmp_path):
    source = make_base("llama-3.1", tmp_path / "model")
    config = json.loads((source / "config.json").read_bytes())
    config["rope_parameters"]["original_max_position_embeddings"] = 100
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    convert(source, tmp_path / "model.gguf", dtype="f32")
    convert(tmp_path / "model.gguf", tmp_path / "dense", to_format="safetensors")
    bare = rewrite(tmp_path / "model.gguf", tmp_path / "bare.gguf", drop=("loraformat.",))
    with pytest.raises(InputError, match="by which rule") as caught:
        convert(bare, tmp_path / "no", to_format="safetensors")
    assert "--config" in str(caught.value.hint)
    convert(bare, tmp_path / "yes", to_format="safetensors", config=source / "config.json")
    ours = by_transformers(tmp_path / "yes", "llama")
    assert apart(ours, by_llama_cpp(bare, "llama")) < 1e-5


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_the_attention_scale_of_gemma_27b(name, tmp_path):
    """It is in no key: llama.cpp knows that model by its number of layers, and so do we."""
    layers = {"gemma2": 46, "gemma3_text": 62}[name]
    large = dict(num_hidden_layers=layers, hidden_size=64, query_pre_attn_scalar=16)
    assert MODELS[name]["head_dim"] != 16
    convert(make_base(name, tmp_path / "base", **large), tmp_path / "model.gguf", dtype="f32")
    bare = rewrite(tmp_path / "model.gguf", tmp_path / "bare.gguf", drop=("loraformat.",))
    convert(bare, tmp_path / "dense", to_format="safetensors")
    config = json.loads((tmp_path / "dense" / "config.json").read_bytes())
    assert config["query_pre_attn_scalar"] == 16
    theirs = by_llama_cpp(bare, name)
    right = apart(theirs, by_transformers(tmp_path / "dense", name))
    config["query_pre_attn_scalar"] = MODELS[name]["head_dim"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    wrong = apart(theirs, by_transformers(tmp_path / "dense", name))
    # llama.cpp's GELU of float16, forty times and more, is not what differs with the other scale.
    assert right < min(0.2, wrong / 5)


def test_a_config_is_for_gguf_only(made, tmp_path):
    source, _ = made("llama")
    with pytest.raises(UsageError, match="--config is for GGUF"):
        convert(source, tmp_path / "bundle", config=source / "config.json")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("llama.block_count", GGUFValue.of(ValueType.UINT32, 3), r"blk\.2\..*is missing"),
        ("llama.block_count", GGUFValue.of(ValueType.UINT32, 2**31), "block_count is"),
        ("llama.attention.head_count", GGUFValue.of(ValueType.UINT32, 0), "head_count is 0"),
        ("llama.attention.head_count", GGUFValue.of(ValueType.STRING, "4"), "wanted an integer"),
        ("llama.expert_count", GGUFValue.of(ValueType.UINT32, 2**30), "expert_count is"),
        ("llama.rope.freq_base", GGUFValue.of(ValueType.FLOAT32, -1.0), "wanted more than 0"),
        ("llama.attention.key_length", GGUFValue.of(ValueType.UINT32, 7), "7"),
        ("general.architecture", GGUFValue.of(ValueType.STRING, "mamba"), "mamba"),
        ("general.type", GGUFValue.of(ValueType.STRING, "adapter"), "adapter"),
    ],
)
def test_damaged_metadata(made, key, value, reason, tmp_path):
    _, path = made("llama")
    rewrite(path, tmp_path / "model.gguf", **{key.replace(".", "__"): value})
    with pytest.raises((InputError, UnsupportedError), match=reason):
        convert(tmp_path / "model.gguf", tmp_path / "no", from_format="gguf")


def test_a_missing_tensor(made, tmp_path):
    _, path = made("llama")
    rewrite(path, tmp_path / "model.gguf", drop=("blk.1.ffn_up",))
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight is missing"):
        convert(tmp_path / "model.gguf", tmp_path / "no")


def test_on_the_command_line(made, command, tmp_path):
    source, path = made("qwen3")
    done = command("info", path)
    assert done.returncode == 0, done.stderr
    done = command("convert", path, "bundle", "--config", source / "config.json", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source_format"] == "gguf"
    assert command("verify", "bundle").returncode == 0

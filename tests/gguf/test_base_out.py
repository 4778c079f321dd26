"""Bases out: llama.cpp computes with our file what transformers computes with the model."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from bases import (
    MODELS,
    SMALL,
    apart,
    by_llama_cpp,
    by_transformers,
    make_base,
    tolerance,
)
from fused_experts import fuse
from llama_runtime import log_probabilities, tokenize
from loraformat_converters.gguf.container.reader import open_gguf

from loraformat.errors import InputError, UnsupportedError, UsageError
from loraformat.ops.convert.convert import convert


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Return a function: the directory of a tiny model."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = make_base(name, tmp_path_factory.mktemp("base") / name)
        return made[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(base, name, tmp_path):
    convert(base(name), tmp_path / "model.gguf", dtype="f32")
    theirs, ours = by_llama_cpp(tmp_path / "model.gguf", name), by_transformers(base(name), name)
    assert apart(theirs, ours) < tolerance(name)


@pytest.mark.parametrize(("dtype", "most"), [("f16", 2e-2), ("bf16", 0.1), ("q8_0", 0.3)])
def test_smaller_types_come_close(base, dtype, most, tmp_path):
    convert(base("llama"), tmp_path / "model.gguf", dtype=dtype)
    difference = apart(
        by_llama_cpp(tmp_path / "model.gguf", "llama"), by_transformers(base("llama"), "llama")
    )
    assert 1e-5 < difference < most


def test_the_default_is_f16(base, tmp_path):
    report = convert(base("llama"), tmp_path / "model.gguf")
    with open_gguf(tmp_path / "model.gguf") as file:
        assert file.integer("general.file_type") == 1
        kinds = {name: tensor.type.name for name, tensor in file.tensors.items()}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "F16"
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert 0 < report.errors_by_kind["q_proj"] < 5e-4


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("mixtral", ["blk.0.ffn_gate_inp.weight"]),
        ("gpt2", ["position_embd.weight", "blk.0.attn_qkv.bias"]),
        ("bert", ["token_types.weight", "position_embd.weight", "token_embd_norm.weight"]),
    ],
)
def test_small_tensors_are_always_f32(base, name, tensors, tmp_path):
    convert(base(name), tmp_path / "model.gguf", dtype="q8_0")
    with open_gguf(tmp_path / "model.gguf") as file:
        assert [file.tensors[tensor].type.name for tensor in tensors] == ["F32"] * len(tensors)


@pytest.mark.parametrize("dtype", ["q5_1", "q5_0", "q4_1", "q4_0"])
def test_few_bits_are_warned_of_with_the_error(base, dtype, tmp_path):
    report = convert(base("llama-tied"), tmp_path / "model.gguf", dtype=dtype)
    (note,) = [note for note in report.notes if note.startswith(dtype.upper())]
    assert "measured" in note
    assert 0.02 < report.errors_by_kind["up_proj"] < 0.12
    with open_gguf(tmp_path / "model.gguf") as file:
        assert file.tensors["token_embd.weight"].type.name == "Q8_0", "it is the head, too"
        assert file.tensors["blk.1.ffn_up.weight"].type.name == dtype.upper()
    assert report.bits_per_weight < 12  # much of a tiny model is its vocabulary
    log_probabilities(tmp_path / "model.gguf", [[1, 2, 3]])


def test_rows_that_fill_no_blocks_are_f16_and_said_to_be(base, tmp_path):
    source = make_base("llama-odd", tmp_path / "odd")
    report = convert(source, tmp_path / "model.gguf", dtype="q8_0")
    assert any("2 weights are F16" in note for note in report.notes)
    with open_gguf(tmp_path / "model.gguf") as file:
        assert file.tensors["blk.0.ffn_down.weight"].type.name == "F16"
    log_probabilities(tmp_path / "model.gguf", [[1, 2, 3]])


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_a_bundle_gives_what_its_dense_form_gives(base, name, dtype, tmp_path):
    convert(base(name), tmp_path / "bundle")
    convert(tmp_path / "bundle", tmp_path / "dense", to_format="safetensors", dtype="f32")
    convert(tmp_path / "bundle", tmp_path / "one.gguf", dtype=dtype)
    convert(tmp_path / "dense", tmp_path / "other.gguf", dtype=dtype)
    with open_gguf(tmp_path / "one.gguf") as one, open_gguf(tmp_path / "other.gguf") as other:
        assert list(one.tensors) == list(other.tensors)
        for tensor in one.tensors:
            assert one.load(tensor) == other.load(tensor), tensor


def test_a_bundle_leaves_its_fingerprint_and_source(base, tmp_path):
    from loraformat.ops.opening.model import fingerprint_of, open_model

    convert(base("llama"), tmp_path / "bundle")
    convert(tmp_path / "bundle", tmp_path / "model.gguf")
    with open_gguf(tmp_path / "model.gguf") as file, open_model(tmp_path / "bundle") as bundle:
        assert file.text("loraformat.base.fingerprint") == fingerprint_of(bundle)
        assert file.text("loraformat.source.format") == "loraformat"
        assert json.loads(file.text("loraformat.config"))["model_type"] == "llama"


UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", ["f16", "q8_0", "q4_0"])
def test_the_loss_is_against_the_values_of_nf4(base, dtype, tmp_path):
    from loraformat_converters.gguf.quantization.blocks import dequantize

    from loraformat.ops.opening.model import open_model

    convert(base("qwen2"), tmp_path / "bundle")
    report = convert(tmp_path / "bundle", tmp_path / "model.gguf", dtype=dtype)
    with (
        open_gguf(tmp_path / "model.gguf") as file,
        open_model(tmp_path / "bundle") as bundle,
    ):
        stored = file.tensors["blk.0.ffn_up.weight"]
        found = dequantize(file.load(stored.name), stored.type, stored.shape)
        nf4, other = (bundle.tensors[UP.format(layer)].dequantize("F32") for layer in (0, 1))
        stored = file.tensors["blk.1.ffn_up.weight"]
        found_other = dequantize(file.load(stored.name), stored.type, stored.shape)
    pairs = (np.float64([a, b]) for a, b in ((found, nf4), (found_other, other)))
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]
    wanted = np.sqrt(np.mean(np.square(errors)))
    assert report.errors_by_kind["up_proj"] == pytest.approx(float(wanted), rel=0.01)


def test_of_a_bundle_with_adapters_the_base_alone_is_written_and_that_is_said(base, tmp_path):
    import peft
    import torch
    import transformers
    from bases import run

    from loraformat.ops.merge.merge import merge

    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(base("llama"), dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    convert(base("llama"), tmp_path / "bundle")
    convert(tmp_path / "bundle", tmp_path / "bare.gguf")
    place = tmp_path / "bundle" / "adapters" / "a"
    convert(tmp_path / "adapter", place)
    report = convert(tmp_path / "bundle", tmp_path / "base.gguf")
    assert (tmp_path / "base.gguf").read_bytes() == (tmp_path / "bare.gguf").read_bytes()
    assert "adapter a" in report.lost
    assert any("only the base" in note and "loraformat merge" in note for note in report.notes)
    with pytest.raises(UnsupportedError, match="adapter a"):
        convert(tmp_path / "bundle", tmp_path / "strict.gguf", strict=True)
    merge(tmp_path / "bundle", [place], tmp_path / "merged.gguf", dtype="f32")
    convert(tmp_path / "bundle", tmp_path / "dense", to_format="safetensors", dtype="f32")
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, attn_implementation="eager"
    )
    wanted = run(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval(), "llama")
    assert apart(by_llama_cpp(tmp_path / "merged.gguf", "llama"), wanted) < 1e-5


def test_experts_in_one_parameter_give_the_same_file(base, tmp_path):
    """The form that transformers 5 has in memory."""
    from safetensors.torch import load_file, save_file

    fused = shutil.copytree(base("mixtral"), tmp_path / "fused")
    save_file(fuse(load_file(fused / "model.safetensors")),
              fused / "model.safetensors")  # fmt: skip
    convert(base("mixtral"), tmp_path / "one.gguf", dtype="f32")
    convert(fused, tmp_path / "other.gguf", dtype="f32")
    with open_gguf(tmp_path / "one.gguf") as one, open_gguf(tmp_path / "other.gguf") as other:
        assert {n: bytes(one.load(n)) for n in one.tensors} == {
            n: bytes(other.load(n)) for n in other.tensors
        }


def test_the_same_model_gives_the_same_bytes(base, tmp_path):
    for name in ("one.gguf", "other.gguf"):
        convert(base("qwen2"), tmp_path / name, dtype="q4_0")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()


def test_the_small_real_model(tmp_path):
    convert(SMALL, tmp_path / "small.gguf", dtype="f32")
    prompts = [[0, *range(100, 130)], [0, 500, 900, 1200]]
    theirs = log_probabilities(tmp_path / "small.gguf", prompts)
    # float32 gives six digits, and what is trained is surer than what is random: up to -24
    assert apart(list(theirs), by_transformers(SMALL, "llama", prompts)) < 3e-5
    text = "def add(a, b):\n    return a + b\n"
    import transformers

    wanted = transformers.AutoTokenizer.from_pretrained(SMALL)(text)["input_ids"]
    assert tokenize(tmp_path / "small.gguf", [text], add_special=True) == [wanted]


def test_a_name_with_phi3_does_not_stop_llama_cpp(base, tmp_path):
    source = shutil.copytree(base("phi3"), tmp_path / "My-Phi-3-mini")
    convert(source, tmp_path / "model.gguf")
    with open_gguf(tmp_path / "model.gguf") as file:
        assert file.text("general.name") == "My-phi_3-mini"
    log_probabilities(tmp_path / "model.gguf", [[1, 2]])


def test_sliding_windows_that_llama_cpp_lacks_are_named(base, tmp_path):
    source = shutil.copytree(base("mistral"), tmp_path / "mistral")
    edit(source, sliding_window=16)
    report = convert(source, tmp_path / "model.gguf")
    assert any("last 16 tokens" in note for note in report.notes)


def edit(source, **changes):
    config = json.loads((source / "config.json").read_bytes())
    (source / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"model_type": "mamba"}, UnsupportedError, "mamba"),
        ({"vocab_size": 2000}, InputError, "2048 rows"),
        ({"num_hidden_layers": 3}, InputError, r"layers\.2\..* is missing"),
        ({"num_hidden_layers": 1}, UnsupportedError, r"layers\.1\..* has no place"),
        ({"num_attention_heads": 5}, InputError, "for 5 heads"),
        ({"rope_scaling": {"type": "dynamic"}, "rope_parameters": None}, UnsupportedError, "dyna"),
    ],
)
def test_what_cannot_be_written_is_refused(base, change, error, reason, tmp_path):
    source = shutil.copytree(base("llama"), tmp_path / "model")
    edit(source, **change)
    with pytest.raises(error, match=reason):
        convert(source, tmp_path / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_model_without_a_tokenizer_is_refused(base, tmp_path):
    source = shutil.copytree(base("llama"), tmp_path / "model")
    (source / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedError, match=r"tokenizer\.json"):
        convert(source, tmp_path / "model.gguf")


def test_numbers_beyond_float16_are_refused(base, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(base("llama"), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.tensor(1e5)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"up_proj\.weight holds 100000\.0"):
        convert(source, tmp_path / "model.gguf")
    convert(source, tmp_path / "model.gguf", dtype="bf16")


def test_options_of_other_formats_are_refused(base, tmp_path):
    with pytest.raises(UsageError, match="llama-quantize writes"):
        convert(base("llama"), tmp_path / "model.gguf", dtype="q2_k")
    with pytest.raises(UsageError, match="q8_0"):
        convert(base("llama"), tmp_path / "bundle", dtype="q8_0")
    with pytest.raises(UsageError, match="--block-size"):
        convert(base("llama"), tmp_path / "model.gguf", block_size=64)


def test_a_suffix_in_capitals_is_one(base, tmp_path):
    convert(base("llama"), tmp_path / "MODEL.GGUF")
    with open_gguf(tmp_path / "MODEL.GGUF") as file:
        assert file.text("general.name") == "llama"


def test_a_pre_tokenizer_is_for_gguf_files_only(base, tmp_path):
    with pytest.raises(UsageError, match="--pre llama-bpe is for GGUF files"):
        convert(base("llama"), tmp_path / "bundle", pre="llama-bpe")
    assert not list(tmp_path.iterdir())


def test_on_the_command_line(base, command, tmp_path):
    done = command("convert", base("llama"), "model.gguf", "--dtype", "q8_0", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["target_format"] == "gguf"
    done = command("convert", base("llama"), "other.gguf", "--pre", "llama-bpe")
    assert done.returncode == 0, done.stderr
    with open_gguf(tmp_path / "other.gguf") as file:
        assert file.text("tokenizer.ggml.pre") == "llama-bpe"
    assert np.isfinite(log_probabilities(tmp_path / "other.gguf", [[1]])).all()

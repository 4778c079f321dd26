"""GGUF adapters: llama.cpp computes with ours what PEFT computes, or the adapter is refused."""

from __future__ import annotations

import shutil

import numpy as np
import peft
import pytest
import torch
from bases import (
    PROMPTS,
    apart,
    auto_class,
    make_base,
    run,
    tolerance,
)
from llama_runtime import embeddings, log_probabilities
from loraformat_converters.gguf.container.reader import open_gguf
from peer_files import write_peer_lora
from safetensors.torch import load_file, save_file

from loraformat.errors import InputError, UnsupportedError, UsageError
from loraformat.ops.convert.convert import convert
from loraformat.ops.info.model import info
from loraformat.ops.opening.adapter import open_adapter
from loraformat.ops.opening.model import open_model
from loraformat.ops.verify import verify
from tests.adapters.expert_adapters import (
    MIXTRAL,
    QWEN,
    named_stacks,
    one_by_one,
    with_shared_factors,
)
from tests.tiny_models import model_type
from tests.torch_tensors import numbers

#: Modules of each model type whose deltas are tested, where "all-linear" is not what is meant.
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "key", "value", "dense"],
}
EXPERTS = {
    "mixtral": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "qwen3_moe": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
ARCHITECTURES = [
    "llama", "llama-tied", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2",
    "gemma3_text", "phi3", "gpt2", "bert",
]  # fmt: skip


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Return a function: the directory of a tiny model, and its GGUF file."""
    made = {}

    def make(name):
        if name not in made:
            directory = tmp_path_factory.mktemp("base")
            make_base(name, directory / name)
            convert(directory / name, directory / "model.gguf", dtype="f32")
            made[name] = directory / name, directory / "model.gguf"
        return made[name]

    return make


def model_of(path, name):
    return (
        auto_class(name)
        .from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        .eval()
    )


def train(path, name, target, seed=1, **options):
    """Write a PEFT adapter with factors that matter, and return what PEFT computes with it."""
    options.setdefault("r", 4)
    options.setdefault("lora_alpha", 6)
    if "target_modules" not in options:
        options["target_modules"] = TARGETS.get(model_type(name), "all-linear")
    if name == "bert":
        options["exclude_modules"] = ["pooler.dense"]
    else:
        options.setdefault("task_type", "CAUSAL_LM")
    torch.manual_seed(seed)
    model = peft.get_peft_model(model_of(path, name), peft.LoraConfig(**options))
    random = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            values = torch.randn(parameter.shape, generator=random) * 0.05
            parameter.data = values if "lora_" in key else parameter.data + values
    model.save_pretrained(target)
    return run(model.eval(), name)


def by_llama_cpp(name, gguf, adapters):
    if name == "bert":
        return embeddings(gguf, PROMPTS, adapters)
    return list(log_probabilities(gguf, PROMPTS, adapters))


def plain(name, gguf):
    return by_llama_cpp(name, gguf, [])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_llama_cpp_computes_what_peft_computes(base, name, tmp_path):
    path, gguf = base(name)
    options = {"target_parameters": EXPERTS[name]} if name in EXPERTS else {}
    wanted = train(path, name, tmp_path / "adapter", **options)
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=path)
    found = by_llama_cpp(name, gguf, [(tmp_path / "lora.gguf", 1.0)])
    assert apart(found, wanted) < tolerance(name)
    assert apart(plain(name, gguf), wanted) > 20 * tolerance(name), "the adapter must matter"


@pytest.mark.parametrize("source", ["config", "bundle", "gguf"])
def test_every_kind_of_base_tells_what_is_needed(base, source, tmp_path):
    path, gguf = base("llama")
    wanted = train(path, "llama", tmp_path / "adapter")
    given = gguf
    if source == "config":
        given = tmp_path / "config-only"
        given.mkdir()
        (given / "config.json").write_bytes((path / "config.json").read_bytes())
    elif source == "bundle":
        given = tmp_path / "bundle"
        convert(path, given)
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=given)
    found = by_llama_cpp("llama", gguf, [(tmp_path / "lora.gguf", 1.0)])
    assert apart(found, wanted) < tolerance("llama")


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 32, "layers.1.mlp.up_proj": 1}},
        {"rank_pattern": {"k_proj": 2, "down_proj": 8}},
        {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"o_proj": 3.5}},
        {"lora_alpha": 0.3},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "v_proj"]},
    ],
    ids=["rslora", "alpha_pattern", "rank_pattern", "all", "float_alpha", "head", "embedding"],
)
def test_scalings_and_places(base, options, tmp_path):
    path, gguf = base("llama")
    wanted = train(path, "llama", tmp_path / "adapter", **options)
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=path)
    found = by_llama_cpp("llama", gguf, [(tmp_path / "lora.gguf", 1.0)])
    assert apart(found, wanted) < tolerance("llama")


def test_a_copy_of_the_embedding_needs_the_weights_to_be_known_as_one(base, tmp_path):
    path, _ = base("llama")
    train(path, "llama", tmp_path / "adapter", target_modules=["embed_tokens"])
    (tmp_path / "config-only").mkdir()
    (tmp_path / "config-only" / "config.json").write_bytes((path / "config.json").read_bytes())
    with pytest.raises(UnsupportedError, match="name a base with weights"):
        convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=tmp_path / "config-only")


def test_an_alpha_of_zero_is_no_change(base, tmp_path):
    path, gguf = base("llama")
    train(path, "llama", tmp_path / "adapter", lora_alpha=0)
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=path)
    found = by_llama_cpp("llama", gguf, [(tmp_path / "lora.gguf", 1.0)])
    assert apart(found, plain("llama", gguf)) < 1e-6


def test_two_adapters_with_scales(base, tmp_path):
    path, gguf = base("llama")
    model = None
    for number, scale in ((1, 0.5), (2, -1.5)):
        train(path, "llama", tmp_path / f"a{number}", seed=number, r=2 * number)
        convert(tmp_path / f"a{number}", tmp_path / f"a{number}.gguf", base=path)
        name = f"a{number}"
        if model is None:
            model = peft.PeftModel.from_pretrained(model_of(path, "llama"), tmp_path / name, name)
        else:
            model.load_adapter(tmp_path / name, name)
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.scaling[name] *= scale
    model.base_model.set_adapter(["a1", "a2"])
    scaled = [(tmp_path / "a1.gguf", 0.5), (tmp_path / "a2.gguf", -1.5)]
    found = by_llama_cpp("llama", gguf, scaled)
    assert apart(found, run(model.eval(), "llama")) < tolerance("llama")


@pytest.mark.parametrize(("dtype", "most"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 2e-2)])
def test_smaller_types_come_close(base, dtype, most, tmp_path):
    path, gguf = base("llama")
    wanted = train(path, "llama", tmp_path / "adapter", r=32)
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=path, dtype=dtype)
    with open_gguf(tmp_path / "lora.gguf") as file:
        assert {tensor.type.name for tensor in file.tensors.values()} == {dtype.upper()}
    found = by_llama_cpp("llama", gguf, [(tmp_path / "lora.gguf", 1.0)])
    assert 1e-6 < apart(found, wanted) < most


def test_rows_that_fill_no_block_are_f16_and_said_to_be(base, tmp_path):
    path, gguf = base("llama")
    train(path, "llama", tmp_path / "adapter")
    report = convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=path, dtype="q8_0")
    assert any("are F16" in note for note in report.notes)
    log_probabilities(gguf, PROMPTS, [(tmp_path / "lora.gguf", 1.0)])


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("llama", {"use_dora": True}, "DoRA"),
        ("llama", {"lora_bias": True, "target_modules": ["q_proj"]}, None),
        ("qwen2", {"bias": "lora_only", "target_modules": ["q_proj"]}, "biases"),
        ("llama", {"modules_to_save": ["norm"]}, "norms"),
        ("llama", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "lm_head"),
        ("llama", {"trainable_token_indices": [3, 4], "target_modules": ["q_proj"]}, "rows"),
        ("llama", {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}, "embed"),
        ("llama-tied", {"target_modules": ["lm_head"]}, "tied"),
        ("gemma2", {"target_modules": ["lm_head"]}, "tied"),
        ("llama-tied", {"target_modules": ["embed_tokens"]}, "tied"),
        ("gemma2", {"target_modules": ["embed_tokens"]}, "tied"),
        ("gemma3_text", {"target_modules": ["embed_tokens"]}, "tied"),
        ("gpt2", {"target_modules": ["wte"]}, "tied"),
    ],
)
def test_what_llama_cpp_would_compute_wrongly_is_refused(base, name, options, reason, tmp_path):
    if reason is None:  # PEFT wants a bias to add to
        name, reason = "llama-biases", "bias"
    path, _ = base(name)
    train(path, name, tmp_path / "adapter", **options)
    with pytest.raises(UnsupportedError, match=reason) as refused:
        convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=path)
    assert "merge" in str(refused.value.hint)
    assert not (tmp_path / "lora.gguf").exists()


def test_a_base_is_needed_and_must_fit(base, tmp_path):
    path, _ = base("llama")
    train(path, "llama", tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"config\.json"):
        convert(tmp_path / "adapter", tmp_path / "lora.gguf")
    with pytest.raises((InputError, UnsupportedError)):
        convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=base("gpt2")[0])
    assert not (tmp_path / "lora.gguf").exists()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "f32") for name in ARCHITECTURES if name not in EXPERTS),
        *((name, dtype) for name in ("llama", "gpt2", "phi3") for dtype in ("f16", "bf16")),
    ],
)
def test_there_and_back_changes_no_bit(base, name, dtype, tmp_path):
    path, _ = base(name)
    train(path, name, tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "typed", dtype=dtype, base=path)
    convert(tmp_path / "typed", tmp_path / "lora.gguf", base=path, dtype=dtype)
    convert(tmp_path / "lora.gguf", tmp_path / "back", base=path)
    once = load_file(tmp_path / "typed" / "adapter_model.safetensors")
    again = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert once.keys() == again.keys()
    for key, values in once.items():
        assert values.dtype == again[key].dtype
        assert torch.equal(values, again[key]), key


@pytest.mark.parametrize("name", EXPERTS)
def test_there_and_back_gives_the_same_deltas_of_experts(base, name, tmp_path):
    """PEFT gives them scalings of their own, which GGUF has not: B changes by a power of two."""
    path, _ = base(name)
    train(path, name, tmp_path / "adapter", target_parameters=EXPERTS[name])
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=path)
    convert(tmp_path / "lora.gguf", tmp_path / "back", base=path)
    with open_model(path) as model, open_adapter(tmp_path / "adapter", base=model) as one, \
            open_adapter(tmp_path / "back", base=model) as other:  # fmt: skip
        assert one.deltas.keys() == other.deltas.keys()
        assert any("experts" in key for key in one.deltas)
        for key, delta in one.deltas.items():
            back = other.deltas[key]
            assert torch.equal(numbers(delta.a), numbers(back.a)), key
            assert torch.equal(
                numbers(delta.b).double() * delta.scaling,
                numbers(back.b).double() * back.scaling,
            ), key


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "gemma2"])
def test_peft_computes_with_what_comes_back(base, name, tmp_path):
    path, _ = base(name)
    options = {"target_parameters": EXPERTS[name]} if name in EXPERTS else {}
    wanted = train(path, name, tmp_path / "adapter", use_rslora=True, **options)
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=path)
    convert(tmp_path / "lora.gguf", tmp_path / "back", base=path)
    model = peft.PeftModel.from_pretrained(model_of(path, name), tmp_path / "back")
    assert apart(run(model.eval(), name), wanted) < 1e-5


@pytest.mark.parametrize("layout", ["each", "stacks", "shared"])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_in_every_layout_compute_the_same(base, name, layout, tmp_path):
    path, gguf = base(name)
    fused = tmp_path / "adapter"
    options = {"target_modules": ["q_proj"], "target_parameters": EXPERTS[name]}
    train(path, name, fused, **options)
    with_shared_factors(fused, 4)
    names = MIXTRAL if name == "mixtral" else QWEN
    if layout == "each":
        source = one_by_one(fused, tmp_path / layout, 4, names)
    else:
        source = named_stacks(fused, tmp_path / layout, 4, shared=layout == "shared")
    wanted = run(peft.PeftModel.from_pretrained(model_of(path, name), fused).eval(), name)
    convert(source, tmp_path / "lora.gguf", base=path)
    found = by_llama_cpp(name, gguf, [(tmp_path / "lora.gguf", 1.0)])
    assert apart(found, wanted) < tolerance(name)
    assert apart(plain(name, gguf), wanted) > 20 * tolerance(name), "the adapter must matter"
    for experts in ("each", "fused"):
        out = tmp_path / f"to-{experts}"
        convert(tmp_path / "lora.gguf", out, base=path, experts=experts)
        back = peft.PeftModel.from_pretrained(model_of(path, name), out).eval()
        assert apart(run(back, name), wanted) < 1e-5


def test_experts_with_a_lora_each_are_stacked(base, tmp_path):
    """As PEFT made them before transformers 5; of one rank each, and not for all experts."""
    path, gguf = base("mixtral")
    random = torch.Generator().manual_seed(0)
    weights = load_file(path / "model.safetensors")
    factors, changed = {}, dict(weights)
    for layer, expert, name, rank in ((0, 0, "w1", 2), (0, 3, "w1", 4), (1, 2, "w2", 3)):
        module = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
        rows, columns = weights[f"{module}.weight"].shape
        a = torch.randn(rank, columns, generator=random) * 0.2
        b = torch.randn(rows, rank, generator=random) * 0.2
        factors[f"base_model.model.{module}.lora_A.weight"] = a
        factors[f"base_model.model.{module}.lora_B.weight"] = b
        changed[f"{module}.weight"] = weights[f"{module}.weight"] + 6 / rank * b @ a
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = {"0.w1": 2, "3.w1": 4, "2.w2": 3}
    config = peft.LoraConfig(r=8, lora_alpha=6, target_modules=["w1", "w2"], rank_pattern=ranks)
    config.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=path)
    with open_gguf(tmp_path / "lora.gguf") as file:
        assert file.tensors["blk.0.ffn_gate_exps.weight.lora_a"].shape == (4, 4, 64)
    shutil.copytree(path, tmp_path / "changed")
    save_file(changed, tmp_path / "changed" / "model.safetensors", {"format": "pt"})
    wanted = run(model_of(tmp_path / "changed", "mixtral"), "mixtral")
    found = by_llama_cpp("mixtral", gguf, [(tmp_path / "lora.gguf", 1.0)])
    assert apart(found, wanted) < tolerance("mixtral")
    assert apart(plain("mixtral", gguf), wanted) > 1e-3


def test_it_can_be_shown_and_verified(base, tmp_path):
    path, _ = base("llama")
    train(path, "llama", tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=path)
    summary = info(tmp_path / "lora.gguf")
    assert summary.format == "gguf-lora"
    assert not verify(tmp_path / "lora.gguf").findings


def test_types_are_shown_as_they_are_stored(base, tmp_path):
    path, _ = base("llama")
    train(path, "llama", tmp_path / "adapter", r=32, target_modules=["v_proj"])
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=path, dtype="q8_0")
    assert set(info(tmp_path / "lora.gguf").dtypes) == {"Q8_0"}


def test_another_type_of_the_same_format_is_no_pickle(base, tmp_path):
    path, _ = base("llama")
    train(path, "llama", tmp_path / "adapter", target_modules=["v_proj"])
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=path)
    report = convert(tmp_path / "lora.gguf", tmp_path / "other.gguf", base=path)
    assert report.notes == ["converted, not copied: gguf-lora files are always converted"]


def test_a_base_is_no_adapter(base, tmp_path):
    _, gguf = base("llama")
    with pytest.raises(UnsupportedError, match="is of type model, not a LoRA adapter"):
        convert(gguf, tmp_path / "out", from_format="gguf-lora")


def test_an_adapter_of_a_bundle_needs_no_base_named(base, tmp_path):
    path, gguf = base("llama")
    wanted = train(path, "llama", tmp_path / "adapter")
    convert(path, tmp_path / "bundle")
    convert(tmp_path / "adapter", tmp_path / "bundle" / "adapters" / "medical")
    convert(tmp_path / "bundle" / "adapters" / "medical", tmp_path / "lora.gguf")
    found = by_llama_cpp("llama", gguf, [(tmp_path / "lora.gguf", 1.0)])
    assert apart(found, wanted) < tolerance("llama")
    with open_gguf(tmp_path / "lora.gguf") as file:
        assert len(file.text("loraformat.base.fingerprint")) == 64
    assert np.isfinite(found[0]).all()


def test_a_file_made_by_others_is_read_as_llama_cpp_reads_it(base, tmp_path):
    path, gguf = base("llama")
    random = np.random.default_rng(0)
    pairs = {
        name: (random.normal(0, 0.1, (4, 64)), random.normal(0, 0.1, (rows, 4)))
        for name, rows in (("blk.0.attn_q.weight", 96), ("blk.1.ffn_up.weight", 96))
    }
    write_peer_lora(tmp_path / "lora.gguf", pairs, alpha=10.0)
    with pytest.raises(UnsupportedError, match="head"):  # their number is not in the file
        convert(tmp_path / "lora.gguf", tmp_path / "nowhere")
    convert(tmp_path / "lora.gguf", tmp_path / "back", base=path)
    found = by_llama_cpp("llama", gguf, [(tmp_path / "lora.gguf", 1.0)])
    model = peft.PeftModel.from_pretrained(model_of(path, "llama"), tmp_path / "back")
    assert apart(run(model.eval(), "llama"), found) < tolerance("llama")
    assert apart(plain("llama", gguf), found) > 1e-3

"""``merge -o merged.gguf``: llama.cpp computes what PEFT computes."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers
from bases import apart, by_llama_cpp, make_base, run, tolerance
from loraformat_converters.gguf.container.reader import open_gguf
from safetensors.torch import load_file

from loraformat.errors import UnsupportedError, UsageError
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "down_proj", "embed_tokens"],
    "gpt2": ["c_attn", "c_proj"],
    "phi3": ["qkv_proj", "gate_up_proj"],
}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Return a function: a base, an adapter of it, and what PEFT computes."""
    made = {}

    def make(name):
        if name not in made:
            path = tmp_path_factory.mktemp("merge")
            make_base(name, path / "base")
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path / "base", dtype=torch.float32, attn_implementation="eager"
            )
            torch.manual_seed(1)
            config = peft.LoraConfig(
                r=4, lora_alpha=8, use_rslora=True, init_lora_weights=False,
                target_modules=TARGETS[name],
            )  # fmt: skip
            wrapped = peft.get_peft_model(model, config).eval()
            for key, parameter in wrapped.named_parameters():
                if "lora_" in key:
                    torch.nn.init.normal_(parameter, std=0.1)
            wrapped.save_pretrained(path / "adapter")
            made[name] = path / "base", path / "adapter", run(wrapped, name)
        return made[name]

    return make


@pytest.mark.parametrize("name", TARGETS)
def test_merged_out(adapted, name, tmp_path):
    base, adapter, wanted = adapted(name)
    report = merge(base, [adapter], tmp_path / "merged.gguf", dtype="f32")
    assert report.total.gain == 1
    assert report.total.error < 1e-5
    assert apart(wanted, by_llama_cpp(tmp_path / "merged.gguf", name)) < tolerance(name)


def test_a_gguf_base_is_merged_into(adapted, tmp_path):
    base, adapter, wanted = adapted("llama")
    convert(base, tmp_path / "base.gguf", dtype="f32")
    merge(tmp_path / "base.gguf", [adapter], tmp_path / "merged.gguf", dtype="f32")
    assert apart(wanted, by_llama_cpp(tmp_path / "merged.gguf", "llama")) < 1e-5


def test_what_a_quantized_base_holds_is_rounded_once(adapted, tmp_path):
    base, adapter, _ = adapted("llama")
    convert(base, tmp_path / "base.gguf", dtype="q8_0")
    convert(tmp_path / "base.gguf", tmp_path / "dense", to_format="safetensors", dtype="f32")
    for source, name in ((tmp_path / "base.gguf", "one"), (tmp_path / "dense", "two")):
        merge(source, [adapter], tmp_path / name, dtype="bf16")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("dtype", [None, "q8_0"])
def test_a_dry_run_says_the_size(adapted, dtype, tmp_path):
    base, adapter, _ = adapted("llama")
    target = tmp_path / "merged.gguf"
    planned = merge(base, [adapter], target, dtype=dtype, dry_run=True)
    assert not target.exists()
    done = merge(base, [adapter], target, dtype=dtype)
    assert planned.output_bytes == done.output_bytes == target.stat().st_size


def test_an_unknown_pre_tokenizer_is_named(adapted, tmp_path):
    base, adapter, wanted = adapted("llama")
    strange = shutil.copytree(base, tmp_path / "strange")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "odd"}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    (strange / "tokenizer.json").write_text(json.dumps(tokenizer))
    target = tmp_path / "merged.gguf"
    with pytest.raises(UnsupportedError, match="pre-tokenizer") as refused:
        merge(strange, [adapter], target, dtype="f32", dry_run=True)
    assert "--pre" in str(refused.value.hint)
    merge(strange, [adapter], target, dtype="f32", pre="gpt-2")
    assert apart(wanted, by_llama_cpp(target, "llama")) < 1e-5


def test_what_is_merged_is_of_the_type_that_was_asked_for(adapted, tmp_path):
    base, adapter, wanted = adapted("llama")
    report = merge(base, [adapter], tmp_path / "merged.gguf", dtype="q8_0")
    assert report.total.gain == pytest.approx(1, abs=1e-3)
    with open_gguf(tmp_path / "merged.gguf") as file:
        assert file.tensors["blk.0.attn_q.weight"].type.name == "Q8_0"
    assert apart(wanted, by_llama_cpp(tmp_path / "merged.gguf", "llama")) < 1


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_kept_of_a_delta_is_that_of_the_same_type_elsewhere(adapted, name, tmp_path):
    """Rows in another order, transposed or split: f16 takes the same of each tensor."""
    base, adapter, _ = adapted(name)
    there = merge(base, [adapter], tmp_path / "merged.gguf", dtype="f16")
    here = merge(base, [adapter], tmp_path / "merged", dtype="f16")
    assert len(there.modules) == len(here.modules) == there.merged
    for one, other in zip(there.modules, here.modules, strict=True):
        assert one.name == other.name
        for figure in ("relative", "gain", "error", "swallowed"):
            assert getattr(one, figure) == pytest.approx(getattr(other, figure), rel=5e-3), figure
    assert 1e-4 < there.total.error < 0.1


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_what_is_kept_of_a_delta_is_what_can_be_read_again(adapted, dtype, tmp_path):
    base, adapter, _ = adapted("llama")
    report = merge(base, [adapter], tmp_path / "merged.gguf", dtype=dtype)
    convert(tmp_path / "merged.gguf", tmp_path / "read", to_format="safetensors", dtype="f32")
    merge(base, [adapter], tmp_path / "exact", dtype="f32")
    read, exact, before = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "read", tmp_path / "exact", base)
    )
    for change in report.modules:
        weight = before[change.name].double()
        delta, effect = (one[change.name].double() - weight for one in (exact, read))
        gain = float((effect * delta).sum() / delta.square().sum())
        error = float((effect - delta).norm() / delta.norm())
        assert (change.gain, change.error) == pytest.approx((gain, error), rel=1e-3)
    assert report.total.error > 5e-3


def test_a_merged_bundle_does_not_bear_its_fingerprint(adapted, tmp_path):
    base, adapter, _ = adapted("llama")
    convert(base, tmp_path / "bundle")
    merge(tmp_path / "bundle", [adapter], tmp_path / "merged.gguf")
    with open_gguf(tmp_path / "merged.gguf") as file:
        assert "loraformat.base.fingerprint" not in file.metadata
        assert file.text("loraformat.source.format") == "merge"


def test_no_undo_of_what_is_rounded(adapted, tmp_path):
    base, adapter, _ = adapted("llama")
    with pytest.raises(UsageError, match="undo"):
        merge(base, [adapter], tmp_path / "merged.gguf", undo=tmp_path / "undo")
    assert not list(tmp_path.iterdir())


def test_a_pre_tokenizer_is_for_gguf_files_only(adapted, tmp_path):
    base, adapter, _ = adapted("llama")
    with pytest.raises(UsageError, match="--pre gpt-2 is for GGUF files"):
        merge(base, [adapter], tmp_path / "merged", pre="gpt-2")


def test_on_the_command_line(adapted, command, tmp_path):
    base, adapter, _ = adapted("llama")
    done = command("merge", base, adapter, "-o", "merged.gguf", "--dtype", "q5_0", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["target_format"] == "gguf"

"""reduce, combine and extract read and write GGUF adapters, which llama.cpp then computes with."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from bases import PROMPTS, apart, make_base, run
from llama_runtime import log_probabilities
from loraformat_converters.gguf.container.reader import open_gguf
from transformers import AutoModelForCausalLM

from loraformat.cli import main
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge

CLOSE = 1e-5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base in three forms, and two adapters of rank 4."""
    folder = tmp_path_factory.mktemp("algebra")
    make_base("llama", folder / "base")
    convert(folder / "base", folder / "base.gguf", dtype="f32")
    convert(folder / "base", folder / "bundle")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=4, lora_alpha=6, task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"]
        )
        model = peft.get_peft_model(plain(folder), config)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def say(capsys):
    """Return a function: run a verb, and return its exit code, its output and its errors."""

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return call


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=torch.float32, attn_implementation="eager"
    )


def by_peft(folder, adapter):
    model = peft.PeftModel.from_pretrained(plain(folder), adapter)
    return run(model.eval(), "llama")


def by_llama_cpp(folder, adapter):
    return list(log_probabilities(folder / "base.gguf", PROMPTS, [(adapter, 1.0)]))


@pytest.mark.parametrize("base", ["base", "base/config.json", "base.gguf", "bundle"])
def test_reduce(made, say, base, tmp_path):
    assert say("reduce", made / "a", "-o", tmp_path / "peft", "--rank", 2)[0] == 0
    arguments = ["reduce", made / "a", "-o", tmp_path / "r.gguf", "--rank", 2]
    code, out, _ = say(*arguments, "--base", made / base, "--json")
    assert code == 0
    assert {module["new_rank"] for module in json.loads(out)["modules"]} == {2}
    wanted = by_peft(made, tmp_path / "peft")
    assert apart(by_llama_cpp(made, tmp_path / "r.gguf"), wanted) < CLOSE
    assert apart(wanted, by_peft(made, made / "a")) > 100 * CLOSE


def test_combine_from_and_to_gguf(made, say, tmp_path):
    convert(made / "a", tmp_path / "a.gguf", base=made / "base")
    options = ["--method", "cat", "--weight", 2, "--weight", -1, "--base", made / "base"]
    assert say("combine", made / "a", made / "b", "-o", tmp_path / "peft", *options)[0] == 0
    sources = [tmp_path / "a.gguf", made / "b"]
    assert say("combine", *sources, "-o", tmp_path / "c.gguf", *options)[0] == 0
    found = by_llama_cpp(made, tmp_path / "c.gguf")
    assert apart(found, by_peft(made, tmp_path / "peft")) < CLOSE


def test_extract(made, say, tmp_path):
    merge(made / "base", [made / "a"], tmp_path / "tuned")
    arguments = ["extract", made / "base", tmp_path / "tuned", "-o", tmp_path / "e.gguf"]
    assert say(*arguments, "--rank", 4)[0] == 0
    assert apart(by_llama_cpp(made, tmp_path / "e.gguf"), by_peft(made, made / "a")) < 1e-4


def test_an_adapter_of_a_bundle_needs_no_base_named(made, say, tmp_path):
    convert(made / "base", tmp_path / "bundle")
    convert(made / "a", tmp_path / "bundle" / "adapters" / "a", canonical=True)
    source = tmp_path / "bundle" / "adapters" / "a"
    assert say("reduce", source, "-o", tmp_path / "r.gguf", "--rank", 4)[0] == 0
    assert apart(by_llama_cpp(made, tmp_path / "r.gguf"), by_peft(made, made / "a")) < CLOSE
    with open_gguf(tmp_path / "r.gguf") as file:
        assert len(file.text("loraformat.base.fingerprint")) == 64


def test_dtype_dry_run_and_force(made, say, tmp_path):
    target = tmp_path / "r.gguf"
    arguments = ["reduce", made / "a", "-o", target, "--rank", 2, "--base", made / "base"]
    assert say(*arguments, "--dry-run")[0] == 0
    assert not target.exists()
    assert say(*arguments, "--dtype", "f16")[0] == 0
    with open_gguf(target) as file:
        assert {tensor.type.name for tensor in file.tensors.values()} == {"F16"}
    assert say(*arguments)[0] == 5
    assert say(*arguments, "--force")[0] == 0
    with open_gguf(target) as file:
        assert {tensor.type.name for tensor in file.tensors.values()} == {"F32"}


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_without_a_base_the_remedy_is_said(made, say, flags, tmp_path):
    for verb in (["reduce", made / "a", "--rank", 2], ["combine", made / "a", made / "b"]):
        code, out, err = say(*verb, "-o", tmp_path / "r.gguf", *flags)
        assert (code, out) == (2, "")
        assert "--base" in err
    assert not (tmp_path / "r.gguf").exists()


def test_what_gguf_cannot_hold_is_refused_before_the_work(made, say, tmp_path):
    model = peft.get_peft_model(
        plain(made), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    model.save_pretrained(tmp_path / "head")
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(tmp_path / "head")
    arguments = ["-o", tmp_path / "r.gguf", "--rank", 2, "--base", made / "base"]
    code, out, err = say("reduce", tmp_path / "head", *arguments)
    assert (code, out) == (3, "")
    assert "merge" in err
    assert not (tmp_path / "r.gguf").exists()


def test_another_base_must_be_insisted_on(made, say, tmp_path):
    convert(made / "base", tmp_path / "bundle")
    convert(made / "base", tmp_path / "other", skip=["*q_proj*"])
    place = tmp_path / "bundle" / "adapters" / "a"
    convert(made / "a", place, canonical=True)
    for verb in (["reduce", place, "--rank", 2], ["combine", place, place]):
        named = [*verb, "-o", tmp_path / f"{verb[0]}.gguf", "--base", tmp_path / "other"]
        inside = [*verb, "-o", tmp_path / "other" / "adapters" / verb[0]]
        for arguments in (named, inside):
            code, _, err = say(*arguments)
            assert code == 3, err
            assert "--allow-base-mismatch" in err
            assert say(*arguments, "--allow-base-mismatch")[0] == 0
    merge(made / "base", [made / "a"], tmp_path / "tuned")
    inside = ["-o", tmp_path / "other" / "adapters" / "found", "--rank", 4]
    arguments = ["extract", tmp_path / "bundle", tmp_path / "tuned", *inside]
    assert say(*arguments)[0] == 3
    assert say(*arguments, "--allow-base-mismatch")[0] == 0
    assert say("verify", tmp_path / "other")[0] == 0


def test_pickles_are_read_on_request_only(made, say, tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "p").mkdir()
    config = (made / "a" / "adapter_config.json").read_bytes()
    (tmp_path / "p" / "adapter_config.json").write_bytes(config)
    torch.save(
        load_file(made / "a" / "adapter_model.safetensors"), tmp_path / "p/adapter_model.bin"
    )
    pickled = tmp_path / "p"
    for arguments in (
        ["reduce", pickled, "-o", tmp_path / "r", "--rank", 2],
        ["combine", pickled, made / "b", "-o", tmp_path / "c"],
        ["merge", made / "base", pickled, "-o", tmp_path / "m"],
        ["unmerge", tmp_path / "m", "--adapter", pickled, "-o", tmp_path / "u"],
        ["spectrum", pickled],
        ["info", pickled],
        ["verify", pickled],
    ):
        code, _, err = say(*arguments)
        assert code == 4 if arguments[0] == "verify" else code == 3, err
        code, _, err = say(*arguments, "--allow-pickle")
        assert code == 0, (arguments, err)

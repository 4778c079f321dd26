"""Output heads in llama.cpp: which architectures load one, where remedies for tied heads lead."""

from __future__ import annotations

import json
import re
import shutil

import peft
import pytest
import torch
from bases import apart, by_llama_cpp, by_transformers, make_base, run, tolerance
from llama_runtime import RuntimeFailure, log_probabilities
from loraformat_converters.gguf.architectures import ARCHITECTURES
from loraformat_converters.gguf.container.reader import open_gguf
from loraformat_converters.gguf.container.types import GGMLType
from loraformat_converters.gguf.container.writer import PlannedTensor, write_gguf
from safetensors.torch import load_file, save_file

from loraformat.errors import UnsupportedError
from loraformat.ops.check.check import check
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge
from loraformat.runtimes.architectures import HEADLESS
from loraformat.storage.atomic_file import AtomicFile
from tests.tiny_models import auto_class

#: A model of each architecture that generates.
KINDS = {
    "llama": "llama-tied", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe",
    "gemma3": "gemma3_text", "phi3": "phi3", "gpt2": "gpt2",
}  # fmt: skip


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Return a function: a model with a head that is the embedding, equals it, or differs."""
    made = {}

    def make(name, head="none"):
        if (name, head) not in made:
            folder = tmp_path_factory.mktemp("head") / name
            make_base(name, folder, tie_word_embeddings=True)
            if head != "none":
                _add_head(folder, equal=head == "equal")
            made[name, head] = folder
        return made[name, head]

    return make


def _add_head(folder, *, equal):
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    embedding = next(
        t for n, t in tensors.items() if n.endswith(("embed_tokens.weight", "wte.weight"))
    )
    torch.manual_seed(7)
    head = embedding.clone() if equal else 0.04 * torch.randn_like(embedding)
    save_file({**tensors, "lm_head.weight": head}, weights, {"format": "pt"})


def names_of(path):
    with open_gguf(path) as file:
        return set(file.tensors)


def test_every_generating_architecture_is_judged():
    generating = {name for name, record in ARCHITECTURES.items() if record.generates}
    assert set(KINDS) | HEADLESS == generating
    headless = {name for name in generating if ARCHITECTURES[name].head is None}
    assert headless == HEADLESS


@pytest.mark.parametrize("name", KINDS.values())
def test_llama_cpp_computes_with_the_head_of_the_file(base, name, tmp_path):
    """The config says tied, the file has a head of its own, and transformers computes with it."""
    source = base(name, "other")
    report = convert(source, tmp_path / "model.gguf", dtype="f32")
    assert any("tie_word_embeddings is set to false" in note for note in report.notes)
    wanted = by_transformers(source, name)
    assert apart(by_llama_cpp(tmp_path / "model.gguf", name), wanted) < tolerance(name)
    assert apart(by_transformers(base(name), name), wanted) > 0.05, "the heads are others"
    for config in (None, source / "config.json"):
        folder = tmp_path / f"dense-{config is None}"
        convert(tmp_path / "model.gguf", folder, to_format="safetensors", config=config)
        assert json.loads((folder / "config.json").read_bytes())["tie_word_embeddings"] is False
        assert apart(by_transformers(folder, name), wanted) < 1e-5


@pytest.mark.parametrize("name", KINDS.values())
def test_equal_heads_are_one_tensor(base, name, tmp_path):
    convert(base(name, "equal"), tmp_path / "copy.gguf", dtype="f32")
    convert(base(name), tmp_path / "tied.gguf", dtype="f32")
    assert "output.weight" not in names_of(tmp_path / "copy.gguf")
    assert names_of(tmp_path / "copy.gguf") == names_of(tmp_path / "tied.gguf")


def with_output(path, target):
    """Add a copy of the embedding to a GGUF file, as its output head."""
    with open_gguf(path) as file, AtomicFile(target, plan="head") as output:
        tensors = [
            PlannedTensor(t.name, t.shape, t.type, lambda name=t.name: [file.load(name)])
            for t in file.tensors.values()
        ]
        embedding = file.tensors["token_embd.weight"]
        data = bytes(file.load("token_embd.weight"))
        tensors.append(
            PlannedTensor("output.weight", embedding.shape, GGMLType.F32, lambda: [data])
        )
        write_gguf(output, dict(file.metadata), tensors)
        output.commit()
    return target


@pytest.mark.parametrize("name", ["llama-tied", "gemma3_text", "gpt2"])
def test_a_copy_of_the_embedding_in_a_gguf_file_is_tied(base, name, tmp_path):
    """Written so by other programs: the same bytes twice."""
    convert(base(name), tmp_path / "model.gguf", dtype="f32")
    copy = with_output(tmp_path / "model.gguf", tmp_path / "copy.gguf")
    wanted = by_llama_cpp(copy, name)
    convert(copy, tmp_path / "dense", to_format="safetensors")
    assert json.loads((tmp_path / "dense" / "config.json").read_bytes())["tie_word_embeddings"]
    assert not any("lm_head" in n for n in load_file(tmp_path / "dense" / "model.safetensors"))
    assert apart(by_transformers(tmp_path / "dense", name), wanted) < tolerance(name)


def test_gemma2_has_no_head_in_llama_cpp(base, tmp_path):
    """It refuses a file with one; so is a model whose head differs refused, with what works."""
    convert(base("gemma2"), tmp_path / "model.gguf", dtype="f32")
    head = with_output(tmp_path / "model.gguf", tmp_path / "head.gguf")
    with pytest.raises(RuntimeFailure, match="wrong number of tensors"):
        log_probabilities(head, [[1, 2, 3]])
    source = base("gemma2", "other")
    with pytest.raises(UnsupportedError, match="gemma2 computes") as refused:
        convert(source, tmp_path / "no.gguf")
    assert "--to safetensors" in str(refused.value.hint)
    convert(source, tmp_path / "dense", to_format="safetensors")
    assert (
        apart(by_transformers(tmp_path / "dense", "gemma2"), by_transformers(source, "gemma2")) == 0
    )
    convert(base("gemma2", "equal"), tmp_path / "equal.gguf")


def trained(path, name, folder, targets, **options):
    """Let PEFT write an adapter; return the log-probabilities with it."""
    torch.manual_seed(2)
    model = auto_class(name).from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **options
    )
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.mul_(0.1)
            elif "modules_to_save" in key:
                parameter.add_(0.02 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return run(wrapped, name)


@pytest.mark.parametrize("module", ["head", "embedding"])
@pytest.mark.parametrize("name", [*KINDS.values(), "gemma2"])
def test_the_remedy_for_a_tied_head_or_embedding_leads_to_the_goal(base, name, module, tmp_path):
    source = base(name)
    target = {"head": "lm_head", "embedding": "wte" if name == "gpt2" else "embed_tokens"}[module]
    wanted = trained(source, name, tmp_path / "adapter", [target])
    with pytest.raises(UnsupportedError, match="tied") as refused:
        convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=source)
    (output,) = re.findall(r"loraformat merge BASE ADAPTER -o ([\w.]+)", str(refused.value.hint))
    merge(source, [tmp_path / "adapter"], tmp_path / output,
          dtype="f32" if output.endswith(".gguf") else None)  # fmt: skip
    if name == "gemma2":
        assert apart(by_transformers(tmp_path / output, name), wanted) < 1e-5
    else:
        assert apart(by_llama_cpp(tmp_path / output, name), wanted) < tolerance(name)
    found = check(tmp_path / "adapter", base=source, runtime=["llama.cpp"]).findings
    commands = {one.command for one in found if one.rule == "TIED_HEAD"}
    suffix = "" if name == "gemma2" else ".gguf"
    assert commands == {f"loraformat merge {source} {tmp_path}/adapter -o adapter-merged{suffix}"}


@pytest.mark.parametrize("name", ["llama-tied", "gemma3_text"])
def test_with_a_head_of_its_own_an_embedding_s_delta_runs_beside_the_base(base, name, tmp_path):
    """The other remedy that is named."""
    source = shutil.copytree(base(name, "equal"), tmp_path / "base")
    wanted = trained(base(name), name, tmp_path / "adapter", ["embed_tokens", "q_proj"])
    with pytest.raises(UnsupportedError, match="tied") as refused:
        convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=source)
    assert "tie_word_embeddings false and lm_head.weight, a copy" in str(refused.value.hint)
    config = json.loads((source / "config.json").read_bytes())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    convert(source, tmp_path / "base.gguf", dtype="f32")
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=source)
    found = list(
        log_probabilities(
            tmp_path / "base.gguf", [[0, *range(40, 70)], [5, 9, *range(300, 340)]],
            [(tmp_path / "lora.gguf", 1.0)],
        )
    )  # fmt: skip
    assert apart(found, wanted) < tolerance(name)


@pytest.mark.parametrize("name", ["llama-tied", "gemma3_text"])
def test_a_head_s_delta_runs_beside_a_base_whose_head_differs(base, name, tmp_path):
    source = base(name, "other")
    wanted = trained(source, name, tmp_path / "adapter", ["lm_head", "embed_tokens"])
    convert(source, tmp_path / "base.gguf", dtype="f32")
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=source)
    convert(tmp_path / "lora.gguf", tmp_path / "back", base=source)
    model = auto_class(name).from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    )
    assert (
        apart(run(peft.PeftModel.from_pretrained(model, tmp_path / "back").eval(), name), wanted)
        < 1e-5
    )
    found = list(
        log_probabilities(
            tmp_path / "base.gguf", [[0, *range(40, 70)], [5, 9, *range(300, 340)]],
            [(tmp_path / "lora.gguf", 1.0)],
        )
    )  # fmt: skip
    assert apart(found, wanted) < tolerance(name)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True, "target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
        {"use_dora": True, "target_modules": ["lm_head"]},
        {"trainable_token_indices": [3, 4], "target_modules": ["q_proj"]},
    ],
)
@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_the_remedy_for_what_is_no_low_rank_delta(base, name, options, tmp_path):
    source = base(name)
    options = dict(options)
    wanted = trained(source, name, tmp_path / "adapter", options.pop("target_modules"), **options)
    with pytest.raises(UnsupportedError) as refused:
        convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=source)
    (output,) = re.findall(r"loraformat merge BASE ADAPTER -o ([\w.]+)", str(refused.value.hint))
    merge(source, [tmp_path / "adapter"], tmp_path / output,
          dtype="f32" if output.endswith(".gguf") else None)  # fmt: skip
    compute = by_llama_cpp if output.endswith(".gguf") else by_transformers
    assert apart(compute(tmp_path / output, name), wanted) < tolerance(name)


def test_a_gguf_base_gets_its_head(base, tmp_path):
    """A file without output.weight, and an adapter of the head: the merged file has one."""
    wanted = trained(base("gemma3_text"), "gemma3_text", tmp_path / "adapter", ["lm_head"])
    convert(base("gemma3_text"), tmp_path / "base.gguf", dtype="f32")
    merge(tmp_path / "base.gguf", [tmp_path / "adapter"], tmp_path / "merged.gguf", dtype="f32")
    assert "output.weight" in names_of(tmp_path / "merged.gguf")
    found = by_llama_cpp(tmp_path / "merged.gguf", "gemma3_text")
    assert apart(found, wanted) < tolerance("gemma3_text")
    merge(tmp_path / "base.gguf", [tmp_path / "adapter"], tmp_path / "merged")
    assert apart(by_transformers(tmp_path / "merged", "gemma3_text"), wanted) < 1e-5

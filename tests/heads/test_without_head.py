"""Embedding models, saved without an output head, go through every verb that has a use for them."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
import transformers
from loraformat_converters.gguf.container.reader import open_gguf
from transformers import AutoModelForCausalLM

from loraformat.bundle.update import read_manifest
from loraformat.card import Base, BundleFacts, bundle_card
from loraformat.cli import main
from loraformat.errors import InputError, UnsupportedError
from loraformat.model.tied_head import lacks_head
from loraformat.ops.check.check import check
from loraformat.ops.check.write import write_usage
from loraformat.ops.convert.convert import convert
from loraformat.ops.extract.extract import extract
from loraformat.ops.info.model import info
from loraformat.ops.merge.merge import merge
from loraformat.ops.verify import verify
from loraformat.shards.read_directory import peek_config
from tests.gguf.llama_runtime import embeddings
from tests.heads.embedders import (
    CASES,
    IDS,
    KINDS,
    adapter,
    edit_config,
    hidden,
    make,
    opened,
    states,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a function: the directory of a model."""
    made = {}

    def get(kind, form="base class"):
        if (kind, form) not in made:
            made[kind, form] = make(kind, form, tmp_path_factory.mktemp("base") / kind)
        return made[kind, form]

    return get


def apart(one, other) -> float:
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


def tolerance(kind: str) -> float:
    """GELU is a table of float16 in llama.cpp."""
    return 5e-3 if kind in ("Gemma3TextModel", "BertModel") else 1e-5


def in_float32(path) -> torch.Tensor:
    """Hidden states of a 4-bit checkpoint, its codes decoded and multiplied in float32."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    model = opened(path)
    found = [(name, one) for name, one in model.named_modules() if isinstance(one, Linear4bit)]
    assert found
    for name, module in found:
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
        plain.weight.data, plain.bias = weight, module.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    return hidden(model)


@pytest.mark.parametrize("kind, form", CASES)
def test_bundle_and_bitsandbytes_give_the_states_of_the_dequantized_weights(
    base, tmp_path, kind, form
):
    source = base(kind, form)
    report = convert(source, tmp_path / "bundle")
    assert report.quantized == 2 * {"Phi3Model": 4, "BertModel": 6}.get(kind, 7)
    assert not verify(tmp_path / "bundle").findings
    assert info(tmp_path / "bundle").layers == 2
    convert(tmp_path / "bundle", tmp_path / "dense", to_format="safetensors", dtype="f32")
    convert(tmp_path / "bundle", tmp_path / "bnb", to_format="bitsandbytes")
    expected = states(tmp_path / "dense")
    assert apart(expected, states(source)) > 0.1  # what NF4 costs
    assert apart(in_float32(tmp_path / "bundle"), expected) < 1e-4
    assert apart(in_float32(tmp_path / "bnb"), expected) < 1e-4


@pytest.mark.parametrize("kind, form", CASES)
def test_the_card_of_a_bundle_opens_it_as_what_it_is(base, tmp_path, kind, form):
    bundle = tmp_path / "bundle"
    convert(base(kind, form), bundle)
    headless = lacks_head(read_manifest(bundle).tensors, peek_config(bundle))
    facts = BundleFacts("me/bundle", Base("org/base"), info(bundle), [], headless)
    document = bundle_card(facts)
    assert "feature-extraction" in document.fields.values()
    code = document.body.partition("```python\n")[2].partition("```")[0]
    assert "AutoModelForCausalLM" not in code
    scope: dict = {}
    exec(code.replace("me/bundle", str(bundle)), scope)
    assert hidden(scope["model"]).shape == (len(IDS), 64)


@pytest.mark.parametrize("kind, form", CASES)
def test_llama_cpp_embeds_as_transformers_and_the_file_comes_back(base, tmp_path, kind, form):
    source = base(kind, form)
    report = convert(source, tmp_path / "m.gguf", dtype="f32")
    headless = kind not in ("Gemma3TextModel", "BertModel")  # whose config says tied
    assert headless == any("has no output head" in note for note in report.notes)
    with open_gguf(tmp_path / "m.gguf") as file:
        assert "output.weight" not in file.tensors
    (found,) = embeddings(tmp_path / "m.gguf", [IDS])
    assert apart(found, states(source)) < tolerance(kind)
    convert(tmp_path / "m.gguf", tmp_path / "back", to_format="safetensors")
    assert apart(states(tmp_path / "back"), states(source)) < 1e-5
    convert(tmp_path / "back", tmp_path / "again.gguf", dtype="f32")


@pytest.mark.parametrize("kind, form", CASES)
def test_adapters_merge_check_convert_and_are_extracted_as_peft_computes(
    base, tmp_path, kind, form
):
    source, lora, targets = base(kind, form), tmp_path / "lora", KINDS[kind][2]
    expected = adapter(source, lora, targets)
    assert apart(expected, states(source)) > 0.1
    assert check(lora, base=source, runtime=["transformers"]).verdicts == {"transformers": "right"}

    merge(source, [lora], tmp_path / "merged")
    assert apart(states(tmp_path / "merged"), expected) < 1e-4
    merge(source, [lora], tmp_path / "merged.gguf", dtype="f32")
    (found,) = embeddings(tmp_path / "merged.gguf", [IDS])
    assert apart(found, expected) < tolerance(kind)

    convert(source, tmp_path / "base.gguf", dtype="f32")
    convert(lora, tmp_path / "lora.gguf", base=source)
    (found,) = embeddings(tmp_path / "base.gguf", [IDS], [(tmp_path / "lora.gguf", 1.0)])
    assert apart(found, expected) < tolerance(kind)
    convert(tmp_path / "lora.gguf", tmp_path / "back", base=source)
    assert apart(states(source, tmp_path / "back"), expected) < 1e-5

    extract(
        source,
        tmp_path / "merged",
        tmp_path / "found",
    )
    assert apart(states(source, tmp_path / "found"), expected) < 1e-4

    convert(source, tmp_path / "bundle")
    convert(lora, tmp_path / "bundle" / "adapters" / "mine")
    assert apart(states(source, tmp_path / "bundle" / "adapters" / "mine"), expected) < 1e-5


@pytest.mark.parametrize(
    "named, task", [("Qwen3ForCausalLM", "FEATURE_EXTRACTION"), ("Qwen3Model", "CAUSAL_LM")]
)
def test_an_adapter_keeps_the_names_of_the_class_that_it_is_for(tmp_path, named, task):
    """Qwen3-Embedding-0.6B names a class with a tied head, and is trained as AutoModel."""
    source, lora = make("Qwen3Model", "base class", tmp_path / "m"), tmp_path / "lora"
    edit_config(source, architectures=[named], tie_word_embeddings=True)
    auto = transformers.AutoModel if task == "FEATURE_EXTRACTION" else AutoModelForCausalLM
    adapter(source, lora, ["q_proj", "down_proj"], task=task, auto=auto)
    expected = hidden(opened(source, lora, auto=auto))
    convert(source, tmp_path / "bundle")
    convert(lora, tmp_path / "bundle" / "adapters" / "mine")
    convert(lora, tmp_path / "anew", base=source, canonical=True)
    for one in (lora, tmp_path / "bundle" / "adapters" / "mine", tmp_path / "anew"):
        assert apart(hidden(opened(source, one, auto=auto)), expected) < 1e-5
        found = check(one, base=source, runtime=["transformers"])
        assert found.verdicts == {"transformers": "right"}


def test_an_adapter_of_a_grown_vocabulary_is_merged(base, tmp_path):
    source, grown = base("Qwen3Model"), opened(base("Qwen3Model"))
    torch.manual_seed(3)
    grown.resize_token_embeddings(grown.config.vocab_size + 3, mean_resizing=False)
    config = peft.LoraConfig(
        task_type="FEATURE_EXTRACTION", r=4, target_modules=["q_proj"], init_lora_weights=False,
        modules_to_save=["embed_tokens"],
    )  # fmt: skip
    model = peft.get_peft_model(grown, config).eval()
    model.save_pretrained(tmp_path / "lora")
    merge(source, [tmp_path / "lora"], tmp_path / "merged")
    assert apart(states(tmp_path / "merged"), hidden(model)) < 1e-4
    merge(source, [tmp_path / "lora"], tmp_path / "merged.gguf", dtype="f32")
    (found,) = embeddings(tmp_path / "merged.gguf", [IDS])
    assert apart(found, hidden(model)) < 1e-5


def test_the_files_for_runtimes_embed(base, tmp_path, capsys):
    source, lora = base("Qwen3Model"), tmp_path / "lora"
    adapter(source, lora, ["q_proj", "v_proj"])
    written = write_usage(check(lora, base=source), tmp_path / "run", base=str(source))
    assert written.files == ["run_transformers.py", "run_llama_cpp.sh"]
    assert any("mlx" in reason and "the adapter embeds" in reason for reason in written.left_out)
    exec((tmp_path / "run" / "run_transformers.py").read_text(), {})
    assert "torch.Size([1, " in capsys.readouterr().out
    lines = (tmp_path / "run" / "run_llama_cpp.sh").read_text()
    assert "--lora lora.gguf --embeddings" in lines and "llama-cli" not in lines


def test_a_delta_of_the_embedding_is_refused_beside_its_base_and_merged(base, tmp_path):
    """llama.cpp takes the embedding for a head, and would abort over its delta."""
    source, lora = base("Qwen3Model"), tmp_path / "lora"
    expected = adapter(source, lora, ["embed_tokens", "q_proj"])
    with pytest.raises(UnsupportedError, match="would use the delta for the head, too") as error:
        convert(lora, tmp_path / "lora.gguf", base=source)
    assert "merge BASE ADAPTER -o merged.gguf" in error.value.hint
    merge(source, [lora], tmp_path / "merged.gguf", dtype="f32")
    (found,) = embeddings(tmp_path / "merged.gguf", [IDS])
    assert apart(found, expected) < tolerance("Qwen3Model")


@pytest.mark.parametrize(
    "named, kind", [("mean_tokens", "MEAN"), ("cls_token", "CLS"), ("lasttoken", "LAST")]
)
def test_the_pooling_travels_to_llama_cpp(tmp_path, named, kind):
    source = make("Qwen3Model", "base class", tmp_path / "m", pooling=named)
    convert(source, tmp_path / "bundle", include=[], skip=["*"])
    convert(tmp_path / "bundle", tmp_path / "m.gguf", dtype="f32")
    rows = states(source)
    expected = {"MEAN": rows.mean(0), "CLS": rows[0], "LAST": rows[-1]}[kind]
    (found,) = embeddings(tmp_path / "m.gguf", [IDS], pooling="UNSPECIFIED")
    assert apart(found[0], expected) < 1e-5
    report = convert(tmp_path / "m.gguf", tmp_path / "back", to_format="safetensors")
    assert any("its pooling" in lost for lost in report.lost)
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("kind", ["Qwen3Model", "BertModel"])
@pytest.mark.parametrize("verb", ["eval", "generate", "train"])
def test_what_needs_a_head_says_so_and_its_advice_holds(base, tmp_path, capsys, kind, verb):
    source, bundle, data = base(kind), tmp_path / "bundle", tmp_path / "data.jsonl"
    convert(source, bundle)
    data.write_text('{"text": "Once upon a time."}\n')
    arguments = {
        "eval": [str(source), str(data)],
        "generate": [str(bundle), "--prompt", "Once"],
        "train": [str(bundle), str(data), "-o", str(tmp_path / "run"), "--quiet"],
    }
    with pytest.raises(SystemExit, match="3"):
        main([verb, *arguments[verb]])
    said = capsys.readouterr().err
    assert "has no output head to predict tokens with" in said
    assert "AutoModel" in said and "FEATURE_EXTRACTION" in said  # as the tests above follow it
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_lost_its_head_is_refused_and_can_be_declared_headless(tmp_path):
    source = make("LlamaModel", "prefix", tmp_path / "m")
    edit_config(source, architectures=["LlamaForCausalLM"])
    with pytest.raises(InputError, match=r"lm_head\.weight is missing") as error:
        convert(source, tmp_path / "m.gguf", dtype="f32")
    assert '"architectures": ["LlamaModel"]' in error.value.hint
    edit_config(source, architectures=["LlamaModel"])
    convert(source, tmp_path / "m.gguf", dtype="f32")
    (found,) = embeddings(tmp_path / "m.gguf", [IDS])
    assert apart(found, states(source)) < 1e-5


@pytest.mark.parametrize(
    "pooling, said",
    [
        ('{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}', "cls_token, mean_"),
        ('{"pooling_mode_weightedmean_tokens": true}', "weightedmean_tokens"),
        ('{"pooling_mode": "max"}', "says max"),
        ("[1]", "nothing that is known"),
    ],
)
def test_what_llama_cpp_does_not_do_behind_the_model_is_named(tmp_path, pooling, said):
    source = make("Qwen3Model", "base class", tmp_path / "m")
    for folder, text in (("1_Pooling", pooling), ("2_Dense", '{"in_features": 64}')):
        (source / folder).mkdir()
        (source / folder / "config.json").write_text(text)
    notes = convert(source, tmp_path / "m.gguf", dry_run=True).notes
    assert any(said in note and "mean, cls or last token" in note for note in notes)
    assert any(note.startswith("2_Dense, which") for note in notes)
    assert any("--pooling mean, cls or last" in note for note in notes)

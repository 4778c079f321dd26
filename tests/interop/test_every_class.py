"""Bundles of every class: transformers opens them, and computes what we decode."""

import warnings

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

import loraformat.transformers  # noqa: F401  registers the quantizer
from loraformat.families.plain_linears import names_part
from loraformat.families.table import family_of
from loraformat.model.architecture import is_decoder_linear
from loraformat.ops.convert.convert import convert
from tests.interop import every_class

#: Classes that differ: linears kept dense, heads, names, parts beside the layers. `make real` tries
#: all of them.
DIFFERENT = [
    *[("causal", one) for one in (
        "axk2", "bert", "deepseek_v32", "deepseek_v4", "dots3_note_text", "falcon_mamba",
        "gemma3n_text", "gemma4", "glm_moe_dsa", "hrm_text", "hy_v4", "jamba", "jetmoe",
        "kimi_linear", "mamba", "modernbert-decoder", "prophetnet", "qwen4_exp_text", "rembert",
        "xlnet")],
    *[("masked", one) for one in (
        "albert", "bert", "deberta-v2", "distilbert", "electra", "gte", "jina_embeddings_v3",
        "mobilebert", "modernbert", "neomme", "nomic_bert", "roberta", "ultrabert", "xlm")],
    *[("seq2seq", one) for one in (
        "bart", "encoder-decoder", "granite_speech", "longt5", "mt5", "switch_transformers", "t5",
        "t5gemma", "umt5")],
]  # fmt: skip
#: What transformers cannot open, and the patterns with which it can.
FOREIGN = {
    ("causal", "falcon"): ["*.query_key_value", "*.dense", "*.dense_h_to_4h", "*.dense_4h_to_h"],
    ("causal", "inkling2_text"): ["*.w13_weight"],
    ("masked", "ibert"): ["*.query", "*.key", "*.value", "*.dense"],
}


def assert_opened(task, model_type, path, **options):
    every_class.make(task, model_type).save_pretrained(path / "model")
    report = convert(path / "model", path / "bundle", **options)
    convert(path / "bundle", path / "dense", to_format="safetensors")
    ours = every_class.logits(task, every_class.opened(task, path / "dense"))
    theirs = every_class.logits(task, every_class.opened(task, path / "bundle"))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    return report


@pytest.mark.parametrize("task, model_type", DIFFERENT)
def test_logits_are_those_of_our_own_decoding(task, model_type, tmp_path):
    report = assert_opened(task, model_type, tmp_path)
    assert report.quantized
    assert not any("cannot open" in note for note in report.notes)


@pytest.mark.parametrize("task, model_type", FOREIGN)
def test_what_it_cannot_open_is_said_with_the_remedy(task, model_type, tmp_path):
    every_class.make(task, model_type).save_pretrained(tmp_path / "model")
    report = convert(tmp_path / "model", tmp_path / "bundle")
    told = [note for note in report.notes if "transformers cannot open the result" in note]
    assert "--to safetensors" in told[0]
    assert "--skip" in told[0]
    with pytest.raises(RuntimeError):
        every_class.opened(task, tmp_path / "bundle")
    skip = FOREIGN[task, model_type]
    report = assert_opened(task, model_type, tmp_path / "again", skip=skip)
    assert not any("cannot open" in note for note in report.notes)


def test_the_table_is_that_of_transformers():
    """Of each class: what is quantized, transformers replaces; and its head is known."""
    wrong, seen = {}, 0
    for task, model_type in every_class.all_types():
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = every_class.config_of(task, model_type)
                model = every_class.CLASSES[task][0].from_config(config)
        except (AttributeError, ImportError, ValueError, StrictDataclassError):
            continue  # of parts that are not there, or do not fit each other
        seen += 1
        family = family_of(model.config.to_dict())
        kept = sorted(model._keep_in_fp32_modules or ())
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
                continue
            linear = type(module) is torch.nn.Linear or isinstance(module, Conv1D)
            chosen = is_decoder_linear(f"{name}.weight", tuple(weight.shape), family.plain)
            known = names_part(name, family.foreign)
            if chosen and not known and not (linear and should_convert_module(name, kept)):
                wrong.setdefault(model_type, set()).add(name)
            heads = ["lm_head", *family.heads]
            if module is head and linear and should_convert_module(name, heads):
                wrong.setdefault(model_type, set()).add(name)
    assert not wrong
    assert seen > 230

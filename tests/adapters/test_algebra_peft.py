"""The algebra on disk, against PEFT: its adapters in, adapters that it computes with out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loraformat.cli import main
from loraformat.ops.adapter_output.output import write_adapter
from loraformat.ops.convert.convert import convert
from loraformat.ops.extract.extract import extract
from loraformat.ops.merge.merge import merge
from loraformat.ops.opening.adapter import open_adapter
from loraformat.testing import dense
from tests.adapters import peft_models
from tests.adapters.memory_adapters import distance, effects
from tests.adapters.test_peft_cases import CASES
from tests.torch_tensors import numbers

IDS = torch.arange(12)[None]
ALL = ["q_proj", "v_proj", "up_proj", "down_proj"]
ODD = {
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5},
    "alpha_pattern": {"v_proj": 3, r"^model\.layers\.0\.self_attn\.q_proj": 20},
}


def run(*arguments):
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in (*arguments, "--quiet")])
    assert left.value.code == 0


def model_of(path, **config):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=64, eos_token_id=1, bos_token_id=0,
            **{"tie_word_embeddings": False, **config},
        )
    )  # fmt: skip
    model.save_pretrained(path)
    return model


def adapter_of(base, path, seed=1, **options):
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, **options})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(path)
    return path


def logits(base, adapter=None, vocabulary=None):
    model = AutoModelForCausalLM.from_pretrained(base)
    if vocabulary:
        model.resize_token_embeddings(vocabulary)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()(IDS).logits.detach()


def peft_deltas(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    found = {name: (after[name] - before[name]).double() for name in before}
    return {name: d for name, d in found.items() if d.any()}


def config_of(path):
    return json.loads((Path(path) / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "base"
    model_of(path)
    return path


@pytest.mark.parametrize("options", [{}, ODD], ids=["plain", "rslora and patterns"])
def test_reduced_adapters_are_optimal_in_peft(base, tmp_path, options):
    source = adapter_of(base, tmp_path / "a", **options)
    whole = peft_deltas(base, source)
    run("reduce", source, "-o", tmp_path / "full", "--max-rank", "8")
    assert torch.allclose(logits(base, tmp_path / "full"), logits(base, source), atol=1e-5)
    run("reduce", source, "-o", tmp_path / "r2", "--rank", "2")
    config = config_of(tmp_path / "r2")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 2, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    for name, found in peft_deltas(base, tmp_path / "r2").items():
        s = torch.linalg.svdvals(whole[name])
        assert distance(found, whole[name]) == pytest.approx(float(s[2:].norm() / s.norm()),
                                                             abs=1e-4)  # fmt: skip


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_dtype_that_is_asked_for_is_written(base, tmp_path, dtype):
    source = adapter_of(base, tmp_path / "a")
    run("reduce", source, "-o", tmp_path / "out", "--rank", "2", "--dtype", dtype)
    run("combine", tmp_path / "out", tmp_path / "out", "-o", tmp_path / "again")  # keeps it
    wanted = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for name in ("out", "again"):
        written = load_file(tmp_path / name / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in written.values()} == {wanted}


@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_combined_adapters_are_the_sum_in_peft(base, tmp_path, method):
    """peft#3761: PEFT's own combination of rsLoRA adapters and patterns is not."""
    one = adapter_of(base, tmp_path / "a", **ODD)
    other = adapter_of(base, tmp_path / "b", 2, r=3, target_modules=["q_proj", "o_proj"])
    rank = ["--rank", "16"] if method == "svd" else []
    run("combine", one, other, "-o", tmp_path / "sum", "--method", method, *rank,
        "--weight", "0.5", "--weight", "-2")  # fmt: skip
    deltas, more = peft_deltas(base, one), peft_deltas(base, other)
    found = peft_deltas(base, tmp_path / "sum")
    assert set(found) == set(deltas) | set(more)
    for name, d in found.items():
        wanted = 0.5 * deltas.get(name, torch.zeros(1)) - 2 * more.get(name, torch.zeros(1))
        assert distance(d, wanted) < 1e-4


@pytest.mark.parametrize("verb", ["reduce", "combine", "extract"])
def test_an_output_that_exists_is_refused_before_the_work(base, tmp_path, verb, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    words = {"reduce": ["--rank", "2"], "combine": [], "extract": [base, "--rank", "2"]}[verb]
    with pytest.raises(SystemExit) as left:  # the source does not even exist
        main([str(word) for word in (verb, tmp_path / "a", "-o", tmp_path / "out", *words)])
    assert left.value.code == 5
    assert "already exists" in capsys.readouterr().err


KINDS = [
    "patterns", "dora-rslora", "lora-bias", "bias-all", "saved", "tokens", "embedding",
    "conv1d-unset", "mixtral", "qwen3-moe", "qwen3-moe-rslora", "gpt-oss",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_goes_through_the_algebra(tmp_path, kind):
    """At full rank nothing is lost: PEFT computes what it computed before."""
    base, source = peft_models.trained(*CASES[kind], tmp_path)
    wanted = peft_models.logits(base, source)
    run("reduce", source, "-o", tmp_path / "same", "--max-rank", "64")
    assert torch.allclose(peft_models.logits(base, tmp_path / "same"), wanted, atol=3e-5)
    if "dora" in kind:
        return
    run("combine", source, tmp_path / "same", "-o", tmp_path / "half", "--method", "linear",
        "--weight", "1.5", "--weight", "-0.5")  # fmt: skip
    assert torch.allclose(peft_models.logits(base, tmp_path / "half"), wanted, atol=1e-4)


def test_statistics_on_disk_make_reduction_aware(base, tmp_path, capsys):
    source = adapter_of(base, tmp_path / "plain", **ODD)
    torch.manual_seed(5)
    inputs = {n: torch.randn(n, 400) * torch.logspace(0, -2, n)[:, None] for n in (64, 96)}
    with open_adapter(source) as adapter:
        deltas = {}
        for target, delta in adapter.deltas.items():
            z = numbers(delta.a) @ inputs[delta.in_features]
            moment = dense(f"{target}.moment", z @ z.T / 400)
            deltas[target] = replace(delta, second_moment=moment)
        wanted = effects(adapter)
        write_adapter(replace(adapter, deltas=deltas), tmp_path / "a")

    def output_error(path, target):
        with open_adapter(path) as adapter:
            found = effects(adapter)[target]
        x = inputs[found.shape[1]].double()
        return distance(found @ x, wanted[target] @ x)

    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["reduce", str(tmp_path / "a"), "-o", str(tmp_path / "aware"), "--rank", "2",
              "--json"])  # fmt: skip
    shown = capsys.readouterr()
    modules = {m["target"]: m for m in json.loads(shown.out)["modules"]}
    run("reduce", tmp_path / "a", "-o", tmp_path / "blind", "--rank", "2", "--no-statistics")
    run("reduce", tmp_path / "aware", "-o", tmp_path / "twice", "--rank", "1")
    run("reduce", tmp_path / "a", "-o", tmp_path / "once", "--rank", "1")
    for target, module in modules.items():
        assert module["activation_aware"]
        error = output_error(tmp_path / "aware", target)
        assert module["error"] == pytest.approx(error, rel=1e-3, abs=1e-6)
        if module["old_rank"] > 2:
            assert error < output_error(tmp_path / "blind", target)
        # The statistics went along: reducing twice is reducing once.
        assert output_error(tmp_path / "twice", target) == pytest.approx(
            output_error(tmp_path / "once", target), rel=1e-3
        )


# Extraction


def tune(model, *, vectors=False, grow=0):
    """Change matrices by rank 3, and vectors freely."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                m, n = parameter.shape
                parameter += 0.02 * torch.randn(m, 3) @ torch.randn(3, n)
            elif vectors:
                parameter += 0.1 * torch.randn_like(parameter)
    if grow:
        model.resize_token_embeddings(64 + grow, mean_resizing=False)
    return model


@pytest.mark.parametrize("grow", [0, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_extracted_adapters_are_the_fine_tune_in_peft(tmp_path, tied, grow):
    """Norms, biases, embeddings, tied heads and new tokens: everything that changed."""
    model = model_of(tmp_path / "base", tie_word_embeddings=tied, attention_bias=True)
    tune(model, vectors=True, grow=grow).save_pretrained(tmp_path / "tuned")
    run("extract", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "a", "--rank", "3")
    found = logits(tmp_path / "base", tmp_path / "a", 64 + grow if grow else None)
    assert torch.allclose(found, logits(tmp_path / "tuned"), atol=1e-5)
    if not grow:
        merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "merged")
        assert torch.allclose(logits(tmp_path / "merged"), logits(tmp_path / "tuned"), atol=1e-5)


@pytest.mark.parametrize("untied", ["base", "tuned"])
def test_a_head_that_only_one_model_has_tied(tmp_path, untied):
    model = model_of(tmp_path / "tied", tie_word_embeddings=True)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    tune(model).save_pretrained(tmp_path / "untied")
    pair = [tmp_path / "tied", tmp_path / "untied"]
    base, tuned = pair if untied == "tuned" else reversed(pair)
    report = extract(base, tuned, tmp_path / "a", rank=3)
    assert not report.left_out
    assert "lm_head.weight" in {module.target for module in report.modules}
    if untied == "tuned":  # PEFT's base has one weight for both, and shows each its own change
        assert torch.allclose(logits(base, tmp_path / "a"), logits(tuned), atol=1e-5)


@pytest.mark.parametrize("to_format", ["loraformat", "bitsandbytes"])
def test_quantized_bases_and_fine_tunes(base, tmp_path, to_format):
    quantized = tmp_path / "quantized"
    convert(base, quantized, to_format=to_format)
    source = adapter_of(base, tmp_path / "a")
    merge(quantized, [source], tmp_path / "tuned", dtype="f32")
    report = extract(quantized, tmp_path / "tuned", tmp_path / "found", rank=4)
    assert report.captured > 0.999999
    with open_adapter(source) as one, open_adapter(tmp_path / "found") as other:
        assert (other.base_fingerprint is not None) == (to_format == "loraformat")
        for target, d in effects(one).items():
            assert distance(effects(other)[target], d) < 1e-4
    merge(quantized, [tmp_path / "found"], tmp_path / "again", dtype="f32")
    # A fine-tune in NF4 differs from its base by what rounding made of the change.
    convert(tmp_path / "tuned", tmp_path / "tuned-4bit", to_format=to_format)
    report = extract(quantized, tmp_path / "tuned-4bit", tmp_path / "b", energy=0.5)
    assert all(module.captured >= 0.5 for module in report.modules)

"""The matrix: what an adapter has, and what each runtime is found to do with it."""

from __future__ import annotations

import json
import shutil

import features
import pytest

from loraformat.ops.check.check import check
from loraformat.runtimes.known import RUNTIMES
from loraformat.runtimes.rules import RULES

#: Found for every adapter of a llama, and tested apart.
ALWAYS = {"FORMAT", "ROW_ORDER"}
ALL = "transformers vllm sglang lorax llama.cpp ollama mlx"
SERVERS = "vllm sglang lorax llama.cpp ollama"

#: By feature: rule, and where it is found: those that fail, those that are warned.
EXPECTED: dict[str, dict[str, tuple[str, str]]] = {
    "plain": {},
    "rslora": {"RSLORA_IGNORED": ("sglang llama.cpp ollama", "")},
    "alpha_pattern": {"PATTERN_IGNORED": ("sglang lorax llama.cpp ollama", "")},
    "rank_pattern": {
        "PATTERN_IGNORED": ("sglang lorax", ""),
        "RANK_NOT_IN_SET": ("lorax", ""),
    },
    "all scalings": {
        "RSLORA_IGNORED": ("sglang llama.cpp ollama", ""),
        "PATTERN_IGNORED": ("sglang lorax llama.cpp ollama", ""),
        "RANK_NOT_IN_SET": ("lorax", ""),
    },
    "float alpha": {"ALPHA_NOT_INT": ("ollama", "")},
    "whole alpha as a float": {"ALPHA_NOT_INT": ("ollama", "")},
    "alpha 0": {"ALPHA_ZERO": ("llama.cpp ollama", "")},
    "rank 4": {"RANK_NOT_IN_SET": ("lorax", "")},
    "rank 24": {"RANK_NOT_IN_SET": ("lorax", "vllm")},
    "rank 48": {"RANK_NOT_IN_SET": ("", "vllm")},
    "rank 160": {"RANK_NOT_IN_SET": ("", "vllm"), "RANK_LIMIT": ("", "lorax")},
    "rank 600": {"RANK_LIMIT": ("vllm", "lorax"), "RANK_NOT_IN_SET": ("lorax", "")},
    "dora": {"DORA": (SERVERS, "")},
    "bias": {
        "BIAS": ("vllm lorax llama.cpp ollama", "sglang"),
        "LOAD_UNKNOWN": ("transformers", ""),  # the base has none
    },
    "lora_bias": {"BIAS": ("vllm lorax llama.cpp ollama", "sglang")},
    "trained norm": {"MODULES_TO_SAVE": ("vllm lorax llama.cpp ollama", "sglang")},
    "trained score": {
        "MODULES_TO_SAVE": ("lorax llama.cpp ollama", "sglang"),
        "CLASSIFIER": ("llama.cpp ollama", ""),
    },
    "trained tokens": {"TRAINED_TOKENS": (SERVERS, "")},
    "tokens beyond": {"TRAINED_TOKENS": (SERVERS, ""), "TOKENS_BEYOND": (ALL, "")},
    "grown head": {"VOCABULARY": (f"{SERVERS} mlx", ""), "LOAD_RESIZED": ("transformers", "")},
    "pissa": {
        "INIT_MUTATES_BASE": ("vllm sglang lorax llama.cpp ollama mlx", "transformers"),
    },
    "alora": {"ALORA": ("sglang lorax llama.cpp ollama mlx", "vllm")},
    "loha": {
        "METHOD": ("vllm sglang lorax llama.cpp ollama mlx", "transformers"),
    },
    "kasa": {"METHOD": ("vllm sglang lorax llama.cpp ollama mlx", "transformers")},
    "q without v": {"QV_COUPLED": ("sglang", "")},
    "one layer": {"LAYERS_MISSING": ("lorax", "")},
    "half a pair": {"PAIR_MISSING": (ALL, "")},
    "no prefix": {
        "KEY_PREFIX": ("vllm lorax", "sglang llama.cpp ollama"),
        "LOAD_IGNORES": ("transformers", ""),
    },
    "left-over default": {"KEY_PREFIX": ("vllm lorax", "sglang llama.cpp ollama")},
    "compiled": {
        "KEY_PREFIX": ("vllm lorax", "sglang llama.cpp ollama"),
        "LOAD_IGNORES": ("transformers", ""),
    },
    "doubled prefix": {
        "FOREIGN_NAMES": ("vllm", ""),
        "LOAD_IGNORES": ("transformers", ""),
    },
    "projector beside it": {"OTHER_WEIGHTS": ("", ALL)},
    "never gathered": {"EMPTY": (ALL, "")},
    "no tensors": {"NO_TENSORS": (ALL, "")},
    "shards": {"SHARDED": (f"transformers {SERVERS}", "")},
    "float64": {"DTYPE": ("", SERVERS)},
    "nan": {"NONFINITE": (ALL, "")},
    "zero": {"ZERO_DELTA": ("", ALL)},
    "unknown module": {
        "TARGET_UNKNOWN": (f"{SERVERS} mlx", ""),
        "LOAD_UNKNOWN": ("transformers", ""),
    },
    "other shape": {
        "SHAPE_VS_BASE": (f"{SERVERS} mlx", ""),
        "LOAD_OTHER_BASE": ("transformers", ""),
    },
    "embedding": {"EMBEDDING": ("lorax", "vllm sglang")},
    "more tokens": {"TOKENIZER_CHANGED": ("", ALL)},
    "chat template": {"CHAT_TEMPLATE_CHANGED": ("", ALL)},
    "head": {},
}


def found_in(report) -> dict[str, tuple[set[str], set[str]]]:
    """Return the runtimes that fail and those that are warned, by rule."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for finding in report.findings:
        if finding.rule not in ALWAYS:
            sides = found.setdefault(finding.rule, (set(), set()))
            sides[finding.level == "warn"].add(finding.runtime)
    return found


@pytest.mark.parametrize("feature", EXPECTED)
def test_matrix(adapter, base, feature):
    report = check(adapter(feature), base=base)
    wanted = {
        rule: (set(fail.split()), set(warn.split()))
        for rule, (fail, warn) in EXPECTED[feature].items()
    }
    assert found_in(report) == wanted
    failing = {finding.runtime for finding in report.findings if finding.level == "fail"}
    assert {name for name, verdict in report.verdicts.items() if verdict == "wrong"} == failing
    assert report.failed == bool(failing)


def test_every_feature_and_every_rule_is_in_the_matrix():
    assert set(EXPECTED) == set(features.FEATURES)
    held_elsewhere = {
        "CONV1D",
        "MOE",
        "MOE_ONLY_FUSED",
        "EXPERTS_EACH",
        "EXPERTS_STACKED",
        "TIED_HEAD",
        "SHARED_BLOCK",
        "ARCHITECTURE",
        "BASE_HASH_MISMATCH",
        "BASE_REVISION",
        "LOAD_FAILS",
        "LOAD_UNPROVEN",
    }
    tested = {rule for rules in EXPECTED.values() for rule in rules} | held_elsewhere | ALWAYS
    assert tested == {rule.id for rule in RULES} | {"FORMAT"}


def test_every_treatment_is_of_a_rule():
    known = {rule.id for rule in RULES}
    for runtime in RUNTIMES.values():
        assert set(runtime.treats) <= known, runtime.name


def test_without_a_base_nothing_is_guessed(adapter):
    for feature in ("unknown module", "other shape", "more tokens", "chat template"):
        assert not found_in(check(adapter(feature)))


def test_what_is_said_of_a_scaling_is_what_it_would_be(adapter):
    """Trained with 16 / √8, taken for 16 / 8: 1 / √8 of it."""
    report = check(adapter("rslora"), runtime=["sglang"])
    assert "0.3536 times what it was trained to be in 14 of 14 modules" in report.findings[0].what
    report = check(adapter("alpha_pattern"), runtime=["sglang"])
    assert "0.25 to 4 times" in report.findings[0].what
    assert "in 3 of 14 modules" in report.findings[0].what


@pytest.mark.parametrize(
    ("named", "level"), [((), "warn"), (("llama.cpp",), "fail"), (("mlx", "ollama"), "fail")]
)
def test_another_format_fails_where_the_runtime_is_named(adapter, named, level):
    found = check(adapter("plain"), runtime=named).findings
    levels = {finding.level for finding in found if finding.rule == "FORMAT"}
    assert levels == {level}


def test_a_merge_makes_every_other_remedy_superfluous(adapter, base):
    """An adapter with DoRA and rsLoRA cannot be fixed: all of SGLang's findings say merge."""
    folder = adapter("dora")
    config = json.loads((folder / "adapter_config.json").read_text())
    other = folder.with_name("dora-and-rslora")
    shutil.copytree(folder, other)
    (other / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    found = check(other, base=base, runtime=["sglang", "llama.cpp"]).findings
    assert {f.rule for f in found} >= {"DORA", "RSLORA_IGNORED"}
    assert "FORMAT" not in {f.rule for f in found}
    assert all("loraformat merge" in f.command for f in found if f.rule != "ROW_ORDER")

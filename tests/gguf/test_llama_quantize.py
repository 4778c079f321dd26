"""``--dtype q4_k_m`` is refused with commands that lead to such a file."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
from bases import SMALL
from llama_runtime import log_probabilities
from loraformat_converters.gguf.container.reader import open_gguf
from loraformat_converters.gguf.container.types import GGMLType
from rewriting import rewrite

from loraformat.cli import main
from loraformat.demo import ADAPTERS
from loraformat.ops.encoding.llama_quantize import is_llama_type

PROMPTS = [[0, *range(first, first + 10)] for first in range(100, 1100, 100)]
#: What ``llama-quantize --help`` lists, build 11549, that is not written here.
LISTED = [
    "Q2_K",
    "Q2_K_S",
    "Q3_K",
    "Q3_K_S",
    "Q3_K_M",
    "Q3_K_L",
    "Q4_K",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ2_M",
    "IQ3_XXS",
    "IQ3_XS",
    "IQ3_S",
    "IQ3_M",
    "IQ4_NL",
    "IQ4_XS",
    "TQ1_0",
    "TQ2_0",
    "MXFP4_MOE",
]


@pytest.mark.parametrize("name", LISTED)
def test_its_types_are_known(name):
    assert is_llama_type(name) and is_llama_type(name.lower())


@pytest.mark.parametrize("word", ["f16", "q8_0", "q4_0", "q5_1", "q4", "k", "q9_k", "nf4", ""])
def test_others_are_not_its(word):
    assert not is_llama_type(word)


def commands(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "llama-quantize writes" in said
    first, last = said.split("run: ")[1].split("; then: ")
    return shlex.split(first), shlex.split(last)


@pytest.mark.parametrize("target", ["my model.gguf", "out"])
def test_the_way_that_is_named_leads_there(target, tmp_path, capsys):
    """The second program is not here: ggml's own quantizer does to matrices what it would do."""
    made, quantize = commands(
        capsys, "convert", SMALL, tmp_path / target, "--dtype", "q4_k_m"
    )  # fmt: skip
    assert quantize[0] == "llama-quantize" and quantize[3] == "Q4_K_M"
    assert quantize[1] == made[-3] and made[-2:] == ["--dtype", "f16"]
    with pytest.raises(SystemExit) as ended:
        main(made[1:])
    assert ended.value.code == 0
    with open_gguf(tmp_path / made[-3]) as file:
        assert {tensor.type.name for tensor in file.tensors.values()} == {"F16", "F32"}
    rewrite(tmp_path / made[-3], tmp_path / "q4_k.gguf", kind=GGMLType.Q4_K)
    one, other = (
        log_probabilities(path, PROMPTS) for path in (tmp_path / made[-3], tmp_path / "q4_k.gguf")
    )
    assert 1e-4 < float((np.exp(one) * (one - other)).sum(1).mean()) < 0.1


def test_of_a_merge_it_is_the_merge(tmp_path, capsys):
    lora = ADAPTERS["manual"]
    made, quantize = commands(
        capsys, "merge", SMALL, lora, "--weight", "0.5", "-o", tmp_path / "m.gguf",
        "--dtype", "IQ4_XS",
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(made[1:])
    assert ended.value.code == 0
    assert quantize[1:] == [
        str(tmp_path / "m-f16.gguf"), str(tmp_path / "m.gguf"), "IQ4_XS"
    ]  # fmt: skip
    assert (tmp_path / "m-f16.gguf").exists() and not (tmp_path / "m.gguf").exists()


def test_a_word_that_nobody_knows_is_a_slip(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(SMALL), str(tmp_path / "out"), "--dtype", "q4"])
    assert ended.value.code == 2 and "llama-quantize" not in capsys.readouterr().err

"""Files of other programs are read as those programs read them, and survive being rewritten."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from loraformat import convert, info, merge, verify
from loraformat.card import front_matter
from loraformat.demo import ADAPTERS, SMALL_MODEL
from loraformat.errors import InputError
from loraformat.model.config_json import parse
from loraformat.model.tied_head import untied_config
from loraformat.storage import foreign_json

#: What json.loads takes, and strict JSON does not have.
ODD = (
    '"time_step_limit": [0.0, Infinity], "marked": [{"__float__": "-Infinity"}], "none": NaN, '
    f'"long": {10**30 - 7}, "twice": 1, "twice": 2, '
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return the small model with a config that holds odd values."""
    path = tmp_path / "model"
    shutil.copytree(SMALL_MODEL, path)
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace("{", "{" + ODD, 1))
    return path


def seen_by_transformers(path: Path) -> str:
    from transformers import AutoConfig

    values = vars(AutoConfig.from_pretrained(path))
    assert values["time_step_limit"] == [0.0, math.inf] and values["marked"] == [-math.inf]
    assert math.isnan(values["none"]) and values["long"] == 10**30 - 7 and values["twice"] == 2
    changed = ("_name_or_path", "quantization_config", "dtype")
    return repr({key: value for key, value in values.items() if key not in changed})


def test_odd_values_survive_every_way_of_a_config(model: Path, tmp_path: Path) -> None:
    wanted = seen_by_transformers(model)
    bundle, dense = tmp_path / "bundle", tmp_path / "dense"
    convert(model, bundle)
    convert(bundle, dense, to="safetensors", dtype="float16")
    merge(model, [ADAPTERS["manual"]], tmp_path / "merged")
    assert verify(bundle).findings == []
    for path in (bundle, dense, tmp_path / "merged"):
        assert seen_by_transformers(path) == wanted
        assert info(path).model_type == "llama"


def test_a_config_that_need_not_change_keeps_its_bytes(model: Path, tmp_path: Path) -> None:
    before = (model / "config.json").read_bytes()
    convert(model, tmp_path / "plain", skip=["*"])
    assert (tmp_path / "plain/config.json").read_bytes() == before
    assert verify(tmp_path / "plain").findings == []


def test_an_adapter_is_carried_as_peft_reads_it(model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    adapter = tmp_path / "adapter"
    shutil.copytree(ADAPTERS["manual"], adapter)
    file = adapter / "adapter_config.json"
    file.write_text(file.read_text().replace("{", '{"lora_alpha": 7, "note": NaN, ', 1))
    wanted = LoraConfig.from_pretrained(adapter).lora_alpha
    convert(model, tmp_path / "bundle")
    convert(adapter, tmp_path / "bundle/adapters/a")
    carried = tmp_path / "bundle/adapters/a/adapter_config.json"
    assert carried.read_bytes() == file.read_bytes()
    assert verify(tmp_path / "bundle").findings == [] and wanted != 7
    assert info(adapter).alphas == [wanted]


def test_rewriting_keeps_the_form_of_an_infinity() -> None:
    written = untied_config(b'{"a": Infinity, "b": {"__float__": "Infinity"}, "c": -Infinity}')
    assert b'"a": Infinity' in written and b'"__float__": "Infinity"' in written
    assert parse(written) == {"a": math.inf, "b": math.inf, "c": -math.inf} | {
        "tie_word_embeddings": False
    }


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b'{"a": }',
        b"{'a': 1}",
        b'{"a": 1}x',
        b"\xef\xbb\xbf{}",
        b'"\xff"',
        b'"\\ud800"',
        b"9" * 4301,
        b"[" * 129 + b"]" * 129,
        b"[" * 10**6,
        b'{"a":' * 10**5,
    ],
)
def test_what_its_owner_cannot_read_is_refused(text: bytes) -> None:
    with pytest.raises(foreign_json.ForeignJsonError):
        foreign_json.loads(text)


def test_what_python_reads_is_read() -> None:
    for text in (
        b"[NaN, 1e999, -Infinity]",
        b"9" * 4300,
        b"[" * 128 + b"]" * 128,
        b'"' + b"[" * 500 + b'"',
        b'"\\ud83d\\udc0d"',
        b'{"a": 1, "a": [2]}',
    ):
        assert repr(foreign_json.loads(text)) == repr(json.loads(text))


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("model_type", ["llama"]),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [1]),
        ("text_config", []),
        ("tie_word_embeddings", "yes"),
    ],
)
def test_a_member_of_another_type_is_named(tmp_path: Path, member: str, value: object) -> None:
    shutil.copytree(SMALL_MODEL, tmp_path / "base")
    file = tmp_path / "base/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {member: value}))
    with pytest.raises(InputError, match=rf"config\.json: {member} "):
        merge(tmp_path / "base", [ADAPTERS["manual"]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["256", [256], {}, True])
def test_a_length_that_is_no_number_is_named(tmp_path: Path, value: object) -> None:
    from loraformat.train.data.tokenizer import open_tokenizer

    shutil.copytree(SMALL_MODEL, tmp_path / "model")
    file = tmp_path / "model/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": value}))
    with pytest.raises(InputError, match=r"tokenizer_config\.json: model_max_length is .* number"):
        open_tokenizer(tmp_path / "model")


def test_a_length_of_31_digits_is_a_length(tmp_path: Path) -> None:
    from loraformat.train.data.tokenizer import open_tokenizer

    shutil.copytree(SMALL_MODEL, tmp_path / "model")
    file = tmp_path / "model/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": int(1e30)}))
    assert open_tokenizer(tmp_path / "model").tokenize("a line").ids
    convert(tmp_path / "model", tmp_path / "model.gguf")


@pytest.mark.parametrize("tag", ["!!bool x", "!!timestamp x", f"0x{'f' * 5000}", "!!int x", "*a"])
def test_yaml_that_cannot_be_read_is_a_card_that_cannot(tag: str) -> None:
    with pytest.raises(InputError, match="front matter"):
        front_matter.split(f"---\nlicense: {tag}\n---\n# Title\n")


def test_numbers_that_no_float_holds_are_named(tmp_path: Path) -> None:
    shutil.copytree(ADAPTERS["manual"], tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 10**400}))
    with pytest.raises(InputError, match=r"lora_alpha is 1000.*wanted a finite number"):
        info(tmp_path / "adapter")

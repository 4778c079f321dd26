"""Licence, name, languages, tags and base models go with a model, whatever its format."""

from __future__ import annotations

import shutil

import gguf
import pytest
import yaml
from bases import SMALL
from gguf.metadata import Metadata
from loraformat_converters.gguf.container.reader import open_gguf
from loraformat_converters.gguf.container.types import ValueType
from loraformat_converters.gguf.container.values import GGUFValue
from rewriting import rewrite

from loraformat.demo import ADAPTERS
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge

SAID = {
    "general.name": "Gemma 3 270m",
    "general.license": "gemma",
    "general.license.link": "https://ai.google.dev/gemma/terms",
    "general.organization": "Google",
    "general.basename": "gemma-3",
    "general.size_label": "270M",
    "general.tags": ["gemma3", "text-generation"],
    "general.languages": ["en", "de"],
    "general.base_model.count": 1,
    "general.base_model.0.name": "gemma-3-270m",
    "general.base_model.0.organization": "google",
    "general.base_model.0.repo_url": "https://huggingface.co/google/gemma-3-270m",
}


def value(said):
    if isinstance(said, list):
        return GGUFValue.of_array(ValueType.STRING, said)
    kind = ValueType.UINT32 if isinstance(said, int) else ValueType.STRING
    return GGUFValue.of(kind, said)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A file as others publish it."""
    place = tmp_path_factory.mktemp("others")
    convert(SMALL, place / "ours.gguf", dtype="f32")
    keys = {key.replace(".", "__"): value(said) for key, said in SAID.items()}
    strange = {"general__sampling__top_k": GGUFValue.of(ValueType.INT32, 20)}
    return rewrite(
        place / "ours.gguf", place / "model.gguf", drop=("loraformat.",), **keys, **strange
    )


def said_by(path):
    fields = gguf.GGUFReader(path).fields
    return {key: fields[key].contents() for key in SAID if key in fields}


def front(path):
    return yaml.safe_load((path / "README.md").read_text().split("---\n")[1])


@pytest.mark.parametrize("way", [["bundle"], ["safetensors"], ["bundle", "safetensors"], []])
def test_through_every_format_and_back(others, way, tmp_path):
    path = others
    for number, form in enumerate(way):
        target = tmp_path / f"{number}"
        convert(path, target, to_format={"bundle": "loraformat"}.get(form, form))
        path = target
    convert(path, tmp_path / "back.gguf", dtype="q8_0")
    assert said_by(tmp_path / "back.gguf") == SAID


def test_a_directory_says_it_as_the_hub_reads_it(others, tmp_path):
    report = convert(others, tmp_path / "dense", to_format="safetensors")
    fields = front(tmp_path / "dense")
    assert (fields["license"], fields["language"]) == ("gemma", ["en", "de"])
    assert fields["base_model"] == ["google/gemma-3-270m"]
    assert any("general.sampling.top_k" in loss for loss in report.lost)
    peer = Metadata.load(model_path=tmp_path / "dense")  # llama.cpp's own converter
    assert (peer.license, peer.languages, peer.name) == ("gemma", ["en", "de"], "Gemma 3 270m")
    assert (peer.organization, peer.basename, peer.size_label) == ("Google", "gemma-3", "270M")
    assert peer.license_link == SAID["general.license.link"]
    assert set(SAID["general.tags"]) <= set(peer.tags)


def test_a_merge_keeps_it(others, tmp_path):
    merge(others, [ADAPTERS["manual"]], tmp_path / "merged.gguf")
    assert said_by(tmp_path / "merged.gguf") == SAID
    merge(others, [ADAPTERS["manual"]], tmp_path / "merged")
    assert front(tmp_path / "merged")["license"] == "gemma"


def test_a_card_of_people_is_read(tmp_path):
    base = shutil.copytree(SMALL, tmp_path / "base")
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlanguage: fr\npipeline_tag: text-generation\n"
        "base_model: [org/a, org/b]\n---\n# Words\n"
    )
    (base / "LICENSE").write_text("All of it.")
    report = convert(base, tmp_path / "model.gguf")
    with open_gguf(tmp_path / "model.gguf") as file:
        assert (
            file.text("general.license") == "other" and file.text("general.license.name") == "mine"
        )
        assert file.array("general.languages") == ["fr"]
        assert file.array("general.tags") == ["text-generation"]
        assert file.integer("general.base_model.count") == 2
        assert file.text("general.base_model.1.repo_url") == "https://huggingface.co/org/b"
    (note,) = [note for note in report.notes if "publish separately" in note]
    assert "LICENSE" in note and "README.md (its front matter is kept)" in note


def test_a_file_of_ours_makes_no_card_of_its_name_alone(tmp_path):
    bare = shutil.copytree(SMALL, tmp_path / "bare", ignore=shutil.ignore_patterns("README.md"))
    convert(bare, tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "dense", to_format="safetensors")
    assert not (tmp_path / "dense" / "README.md").exists()


@pytest.mark.parametrize(
    "strange",
    [
        {"general__license": GGUFValue.of(ValueType.UINT32, 3)},
        {"general__license": GGUFValue.of(ValueType.STRING, "x" * 5000)},
        {"general__tags": GGUFValue.of_array(ValueType.INT32, [1, 2])},
        {"general__base_model__0__repo_url": GGUFValue.of(ValueType.BOOL, True)},
    ],
)
def test_what_is_no_text_is_passed_over(others, strange, tmp_path):
    rewrite(others, tmp_path / "odd.gguf", **strange)
    convert(tmp_path / "odd.gguf", tmp_path / "dense", to_format="safetensors")
    key = next(iter(strange)).split("__")[1]
    assert key not in front(tmp_path / "dense")


def test_text_that_would_be_yaml_stays_text(others, tmp_path):
    said = "mit\n---\nlicense: stolen\n# x: [&a *a"
    rewrite(others, tmp_path / "odd.gguf", general__license=GGUFValue.of(ValueType.STRING, said))
    convert(tmp_path / "odd.gguf", tmp_path / "dense", to_format="safetensors")
    convert(tmp_path / "dense", tmp_path / "back.gguf")
    with open_gguf(tmp_path / "back.gguf") as file:
        assert file.text("general.license") == said

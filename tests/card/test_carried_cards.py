"""The card of a bundle is true of the bundle: what is made of it carries people's words alone."""

from dataclasses import replace

import pytest

from loraformat.card import Base, BundleFacts, bundle_card
from loraformat.card.document import BEGIN
from loraformat.demo import ADAPTERS, SMALL_MODEL
from loraformat.ops.convert.convert import convert
from loraformat.ops.info.model import info
from loraformat.ops.merge.merge import merge
from loraformat.ops.verify import verify

QUANTIZED = replace(info(SMALL_MODEL), block_sizes=[64], bits_per_weight=4.8)
DOCUMENT = bundle_card(BundleFacts("me/bundle", Base("org/base"), QUANTIZED, []))
WORDS = "---\nlicense: mit\ntags:\n- python\n---\n# A model\n\nIts words.\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    convert(SMALL_MODEL, path)
    return path


def outputs(bundle, folder):
    """Writes all that can be made of a bundle; returns the directories."""
    convert(bundle, folder / "dense", to_format="safetensors")
    convert(bundle, folder / "again")
    merge(bundle, [ADAPTERS["manual"]], folder / "merged")
    merge(bundle, [ADAPTERS["manual"]], folder / "beside", to="loraformat", name="manual")
    return [folder / name for name in ("dense", "again", "merged", "beside")]


def test_a_generated_card_stays_behind(bundle, tmp_path):
    (bundle / "README.md").write_text(DOCUMENT.render())
    for made in outputs(bundle, tmp_path):
        assert not (made / "README.md").exists(), made.name
        assert (made / "tokenizer.json").is_file()
    assert not verify(tmp_path / "again").findings
    assert (bundle / "README.md").read_text() == DOCUMENT.render()


def test_the_licence_of_a_generated_card_comes_along(bundle, tmp_path):
    card = DOCUMENT.render().replace("---\n", "---\nlicense: gemma\nlanguage: [en]\n", 1)
    (bundle / "README.md").write_text(card)
    for made in outputs(bundle, tmp_path):
        kept = (made / "README.md").read_text()
        assert kept == "---\nlicense: gemma\nlanguage:\n- en\nbase_model: org/base\n---\n"


def test_words_that_people_wrote_come_along_without_what_was_generated(bundle, tmp_path):
    card = DOCUMENT.render(WORDS)
    assert "4.800 bits per weight" in card
    assert "base_model_relation: quantized" in card
    (bundle / "README.md").write_text(card)
    for made in outputs(bundle, tmp_path):
        kept = (made / "README.md").read_text()
        assert kept.endswith("---\n# A model\n\nIts words.\n")
        assert "license: mit\n" in kept
        assert "tags:\n- python\nbase_model: org/base\n" in kept
        for untrue in (BEGIN, "bits per weight", "quantized", "nf4", "f" * 64):
            assert untrue not in kept, (made.name, untrue)


@pytest.mark.parametrize("card", [WORDS.encode(), b"\xff\xfe no text", b"---\nlicense: [\n---\n"])
def test_a_card_that_nobody_generated_is_carried_as_it_is(bundle, tmp_path, card):
    (bundle / "README.md").write_bytes(card)
    convert(bundle, tmp_path / "dense", to_format="safetensors")
    assert (tmp_path / "dense" / "README.md").read_bytes() == card

"""A GGUF base says of which bundle it was made: an adapter of another one is refused with it."""

from __future__ import annotations

import pytest
from bases import SMALL
from loraformat_converters.gguf.container.reader import open_gguf
from loraformat_converters.gguf.container.types import ValueType
from loraformat_converters.gguf.container.values import GGUFValue
from rewriting import rewrite

from loraformat.errors import InputError
from loraformat.ops.check.check import check
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge
from loraformat.ops.opening.model import fingerprint_of, open_model, origin_fingerprint

KEY = "loraformat.base.fingerprint"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A GGUF adapter of a bundle, and two GGUF bases: of that bundle, and of another."""
    folder = tmp_path_factory.mktemp("descent")
    convert(SMALL, folder / "bundle")
    convert(SMALL, folder / "other", block_size=128)
    convert(SMALL.parent / "small_adapters" / "manual", folder / "bundle" / "adapters" / "a")
    convert(folder / "bundle" / "adapters" / "a", folder / "lora.gguf")
    for name in ("bundle", "other"):
        convert(folder / name, folder / f"{name}.gguf", dtype="q8_0")
    return folder


def test_it_is_of_the_bundle_and_is_not_the_bundle(made):
    with open_model(made / "bundle") as bundle, open_model(made / "bundle.gguf") as base:
        assert fingerprint_of(base) is None
        assert origin_fingerprint(base) == fingerprint_of(bundle) == origin_fingerprint(bundle)


def test_its_adapter_goes_with_it(made, tmp_path):
    convert(made / "lora.gguf", tmp_path / "back", base=made / "bundle.gguf")
    report = merge(made / "bundle.gguf", [made / "lora.gguf"], tmp_path / "merged.gguf")
    assert any("of which this gguf file was made" in note for note in report.notes)
    with open_gguf(tmp_path / "merged.gguf") as merged:
        assert KEY not in merged.metadata, "it is another model"
    assert not check(made / "lora.gguf", base=made / "bundle.gguf", runtime=["llama.cpp"]).failed


def test_that_of_another_is_refused(made, tmp_path):
    adapter, base = made / "lora.gguf", made / "other.gguf"
    for act in (
        lambda: convert(adapter, tmp_path / "x", base=base),
        lambda: merge(base, [adapter], tmp_path / "y"),
    ):
        with pytest.raises(InputError, match=r"this one was made of [0-9a-f]{12}") as refused:
            act()
        assert "--allow-base-mismatch" in str(refused.value.hint)
    assert not list(tmp_path.iterdir())
    forced = convert(adapter, tmp_path / "x", base=base, allow_base_mismatch=True)
    report = merge(base, [adapter], tmp_path / "y", allow_base_mismatch=True)
    for notes in (forced.notes, report.notes):
        assert any("may not work on this base" in note for note in notes)
    found = check(adapter, base=base, runtime=["llama.cpp"])
    assert "BASE_HASH_MISMATCH" in {finding.rule for finding in found.findings}


def test_another_type_is_of_the_same_bundle(made, tmp_path):
    convert(made / "bundle.gguf", tmp_path / "small.gguf", dtype="q4_0")
    with open_gguf(tmp_path / "small.gguf") as one, open_gguf(made / "bundle.gguf") as other:
        assert one.text(KEY) == other.text(KEY)


@pytest.mark.parametrize(
    "value",
    [
        GGUFValue.of(ValueType.STRING, "me"),
        GGUFValue.of(ValueType.STRING, "\x1b[31m" * 16),
        GGUFValue.of(ValueType.UINT32, 7),
    ],
)
def test_what_is_no_fingerprint_is_none(made, value, tmp_path):
    rewrite(made / "bundle.gguf", tmp_path / "x.gguf", **{KEY.replace(".", "__"): value})
    with open_model(tmp_path / "x.gguf") as base:
        assert origin_fingerprint(base) is None

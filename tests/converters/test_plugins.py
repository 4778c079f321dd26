"""The door to converters: names, outputs, and plugins that are broken."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from loraformat import plugins
from loraformat.errors import (
    InputError,
    LoraFormatError,
    MissingDependencyError,
    UnsupportedError,
    UsageError,
)
from loraformat.plugins import AdapterFormat, BaseFormat

KNOWN = {"loraformat", "safetensors", "bitsandbytes"}

#: Converters that the entry points below name.
MODULE = "loraformat_test_plugins"


@pytest.fixture
def announce(monkeypatch):
    """Return a function that makes converters look installed, by name of the entry point."""
    real = list(plugins.entry_points(group=plugins.GROUP))
    extra = []

    def clear():
        plugins._entry_points.cache_clear()
        plugins._load.cache_clear()

    def install(name, converter=None, value=None):
        module = sys.modules.setdefault(MODULE, type(sys)(MODULE))
        attribute = f"CONVERTER_{len(extra)}"
        setattr(module, attribute, converter)
        extra.append(EntryPoint(name, value or f"{MODULE}:{attribute}", plugins.GROUP))
        clear()

    monkeypatch.setattr(plugins, "entry_points", lambda group: [*real, *extra])
    clear()
    yield install
    monkeypatch.undo()
    sys.modules.pop(MODULE, None)
    clear()


def record(name="toy", kind=BaseFormat, **fields):
    defaults = {"summary": "a toy", "sniff": lambda path: False, "read": lambda *a: None}
    return kind(name=name, **defaults | fields)


def output(path, name=None, kind=BaseFormat):
    return plugins.for_output(Path(path), name, kind, "loraformat")


class TestFinding:
    def test_ours_come_through_entry_points(self):
        assert {converter.name for converter in plugins.all_converters()} >= KNOWN

    def test_an_unknown_name_lists_the_known(self):
        with pytest.raises(
            UsageError, match=r"unknown format 'ggml', wanted one of awq, bitsandbytes, "
        ):
            plugins.get("ggml")

    def test_a_stranger_is_found(self, announce):
        toy = record()
        announce("toy", toy)
        assert plugins.get("toy") is toy
        assert toy in plugins.all_converters()

    def test_names_are_sorted(self, announce):
        announce("aaa", record("aaa"))
        names = [converter.name for converter in plugins.all_converters()]
        assert names == sorted(names)


class TestBrokenPlugins:
    def test_two_packages_of_one_name(self, announce):
        announce("toy", record())
        announce("toy", record())
        pattern = r"two packages provide a converter 'toy': .*CONVERTER_0 and .*1; uninstall one"
        with pytest.raises(LoraFormatError, match=pattern):
            plugins.get("safetensors")

    def test_ours_cannot_be_replaced_silently(self, announce):
        announce("safetensors", record("safetensors"))
        with pytest.raises(LoraFormatError, match="two packages provide a converter 'safetensors'"):
            plugins.all_converters()

    def test_one_package_seen_twice_is_one(self, announce):
        announce("toy", record())
        announce("toy", value=f"{MODULE}:CONVERTER_0")
        assert plugins.get("toy").name == "toy"

    @pytest.mark.parametrize(
        "value, reason",
        [
            ("no_such_module_at_all:CONVERTER", "ModuleNotFoundError"),
            ("json:NO_SUCH_NAME", "AttributeError"),
        ],
    )
    def test_one_that_cannot_be_imported(self, announce, value, reason):
        announce("toy", value=value)
        with pytest.raises(LoraFormatError, match=f"'toy' .*cannot be loaded: {reason}.*uninstall"):
            plugins.get("toy")
        assert plugins.get("safetensors").name == "safetensors", "others still work by name"

    @pytest.mark.parametrize(
        "value", [None, "a string", record("another")], ids=["None", "text", "other"]
    )
    def test_one_that_is_no_record_of_that_name(self, announce, value):
        announce("toy", value)
        with pytest.raises(LoraFormatError, match="is not a Format named 'toy'"):
            plugins.get("toy")

    def test_a_missing_dependency_says_what_to_install(self, announce):
        needs = ("numpy", "no-such-package")
        announce("toy", record(requires=needs))
        with pytest.raises(MissingDependencyError) as caught:
            plugins.get("toy")
        assert str(caught.value) == (
            "the toy converter needs no-such-package; run: pip install no-such-package"
        )
        assert "toy" in [c.name for c in plugins.all_converters()], "it is listed all the same"


class TestSniffing:
    def test_a_path_that_does_not_exist(self, tmp_path):
        with pytest.raises(InputError, match="no such file or directory"):
            plugins.sniff(tmp_path / "nothing")

    def test_nobody_knows_it(self, tmp_path):
        with pytest.raises(UnsupportedError, match="contains no model in a known format"):
            plugins.sniff(tmp_path)

    def test_two_know_it(self, announce, tmp_path):
        announce("one", record("one", sniff=lambda path: True))
        announce("two", record("two", sniff=lambda path: True))
        with pytest.raises(
            UnsupportedError, match="looks like one and two; choose one with --from"
        ):
            plugins.sniff(tmp_path)

    def test_one_that_fails_is_named(self, announce, tmp_path):
        announce("toy", record(sniff=lambda path: 1 // 0))
        with pytest.raises(
            LoraFormatError, match=r"'toy' fails to detect the format: ZeroDivisionError"
        ):
            plugins.sniff(tmp_path)

    def test_a_missing_dependency_of_the_one_that_knows(self, announce, tmp_path):
        needs = ("no-such-package",)
        announce("toy", record(sniff=lambda path: True, requires=needs))
        with pytest.raises(MissingDependencyError, match="pip install no-such-package"):
            plugins.sniff(tmp_path)


class TestOutputs:
    def test_a_directory_becomes_a_bundle(self):
        assert output("out").name == "loraformat"
        assert output("v1.0").name == "loraformat"

    def test_the_word_wins_over_the_suffix(self, announce):
        announce("toy", record(write=lambda *a: None, suffixes=(".toy",)))
        assert output("out.toy").name == "toy"
        assert output("out.toy", "safetensors").name == "safetensors"

    def test_the_suffix_chooses_by_kind(self, announce):
        announce("toy", record(write=lambda *a: None, suffixes=(".toy",)))
        lora = record("toy-lora", kind=AdapterFormat, write=lambda *a: None, suffixes=(".toy",))
        announce("toy-lora", lora)
        assert output("out.toy").name == "toy"
        assert output("out.toy", kind=AdapterFormat).name == "toy-lora"

    @pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "config.json"])
    def test_a_suffix_that_nobody_writes(self, name):
        with pytest.raises(
            UsageError, match=r"no installed converter writes a base as .*give a directory"
        ):
            output(name)

    def test_a_format_that_is_only_read(self, announce):
        announce("toy", record())
        with pytest.raises(UsageError, match="'toy' can be read but not written"):
            output("out", "toy")

    def test_a_format_of_the_other_kind(self, announce):
        announce("toy-lora", record("toy-lora", kind=AdapterFormat, write=lambda *a: None))
        with pytest.raises(UsageError, match="'toy-lora' is for an adapter, and this is a base"):
            output("out", "toy-lora")

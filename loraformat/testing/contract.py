"""Contract tests that every converter must pass.

::

    from loraformat.testing import ConverterContract
    from loraformat_npz import CONVERTER


    class TestNpz(ConverterContract):
        converter = CONVERTER

pytest finds the tests in the class. A format that cannot hold everything says so by overriding
a hook: `ConverterContract.samples` if it needs certain names or types, ``carries_files`` and
``keeps_config`` if it has no room for them, ``hostile`` for the bad files that only it knows.

The builders (`dense`, `nf4`, `checkpoint`, `save`, `contents`) make small models in memory and
look at them; use them in your own tests as well. pytest is imported here and nowhere else in
the package.
"""

from __future__ import annotations

import os
import re
import shutil
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

import numpy
import pytest

from loraformat import plugins
from loraformat.errors import InputError, LoraFormatError
from loraformat.model.checkpoint import Checkpoint, DenseTensor, LazyTensor
from loraformat.model.nf4_parts import NF4Parts
from loraformat.ops.convert.convert import convert
from loraformat.plugins import BaseFormat, ReadOptions, WriteOptions
from loraformat.shards.layout import DEFAULT_SHARD_LIMIT
from loraformat.storage.atomic_file import open_publication
from loraformat.testing.models import carried, dense, samples

__all__ = ["ConverterContract", "contents", "file_tree", "save"]

_MIB = 1 << 20


# --- Writing them and looking at them -------------------------------------------------------


def save(
    converter: BaseFormat,
    model: Checkpoint,
    target: Path,
    *,
    shard_limit: int = DEFAULT_SHARD_LIMIT,
) -> Path:
    """Write a model with a converter, as ``loraformat convert`` would, and return the path."""
    assert converter.write is not None, f"{converter.name} has no writer; override make()"
    reported: list[int] = []
    with open_publication(converter.output, target, plan="test") as output:
        written = converter.write(model, output, WriteOptions(shard_limit, reported.append))
        output.commit()
    expected = sum(tensor.nbytes for tensor in model.tensors.values())
    assert written.nbytes >= expected, f"{written.nbytes} bytes written, says the writer"
    assert sum(reported) == expected, f"progress reported {sum(reported)} of {expected} bytes"
    return target


def contents(model: Checkpoint) -> dict[str, tuple[Any, ...]]:
    """Load every tensor of a model and return all that makes it what it is, for comparing."""
    return {name: _content(tensor) for name, tensor in model.tensors.items()}


def _content(tensor: LazyTensor) -> tuple[Any, ...]:
    loaded = tensor.load()
    if isinstance(tensor, DenseTensor):
        assert isinstance(loaded, memoryview), f"{tensor.name}: load() returned {type(loaded)}"
        assert (loaded.format, loaded.ndim) == ("B", 1), f"{tensor.name}: not flat bytes"
        found: tuple[Any, ...] = ("dense", tensor.dtype, tensor.shape, bytes(loaded))
    else:
        assert isinstance(loaded, NF4Parts), f"{tensor.name}: load() returned {type(loaded)}"
        parts = {suffix: bytes(view) for suffix, view in loaded.by_suffix().items()}
        facts = (tensor.block_size, tensor.double_quant, tensor.transposed)
        found = ("nf4", tensor.dtype, tensor.shape, *facts, parts)
    del loaded
    tensor.release()
    return found


def file_tree(path: Path) -> dict[str, bytes]:
    """Return every file under a directory, or the one file, by relative path."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def _copy(path: Path, target: Path) -> Path:
    return Path((shutil.copytree if path.is_dir() else shutil.copyfile)(path, target))


# --- Damage: what happens to files on their way ---------------------------------------------


def _move_out(file: Path) -> None:
    """Leave a symbolic link that leads out of the model's directory."""
    outside = file.parent.parent / "outside"
    file.rename(outside)
    file.symlink_to(outside)


def _make_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


_DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: os.truncate(file, 0),
    "one byte": lambda file: os.truncate(file, 1),
    "half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "end missing": lambda file: os.truncate(file, file.stat().st_size - 2),
    "noise": lambda file: file.write_bytes(bytes((i * 167 + 89) % 256 for i in range(4096))),
    "missing": Path.unlink,
    "directory": _make_directory,
    "link outwards": _move_out,
}


# --- The contract ---------------------------------------------------------------------------


class ConverterContract:
    """What every converter of base models does; inherit it and set ``converter``.

    Attributes
    ----------
    converter : BaseFormat
        The record under test, the very object that the entry point names.
    target_name : str
        Name of an output; give it a suffix if the format is a single file.
    carries_files, keeps_config : bool
        False for a format that has no room for other files, or for ``config.json``; such a
        converter says so in ``loses``.
    """

    converter: ClassVar[BaseFormat]
    target_name: ClassVar[str] = "model"
    carries_files: ClassVar[bool] = True
    keeps_config: ClassVar[bool] = True

    # Hooks ------------------------------------------------------------------

    def samples(self) -> dict[str, Checkpoint]:
        """Return the models to write and read back, by name."""
        return samples(self.converter.stores)

    def make(self, model: Checkpoint, target: Path, **options: int) -> Path:
        """Write a model in this format; override it for a converter that can only read."""
        return save(self.converter, model, target, **options)

    def hostile(self) -> Mapping[str, Callable[[Path], object]]:
        """Return more bad files, by name: functions that damage the sound model at a path."""
        return {}

    # Machinery --------------------------------------------------------------

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test once for each sample, or each damage, that it asks for."""
        if "sample" in metafunc.fixturenames:
            metafunc.parametrize("sample", list(self.samples()))
        if "damage" in metafunc.fixturenames:
            metafunc.parametrize("damage", [*_DAMAGES, *self.hostile()])

    def open(self, path: Path) -> Checkpoint:
        """Read a model."""
        return self.converter.read(path, ReadOptions())

    def first(self) -> Checkpoint:
        """Return one sample."""
        return next(iter(self.samples().values()))

    def with_tensors(self, *tensors: LazyTensor) -> Checkpoint:
        """Return the first sample with more tensors."""
        model = self.first()
        return replace(model, tensors={**model.tensors, **{t.name: t for t in tensors}})

    # The record -------------------------------------------------------------

    def test_record_is_complete(self) -> None:
        """Every field says something that a user can read."""
        record = self.converter
        assert isinstance(record, BaseFormat)
        assert re.fullmatch(r"[a-z][a-z0-9-]*", record.name), f"name {record.name!r}"
        assert record.stores in ("nf4", "dense", "both")
        for text in (record.summary, *record.loses):
            assert text and "\n" not in text and text == text.strip(), f"not one line: {text!r}"
        assert all(s.startswith(".") for s in record.suffixes), f"suffixes {record.suffixes}"
        assert record.missing() == [], "install what the converter requires to test it"

    def test_record_is_announced(self) -> None:
        """The entry point of the installed package names this very record."""
        names = [entry.name for entry in entry_points(group=plugins.GROUP)]
        assert self.converter.name in names, (
            f"no entry point {self.converter.name!r} in group {plugins.GROUP!r}; "
            "add it to pyproject.toml and install the package"
        )
        assert plugins.get(self.converter.name) is self.converter

    def test_room_that_is_missing_is_declared(self) -> None:
        """What a format cannot hold, ``loses`` says."""
        if not (self.carries_files and self.keeps_config):
            assert self.converter.loses, "loses must say that files or the config stay behind"

    # Recognising ------------------------------------------------------------

    def test_is_recognised_by_content(self, tmp_path: Path, sample: str) -> None:
        """The converter, and no other, recognises what it wrote."""
        path = self.make(self.samples()[sample], tmp_path / self.target_name)
        found = [c.name for c in plugins.all_converters() if c.sniff(path)]
        assert found == [self.converter.name]

    def test_does_not_claim_other_formats(self, tmp_path: Path) -> None:
        """What other converters wrote is theirs."""
        for other in plugins.all_converters():
            if other.name == self.converter.name or not isinstance(other, BaseFormat):
                continue
            if other.write is None or other.missing():
                continue
            target = tmp_path / (other.name + next(iter(other.suffixes), ""))
            try:
                save(other, samples(other.stores).popitem()[1], target)
            except LoraFormatError:  # it needs what the sample does not have
                continue
            assert not self.converter.sniff(target), f"claims what {other.name} wrote"

    def test_does_not_claim_junk(self, tmp_path: Path) -> None:
        """Sniffing strangers' files answers no; it raises nothing."""
        (tmp_path / "empty").mkdir()
        (tmp_path / "text.txt").write_text("hello")
        (tmp_path / "noise").write_bytes(bytes(range(256)) * 16)
        (tmp_path / "config").mkdir()
        (tmp_path / "config" / "config.json").write_bytes(b'{"a": NaN')
        for path in (*tmp_path.iterdir(), tmp_path / "no such file"):
            assert self.converter.sniff(path) is False, f"claims {path.name}"

    # Writing and reading ----------------------------------------------------

    def test_round_trip(self, tmp_path: Path, sample: str) -> None:
        """Names, dtypes, shapes and bytes come back equal."""
        model = self.samples()[sample]
        path = self.make(model, tmp_path / self.target_name)
        with self.open(path) as back:
            assert back.provenance.format == self.converter.name
            found = contents(back)
            wanted = contents(model)
            assert found.keys() == wanted.keys()
            for name in wanted:
                assert found[name] == wanted[name], f"tensor {name!r} came back changed"
            assert contents(back) == found, "loading a second time gave something else"

    def test_config_comes_back(self, tmp_path: Path, sample: str) -> None:
        """``config.json`` is the same, byte for byte; a model without one stays without."""
        if not self.keeps_config:
            return
        model = self.samples()[sample]
        with self.open(self.make(model, tmp_path / self.target_name)) as back:
            assert back.config == model.config

    def test_other_files_come_back(self, tmp_path: Path, sample: str) -> None:
        """Files that travel along are the same, byte for byte."""
        if not self.carries_files:
            return
        model = self.samples()[sample]
        with self.open(self.make(model, tmp_path / self.target_name)) as back:
            found = {file.path: file.read() for file in back.files}
            assert found == {file.path: file.read() for file in model.files}
            assert all(file.nbytes == len(found[file.path]) for file in back.files)
            assert back.left_behind == ()

    def test_shards_come_back(self, tmp_path: Path) -> None:
        """A small ``shard_limit`` changes the files, not the model."""
        model = self.first()
        path = self.make(model, tmp_path / self.target_name, shard_limit=4096)
        with self.open(path) as back:
            assert contents(back) == contents(model)

    def test_same_model_same_bytes(self, tmp_path: Path, sample: str) -> None:
        """Two writes give the same files: no dates, no random order."""
        for place in ("one", "two"):
            (tmp_path / place).mkdir()
            self.make(self.samples()[sample], tmp_path / place / self.target_name)
        assert file_tree(tmp_path / "one") == file_tree(tmp_path / "two")

    def test_through_a_bundle(self, tmp_path: Path) -> None:
        """``loraformat convert`` to a bundle and back loses nothing and leaves the input alone."""
        path = self.make(self.first(), tmp_path / self.target_name)
        before = file_tree(path)
        skip = ("*",) if self.converter.stores == "dense" else ()
        convert(path, tmp_path / "bundle", to_format="loraformat", skip=skip)
        assert file_tree(path) == before, "reading changed the input"
        back = tmp_path / f"back-{self.target_name}"
        convert(tmp_path / "bundle", back, to_format=self.converter.name)
        with self.open(path) as one, self.open(back) as two:
            assert contents(one) == contents(two)

    # Laziness ---------------------------------------------------------------

    def test_opening_reads_no_weight(self, tmp_path: Path) -> None:
        """A model is open before its weights are read, and its size is known."""
        large = dense("model.embed_tokens.weight", numpy.ones(8 * _MIB, numpy.float32))
        path = self.make(self.with_tensors(large), tmp_path / self.target_name)
        tracemalloc.start()
        try:
            already = _bytes_read()
            opened = self.open(path)
            held, read = tracemalloc.get_traced_memory()[0], _bytes_read() - already
        finally:
            tracemalloc.stop()
        with opened:
            assert opened.tensors[large.name].nbytes == large.nbytes
            assert held < large.nbytes / 4, f"opening allocated {held} bytes"
            assert read < large.nbytes / 4, f"opening read {read} bytes"

    def test_writing_holds_few_tensors(self, tmp_path: Path) -> None:
        """A writer loads each tensor once, and lets go of it before long."""
        loads: list[str] = []

        def lazy(name: str) -> DenseTensor:
            def load() -> memoryview:
                loads.append(name)
                return memoryview(bytearray(2 * _MIB))

            return DenseTensor(name, "F16", (_MIB,), load)

        many = [lazy(f"model.layers.{number}.scale") for number in range(24)]
        model = self.with_tensors(*many)
        tracemalloc.start()
        try:
            self.make(model, tmp_path / self.target_name)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert sorted(loads) == sorted(tensor.name for tensor in many)
        assert peak < 24 * _MIB, f"writing 48 MiB held {peak / _MIB:.0f} MiB"

    def test_closing_lets_go(self, tmp_path: Path) -> None:
        """After close no file is open; closing twice is allowed."""
        path = self.make(self.first(), tmp_path / self.target_name)
        opened = self.open(path)
        opened.close()
        assert _open_files(path) == []
        opened.close()

    def test_sources_are_named(self, tmp_path: Path) -> None:
        """``sources`` lists every file of the model, so that no output overwrites one."""
        path = self.make(self.first(), tmp_path / self.target_name)
        files = {path} if path.is_file() else {f for f in path.rglob("*") if f.is_file()}
        with self.open(path) as opened:
            assert {source for source in opened.sources if source.is_file()} == files

    # When things go wrong ---------------------------------------------------

    def test_bad_files_are_refused(self, tmp_path: Path, damage: str) -> None:
        """Damaged and hostile models end in an `InputError`, at the latest when loading."""
        (tmp_path / "good").mkdir()
        good = self.make(self.first(), tmp_path / "good" / self.target_name)
        more = self.hostile()
        targets = [good] if damage in more else self.weight_files(good)
        if good.is_file() and damage == "link outwards":
            return  # a user may name a file through a link
        for number, target in enumerate(targets):
            place = tmp_path / f"bad-{number}"
            place.mkdir()
            bad = _copy(good, place / self.target_name)
            function = more.get(damage) or _DAMAGES[damage]
            function(bad / target.relative_to(good) if good.is_dir() else bad)
            with pytest.raises(InputError):
                with self.open(bad) as opened:
                    contents(opened)
                pytest.fail(f"{target.name}: {damage} went unnoticed")
            assert _open_files(bad) == [], "the failed reader left a file open"

    def weight_files(self, path: Path) -> list[Path]:
        """Return the files of a model that hold weights or say where they are."""
        with self.open(path) as opened:
            others = {path / name for name in ("config.json", *(f.path for f in opened.files))}
            return [source for source in opened.sources if source not in others]

    def test_failure_leaves_nothing(self, tmp_path: Path) -> None:
        """When a tensor cannot be loaded, nothing appears: no output, no rest of one."""

        def fail() -> memoryview:
            raise InputError("this tensor cannot be read")

        broken = DenseTensor("zz.broken", "F32", (64, 64), fail)
        with pytest.raises(InputError, match="this tensor cannot be read"):
            self.make(self.with_tensors(broken), tmp_path / self.target_name)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("path", ["../escaped", "a/../../escaped", "{}/escaped", "a\\b", ""])
    def test_no_file_leaves_the_output(self, tmp_path: Path, path: str) -> None:
        """A file that travels along under a hostile name is refused, not written elsewhere."""
        if not self.carries_files:
            return
        model = replace(self.first(), files=(carried(path.format(tmp_path), b"evil"),))
        with pytest.raises(LoraFormatError):
            self.make(model, tmp_path / self.target_name)
        assert list(tmp_path.iterdir()) == []


def _bytes_read() -> int:
    """Return how much this process has read so far; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])
    except (OSError, IndexError):
        return 0


def _open_files(path: Path) -> list[str]:
    """Return this process's open files under a path; none where the system does not tell."""
    descriptors = Path("/proc/self/fd")
    found: list[str] = []
    for link in descriptors.iterdir() if descriptors.is_dir() else ():
        try:
            real = link.readlink()
        except OSError:
            continue
        if real.is_relative_to(path.resolve()):
            found.append(str(real))
    return found

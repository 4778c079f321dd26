"""Measure what becomes of an adapter in each base, and write the table of docs/which-base.md.

Both shipped adapters are merged in every way that makes sense and in one that does not; each result
is measured on held-out text of its adapter's kind, as ``loraformat demo`` measures::

    python tools/make_which_base.py

A few minutes. A test of the demo holds those rows that the demo measures, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from loraformat.demo import ADAPTERS, SMALL_MODEL
from loraformat.demo.measure import Measure
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge

PAGE = Path(__file__).resolve().parents[1] / "docs" / "which-base.md"
BEGIN = "<!-- made by tools/make_which_base.py; do not edit -->"
END = "<!-- end of what is made -->"
HEAD = ("what runs", "command", "delta kept", "weights", *(f"`{name}`" for name in ADAPTERS))


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run an adapter: a row of the table."""

    title: str
    base: str
    suffix: str = ""
    dtype: str | None = None
    requantize: bool = False

    @property
    def command(self) -> str:
        """Return what a reader would type."""
        words = f"merge {self.base} A -o merged{self.suffix}"
        words += f" --dtype {self.dtype}" if self.dtype else ""
        return f"`{words}{' --to loraformat --requantize' if self.requantize else ''}`"


WAYS = (
    Way("merged into the NF4 values, bf16", "my-bundle"),
    Way("merged into the original, bf16", "my-model"),
    Way("merged into the NF4 values, GGUF Q8_0", "my-bundle", ".gguf", "q8_0"),
    Way("merged into the original, GGUF Q8_0", "my-model", ".gguf", "q8_0"),
    Way("merged into the NF4 values, GGUF Q4_0", "my-bundle", ".gguf", "q4_0"),
    Way("merged into the original, GGUF Q4_0", "my-model", ".gguf", "q4_0"),
    Way("merged into the original, then NF4", "my-model", requantize=True),
    Way("merged into the NF4 values, NF4 again", "my-bundle", requantize=True),
)


def size_of(model: Path) -> str:
    """Return what the files of a model's weights take, in megabytes."""
    paths = [model] if model.is_file() else model.glob("*.safetensors")
    return f"{sum(path.stat().st_size for path in paths) / 1e6:.2f} MB"


def row(way: Way, folder: Path, measure: Measure) -> list[str]:
    """Merge each adapter in one way and measure what comes out."""
    found, kept, size = [], [], ""
    for name, adapter in ADAPTERS.items():
        # A directory for each, as what measures keeps the last model open by its path.
        place = folder / f"{WAYS.index(way)}-{name}"
        place.mkdir()
        merged = place / f"merged{way.suffix}"
        report = merge(
            folder / way.base, [adapter], merged, dtype=way.dtype,
            to="loraformat" if way.requantize else None, requantize=way.requantize,
        )  # fmt: skip
        assert report.total is not None
        kept.append(f"{report.total.gain:.0%}")
        size, opened = size_of(merged), merged
        if way.suffix:
            # What transformers cannot open is read back, value by value.
            opened = place / "values"
            convert(merged, opened, to_format="safetensors", dtype="f32")
        found.append(f"{measure.model(opened, [name])[name].perplexity:.2f}")
        click.echo(f"{way.title}: {name} {found[-1]}", err=True)
    return [way.title, way.command, " / ".join(dict.fromkeys(kept)), size, *found]


def rows(folder: Path) -> Iterator[list[str]]:
    """Yield the rows: the bases alone, the adapters beside theirs, then every merge."""
    notes: list[str] = []
    measure = Measure(notes)
    convert(SMALL_MODEL, folder / "my-bundle")
    (folder / "my-model").symlink_to(SMALL_MODEL)
    for title, base in (("original", "my-model"), ("bundle, NF4", "my-bundle")):
        found = measure.model(folder / base, ADAPTERS)
        values = [f"{found[name].perplexity:.2f}" for name in ADAPTERS]
        yield [f"{title}, without an adapter", "", "", size_of(folder / base), *values]
    beside = measure.with_adapters(
        folder / "my-bundle", [(adapter, [name]) for name, adapter in ADAPTERS.items()]
    )
    values = [f"{one[name].perplexity:.2f}" for one, name in zip(beside, ADAPTERS, strict=True)]
    command = "`convert A my-bundle/adapters/A`"
    size = size_of(folder / "my-bundle")
    yield ["bundle with a separate adapter", command, "100%", f"{size} + adapter", *values]
    for way in WAYS:
        yield row(way, folder, measure)
    assert not notes, notes


def main() -> None:
    """Rewrite the table."""
    with tempfile.TemporaryDirectory() as scratch:
        lines = [list(HEAD), ["---"] * len(HEAD), *rows(Path(scratch))]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

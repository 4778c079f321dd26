"""Draw the pictures that the documents show, from the small model: docs/pictures/*.png.

    errors     what NF4 cost each of its weights, as ``info --plot`` draws it
    spectrum   the shipped adapter ``manual``, as ``spectrum --plot`` draws it
    loss       the training of docs/tutorial.md, made longer, as ``train`` draws it

``python tools/make_pictures.py`` draws them all; the last takes some minutes. They are written
with few colours, to be small.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
from pages import ROOT, Example, examples, run

from loraformat.demo import ADAPTERS, SMALL_MODEL
from loraformat.ops.convert.convert import convert

PICTURES = ROOT / "docs" / "pictures"
_LONGER = "--steps 160 --eval-every 16"
_COLORS = 128


def errors(folder: Path) -> Path:
    """Draw the errors of the small model's bundle."""
    convert(SMALL_MODEL, folder / "my-bundle")
    run(Example("sh", "loraformat info my-bundle --plot errors.png\n", None), folder, {})
    return folder / "errors.png"


def spectrum(folder: Path) -> Path:
    """Draw the spectrum of an adapter."""
    shutil.copytree(ADAPTERS["manual"], folder / "manual")
    run(Example("sh", "loraformat spectrum manual --plot spectrum.png\n", None), folder, {})
    return folder / "spectrum.png"


def loss(folder: Path) -> Path:
    """Run the tutorial up to its training, with more steps; return the curve of it."""
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    for example in examples(page):
        if "loraformat train" not in example.code:
            run(example, folder, {})
        elif "--dry-run" not in example.code:
            longer, count = re.subn(r"--steps \d+", _LONGER, example.code)
            assert count == 1 and _LONGER in page
            run(Example("sh", longer, None), folder, {})
            return folder / "mine.run" / "loss.png"
    raise AssertionError("the tutorial does not train")


DRAW: dict[str, Callable[[Path], Path]] = {"errors": errors, "spectrum": spectrum, "loss": loss}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(sorted(DRAW)))
def main(names: tuple[str, ...]) -> None:
    """Draw the pictures."""
    from PIL import Image

    PICTURES.mkdir(exist_ok=True)
    for name in names or DRAW:
        with tempfile.TemporaryDirectory() as scratch:
            drawn = DRAW[name](Path(scratch).resolve())
            with Image.open(drawn) as picture:
                few = picture.convert("RGB").quantize(
                    _COLORS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
                )
                few.save(PICTURES / f"{name}.png", optimize=True)
        click.echo(f"{name}: {(PICTURES / f'{name}.png').stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

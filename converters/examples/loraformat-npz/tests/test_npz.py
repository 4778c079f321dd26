"""The converter passes the contract tests and rejects malformed files of its format."""

import zipfile
from pathlib import Path

import numpy
from loraformat_npz import CONVERTER, INDEX, WEIGHTS

from loraformat.testing import ConverterContract


def compress(model: Path) -> None:
    """Store an array compressed: a few bytes could expand to terabytes."""
    with zipfile.ZipFile(model / WEIGHTS, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.norm.weight.npy", bytes(1 << 20))


def pickle(model: Path) -> None:
    """Store an array of Python objects: loading it would run arbitrary code."""
    numpy.savez(model / WEIGHTS, **{"model.norm.weight": numpy.array([{}, []], dtype=object)})


def lie(model: Path) -> None:
    """Claim a wrong shape."""
    text = (model / INDEX).read_text(encoding="utf-8")
    (model / INDEX).write_text(text.replace("[64]", "[4096]"), encoding="utf-8")


class TestNpz(ConverterContract):
    converter = CONVERTER

    def hostile(self):
        return {"compressed": compress, "pickled": pickle, "lying index": lie}

"""The test kit for authors of converters.

`loraformat.testing.contract` has the tests, `loraformat.testing.models` the models.
"""

from loraformat.testing.contract import ConverterContract, contents, file_tree, save
from loraformat.testing.models import checkpoint, dense, nf4, samples

__all__ = [
    "ConverterContract",
    "checkpoint",
    "contents",
    "dense",
    "file_tree",
    "nf4",
    "samples",
    "save",
]

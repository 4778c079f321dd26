"""Names, shapes and configs of published models, and files of those names that take no space.

``models.json`` has one object a line. ``tensors`` gives each tensor's shape, before it its type
where that is not ``dtype``; ``{0-3,6}`` in a name stands for each of these numbers. ``source`` says
where the facts are from:

- *config and names*: ``config.json`` and ``model.safetensors.index.json`` of a copy of the
  published repository, at that commit. An index has no shapes: they are those of
  transformers' class.
- *names: transformers' conversion, reversed*: no index was at hand. The config is that of a class
  whose defaults are those of the model, with the model's own sizes where they differ; names are
  what ``save_pretrained`` of transformers 5 writes, which undoes its renaming and fusing. What is
  known to be published otherwise (prefixes, masks, quantized weights) is said there.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from loraformat.families.tensor_names import layer_of
from loraformat.tensors.dtypes import ITEM_BYTES

#: Of a model of more tensors than this, `published` gives the first layers alone: each plan of a
#: hundred thousand tensors takes half a minute.
_MOST_TENSORS, _LAYERS = 4000, 5
_NUMBERS = re.compile(r"\{([\d,-]+)\}")


@dataclass(frozen=True)
class Published:
    """A published model without its weights.

    Attributes
    ----------
    name, source : str
    config : dict
        ``config.json``.
    tensors : dict of str to (str, tuple of int)
        Type and shape of each tensor.
    """

    name: str
    source: str
    config: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]]

    def write(self, folder: Path) -> Path:
        """Write a model of zeros: a header, and a hole in the file for the numbers."""
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config))
        entries, end = {}, 0
        for name, (dtype, shape) in self.tensors.items():
            begin = end
            end += ITEM_BYTES[dtype]
            for size in shape:
                end += (end - begin) * (size - 1)
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
        header += b" " * (-len(header) % 8)
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + end)
        return folder


def published() -> list[Published]:
    """Return all models."""
    lines = json.loads((Path(__file__).parent / "models.json").read_text())
    return [_cut(Published(x["name"], x["source"], x["config"], _tensors(x))) for x in lines]


def _cut(model: Published) -> Published:
    """Return the first layers of a model of very many experts, else the model."""
    if len(model.tensors) < _MOST_TENSORS:
        return model
    kept = {
        name: spec
        for name, spec in model.tensors.items()
        if (layer := layer_of(name)) is None or layer[1] < _LAYERS
    }
    config = model.config | {"num_hidden_layers": _LAYERS}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:_LAYERS]
    return replace(model, config=config, tensors=kept)


def _tensors(model: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {}
    for template, text in model["tensors"].items():
        *dtype, shape = text.split(" ")
        spec = dtype[0] if dtype else model["dtype"], tuple(map(int, shape.split("x")))
        found |= dict.fromkeys(_names(template), spec)
    return found


def _names(template: str) -> list[str]:
    pieces = _NUMBERS.split(template)
    choices = [_range(piece) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    return ["".join(parts) for parts in product(*choices)]


def _range(text: str) -> list[str]:
    found: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += map(str, range(int(first), int(last or first) + 1))
    return found

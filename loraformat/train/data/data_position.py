"""Where training is in its data: enough to continue with exactly the batches that are left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from loraformat.errors import InputError

__all__ = ["DataPosition"]


@dataclass(frozen=True, slots=True)
class DataPosition:
    """The next batch: of which epoch, and which in it.

    Attributes
    ----------
    epoch : int
        From 0.
    batch : int
        From 0; the same on every rank of a data-parallel run.
    data : str
        Fingerprint of samples and options, or empty for the start of any data. A
        cursor of other data is refused, instead of continuing somewhere else in it.

    Examples
    --------
    >>> DataPosition.from_json(DataPosition(epoch=1, batch=20).to_json())
    DataPosition(epoch=1, batch=20, data='')
    """

    epoch: int = 0
    batch: int = 0
    data: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return what ``json.dumps`` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> DataPosition:
        """Return the cursor that `to_json` wrote.

        Raises
        ------
        InputError
            If it is none.
        """
        epoch, batch, data = (fields.get(name) for name in ("epoch", "batch", "data"))
        sound = all(type(n) is int and 0 <= n < 1 << 53 for n in (epoch, batch))
        if not sound or not isinstance(data, str) or len(fields) != 3:
            raise InputError(f"not a data cursor: {dict(fields)!r:.120}")
        return cls(int(epoch or 0), int(batch or 0), data)

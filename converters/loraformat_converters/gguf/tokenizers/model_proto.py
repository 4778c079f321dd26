"""Parsing of ``tokenizer.model`` without SentencePiece.

``ModelProto`` of sentencepiece_model.proto: the pieces, in order of their numbers, a part of
how they were trained (the algorithm, the special numbers) and what is done to a text before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from struct import unpack

from loraformat.errors import printable
from loraformat_converters.gguf.tokenizers.protobuf import WireError, fields
from loraformat_converters.gguf.tokenizers.vocabulary import TokenKind

__all__ = ["Model", "Piece", "parse"]

_MAX_PIECES = 1 << 21
#: ``TrainerSpec.ModelType``.
_ALGORITHMS = {1: "Unigram", 2: "BPE", 3: "WORD", 4: "CHAR"}
#: Of ``NormalizerSpec``.
_SPACES = {3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}
_SPECIAL = {40: "unk", 41: "bos", 42: "eos", 43: "pad"}


@dataclass(frozen=True, slots=True)
class Piece:
    """A token. SentencePiece's numbers of kinds are those of GGUF."""

    text: str
    score: float
    kind: TokenKind


@dataclass
class Model:
    """What a model says.

    Attributes
    ----------
    pieces : list of Piece
    algorithm : str
        ``Unigram`` or ``BPE``, or one that no language model uses.
    special : dict of str to int
        Numbers of ``unk``, ``bos``, ``eos``, ``pad``; -1 where there is none.
    add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces : bool
    treat_whitespace_as_suffix : bool
    charsmap : bool
        Characters are replaced before anything else.
    """

    pieces: list[Piece] = field(default_factory=list)
    algorithm: str = "Unigram"
    special: dict[str, int] = field(
        default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2, "pad": -1}
    )
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    treat_whitespace_as_suffix: bool = False
    charsmap: bool = False


def parse(data: bytes) -> Model:
    r"""Return what a ``ModelProto`` says.

    Raises
    ------
    WireError
        If it is none. The message continues "it ...".

    Examples
    --------
    >>> model = parse(b"\x0a\x0a\x0a\x03\xe2\x96\x81\x15\x00\x00\x80\xbf\x12\x02\x18\x02")
    >>> model.pieces
    [Piece(text='▁', score=-1.0, kind=<TokenKind.NORMAL: 1>)]
    >>> model.algorithm
    'BPE'
    """
    model = Model()
    for number, value in fields(memoryview(data)):
        if number in (1, 2, 3):
            part = _bytes(value)
            if number == 1:
                model.pieces.append(_piece(part, len(model.pieces)))
            elif number == 2:
                _trainer(model, part)
            else:
                _normalizer(model, part)
        if len(model.pieces) > _MAX_PIECES:
            raise WireError(f"has more than {_MAX_PIECES} pieces")
    if not model.pieces:
        raise WireError("has no pieces")
    return model


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise WireError("has a number where a message or a text was wanted")
    return value


def _number(value: int | memoryview) -> int:
    """Return an int32, which is sent as 64 bits."""
    if not isinstance(value, int):
        raise WireError("has a text where a number was wanted")
    return value - (1 << 64) if value >= 1 << 63 else value


def _piece(data: memoryview, number: int) -> Piece:
    text, score, kind = "", 0.0, TokenKind.NORMAL
    for key, value in fields(data):
        if key == 1:
            try:
                text = str(_bytes(value), "utf-8")
            except UnicodeDecodeError as error:
                raise WireError(f"has piece {number} that is not UTF-8 ({error.reason})") from None
        elif key == 2:
            if isinstance(value, int) or len(value) != 4:
                raise WireError("has a number where a float32 was wanted")
            (score,) = unpack("<f", value)
        elif key == 3:
            try:
                kind = TokenKind(_number(value))
            except ValueError:
                raise WireError(
                    f"has piece {number} of type {_number(value)}, wanted 1 to 6"
                ) from None
    if not text:
        raise WireError(f"has piece {number} without a text")
    if not isfinite(score):
        raise WireError(f"gives piece {printable(text)} the score {score}")
    return Piece(text, score, kind)


def _trainer(model: Model, data: memoryview) -> None:
    for key, value in fields(data):
        if key == 3:
            model.algorithm = _ALGORITHMS.get(_number(value), f"type {_number(value)}")
        elif key == 24:
            model.treat_whitespace_as_suffix = _number(value) != 0
        elif key in _SPECIAL:
            model.special[_SPECIAL[key]] = _number(value)


def _normalizer(model: Model, data: memoryview) -> None:
    for key, value in fields(data):
        if key == 2:
            model.charsmap = len(_bytes(value)) > 0
        elif key in _SPACES:
            setattr(model, _SPACES[key], _number(value) != 0)

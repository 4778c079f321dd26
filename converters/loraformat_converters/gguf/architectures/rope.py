"""Rotary position embeddings (RoPE): ``config.json`` and GGUF metadata.

What llama.cpp computes (``ggml_rope_ext``, ``llama-context.cpp``): frequencies
θ^(-2i/d) / factorᵢ, times 1/``rope.scaling.factor`` for "linear"; YaRN with β of 32 and 1 and
a magnitude of (1 + 0.1 ln factor) · ``rope.scaling.attn_factor``. The factorᵢ are the tensors
``rope_freqs.weight`` (Llama 3) or ``rope_factors_long.weight`` and ``…_short.weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import log, pi, sqrt
from typing import TYPE_CHECKING, Any

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.model.config_json import CONFIG_NAME
from loraformat.storage.foreign_json import is_finite
from loraformat_converters.gguf.architectures.config import Config
from loraformat_converters.gguf.architectures.metadata import (
    MetadataBuilder,
    MetadataRow,
    bounded,
    float_tensor,
    head_size,
    short,
)

if TYPE_CHECKING:
    from loraformat_converters.gguf.container.reader import GGUFFile

__all__ = [
    "LONG_FACTORS",
    "ROPE_FREQUENCIES",
    "SHORT_FACTORS",
    "Rope",
    "llama3_factors",
    "llama3_parameters",
    "parameters",
    "rope_keys",
]

ROPE_FREQUENCIES = "rope_freqs.weight"
LONG_FACTORS = "rope_factors_long.weight"
SHORT_FACTORS = "rope_factors_short.weight"

#: What a file that holds the factors only may have been made with: Llama 3.1 and later.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192


class Rope:
    """The rotary embedding that a config asks for.

    Parameters
    ----------
    config : Config
    theta : float
        The default of the model's class.
    kinds : collection of str
        What the architecture can do in llama.cpp, beside ``default``.
    partial : bool
        Whether it can rotate a part of a head.
    layer_type : str, optional
        Which of several, where the layers differ.

    Raises
    ------
    UnsupportedError
        If llama.cpp cannot compute it.
    """

    def __init__(
        self,
        config: Config,
        *,
        theta: float = 10_000.0,
        kinds: Collection[str] = (),
        partial: bool = False,
        layer_type: str | None = None,
    ) -> None:
        self._config = config
        self._values = parameters(config, layer_type)
        self.theta = self._number("rope_theta", config.number("rope_theta", theta))
        if self.theta <= 0:
            raise InputError(f"rope_theta is {self.theta:g}, wanted more than 0", path=CONFIG_NAME)
        kind = self._values.get("rope_type", self._values.get("type", "default"))
        self.kind = {"su": "longrope"}.get(kind, kind) if isinstance(kind, str) else "?"
        if self.kind not in ("default", *kinds):
            raise UnsupportedError(
                f"{CONFIG_NAME} asks for RoPE scaling {printable(str(kind))}, which llama.cpp "
                "does not compute for this architecture",
                hint="it does: " + ", ".join(["default", *sorted(kinds)]),
            )
        share = self._number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
        if share != 1 and not partial:
            raise UnsupportedError(
                f"{CONFIG_NAME} rotates {share} of each head, and llama.cpp all of it here"
            )
        self.dimensions = int(config.head_dim * share)

    def _number(self, key: str, default: float | None = None) -> float:
        return Config(self._values, {}).number(key, default)

    @property
    def context(self) -> int:
        """Context of the original training."""
        whole = self._config.integer("max_position_embeddings")
        key = "original_max_position_embeddings"
        return self._config.integer(key, Config(self._values, {}).integer(key, whole))

    @property
    def _factor(self) -> float:
        """How much longer the context has become, if the config does not say."""
        whole = self._config.integer("max_position_embeddings")
        return self._number("factor", whole / self.context)

    def add_keys(self, keys: MetadataBuilder) -> None:
        """Add frequency base and scaling."""
        keys.float("rope.freq_base", self.theta)
        if self.kind == "linear":
            keys.text("rope.scaling.type", "linear")
            keys.float("rope.scaling.factor", self._number("factor"))
        elif self.kind == "yarn":
            self._add_yarn(keys)
        elif self.kind == "longrope":
            keys.text("rope.scaling.type", "longrope")
            keys.uint("rope.scaling.original_context_length", self.context)
            keys.float("rope.scaling.attn_factor", self._longrope_magnitude())

    def _add_yarn(self, keys: MetadataBuilder) -> None:
        wanted = {"beta_fast": (None, 32), "beta_slow": (None, 1), "truncate": (None, True)}
        for key, values in wanted.items():
            if self._values.get(key) not in values:
                raise UnsupportedError(
                    f"{CONFIG_NAME} has {key} {printable(str(self._values[key]))} for YaRN, and "
                    f"llama.cpp computes with {values[1]}"
                )
        factor = self._factor
        keys.text("rope.scaling.type", "yarn")
        keys.float("rope.scaling.factor", factor)
        keys.uint("rope.scaling.original_context_length", self.context)
        usual = _magnitude(factor)
        wanted_magnitude = self._yarn_magnitude(factor, usual)
        if wanted_magnitude != usual:
            keys.float("rope.scaling.attn_factor", wanted_magnitude / usual)

    def _yarn_magnitude(self, factor: float, usual: float) -> float:
        if self._values.get("attention_factor") is not None:
            return self._number("attention_factor")
        if self._values.get("mscale") and self._values.get("mscale_all_dim"):
            above = _magnitude(factor, self._number("mscale"))
            return above / _magnitude(factor, self._number("mscale_all_dim"))
        return usual

    def _longrope_magnitude(self) -> float:
        if self._values.get("attention_factor") is not None:
            return self._number("attention_factor")
        factor = self._factor
        if self.context < 2:
            raise InputError(
                "original_max_position_embeddings is 1, wanted at least 2", path=CONFIG_NAME
            )
        return sqrt(1 + log(factor) / log(self.context)) if factor > 1 else 1.0

    def tensors(self) -> dict[str, list[float]]:
        """Return the tensors that the file needs beside the weights, by name."""
        if self.kind == "llama3":
            return {
                ROPE_FREQUENCIES: llama3_factors(
                    self.theta,
                    self.dimensions,
                    factor=self._number("factor"),
                    low_freq_factor=self._number("low_freq_factor"),
                    high_freq_factor=self._number("high_freq_factor"),
                    context=self.context,
                )
            }
        if self.kind == "longrope":
            return {
                LONG_FACTORS: self._factors("long_factor"),
                SHORT_FACTORS: self._factors("short_factor"),
            }
        return {}

    def _factors(self, key: str) -> list[float]:
        values, wanted = self._values.get(key), self.dimensions // 2
        if (
            not isinstance(values, Sequence)
            or len(values) != wanted
            or not all(is_finite(v) and v for v in values)
        ):
            raise InputError(f"{key} is no list of {wanted} numbers", path=CONFIG_NAME)
        return [float(value) for value in values]


def parameters(config: Config, layer_type: str | None = None) -> dict[str, Any]:
    """Return the members that describe the rotary embedding, in whatever form they stand.

    transformers 5 writes ``rope_parameters``, by layer type where layers differ; before, it
    was ``rope_scaling`` and ``rope_theta``.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(found, Mapping) and isinstance(found.get(layer_type), Mapping):
        found = found[layer_type]
    if not isinstance(found, Mapping):
        raise InputError("rope_parameters is not an object", path=CONFIG_NAME)
    return {key: value for key, value in found.items() if value is not None}


def _magnitude(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * log(factor) + 1 if factor > 1 else 1.0


def llama3_factors(
    theta: float,
    dimensions: int,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    context: int,
) -> list[float]:
    """Return by how much Llama 3.1 slows each frequency down.

    Wavelengths above context / low by ``factor``, below context / high not at all, between
    them by an interpolation of the frequency.

    Examples
    --------
    >>> factors = llama3_factors(
    ...     500000.0, 8, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, context=8192
    ... )
    >>> [round(value, 4) for value in factors]
    [1.0, 1.0, 2.6945, 8.0]
    """
    if low_freq_factor <= 0 or high_freq_factor <= low_freq_factor or factor <= 0:
        raise InputError("RoPE scaling llama3 has impossible factors", path=CONFIG_NAME)
    found = []
    for i in range(0, dimensions, 2):
        wavelength = 2 * pi * theta ** (i / dimensions)
        if wavelength < context / high_freq_factor:
            found.append(1.0)
        elif wavelength > context / low_freq_factor:
            found.append(factor)
        else:
            share = context / wavelength - low_freq_factor
            smooth = share / (high_freq_factor - low_freq_factor)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def llama3_parameters(
    factors: Sequence[float], theta: float, dimensions: int
) -> dict[str, Any] | None:
    """Return the parameters that give these ``rope_freqs.weight``, None if not the usual ones."""
    guess = {"factor": float(max(factors)), **_LLAMA3}
    made = llama3_factors(theta, dimensions, context=_LLAMA3_CONTEXT, **guess)
    if len(made) != len(factors) or any(
        abs(one - other) > 1e-4 * one for one, other in zip(made, factors, strict=True)
    ):
        return None
    return {"rope_type": "llama3", **guess, "original_max_position_embeddings": _LLAMA3_CONTEXT}


def rope_keys(rope: Callable[[Config], Rope], *, dimensions: bool = False) -> MetadataRow:
    """Return the row of the rotary embedding, with ``rope.dimension_count`` if llama.cpp asks."""

    def write(config: Config, keys: MetadataBuilder) -> None:
        wanted = rope(config)
        if dimensions:
            keys.uint("rope.dimension_count", wanted.dimensions)
        wanted.add_keys(keys)

    def read(gguf: GGUFFile, members: dict[str, Any]) -> None:
        members |= _rope_members(gguf, head_size(gguf, members))

    return MetadataRow(write, read, lambda config: rope(config).tensors())


def _rope_members(gguf: GGUFFile, head_dim: int) -> dict[str, Any]:
    """Return ``rope_theta`` and ``rope_scaling``, which every version of transformers reads.

    Raises
    ------
    InputError
        If the file does not tell how it was scaled.
    """
    theta = short(gguf.number("{arch}.rope.freq_base", 10_000.0))
    if theta <= 0:
        raise InputError(
            f"{gguf.architecture}.rope.freq_base is {theta:g}, wanted more than 0", path=gguf.path
        )
    dimensions = bounded(gguf, "{arch}.rope.dimension_count", default=head_dim)
    found: dict[str, Any] = {"rope_theta": theta}
    if dimensions != head_dim:
        found["partial_rotary_factor"] = dimensions / head_dim
    scaling = _scaling(gguf, theta, dimensions)
    if scaling:
        found["rope_scaling"] = scaling
    return found


def _scaling(gguf: GGUFFile, theta: float, dimensions: int) -> dict[str, Any] | None:
    kind = gguf.text("{arch}.rope.scaling.type", "linear")
    factor = short(
        gguf.number("{arch}.rope.scaling.factor", gguf.number("{arch}.rope.scale_linear", 0.0))
    )
    magnitude = short(gguf.number("{arch}.rope.scaling.attn_factor", 1.0))
    whole = bounded(gguf, "{arch}.context_length")
    context = bounded(gguf, "{arch}.rope.scaling.original_context_length", default=whole)
    if ROPE_FREQUENCIES in gguf.tensors:
        guessed = llama3_parameters(float_tensor(gguf, ROPE_FREQUENCIES), theta, dimensions)
        if guessed is None:
            raise InputError(
                f"its {ROPE_FREQUENCIES} do not tell by which rule they were made",
                path=gguf.path,
                hint="name the model's own config.json with --config",
            )
        return guessed
    if LONG_FACTORS in gguf.tensors and SHORT_FACTORS in gguf.tensors:
        return {
            "rope_type": "longrope",
            "long_factor": float_tensor(gguf, LONG_FACTORS),
            "short_factor": float_tensor(gguf, SHORT_FACTORS),
            "attention_factor": magnitude,
            "original_max_position_embeddings": context,
        }
    if kind == "yarn" and factor:
        scaling = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": context,
        }
        if magnitude != 1:
            scaling["attention_factor"] = magnitude * _magnitude(factor)
        return scaling
    if magnitude != 1:
        raise InputError(
            f"scales attention by {magnitude}, which transformers cannot say for RoPE {kind}",
            path=gguf.path,
            hint="name the model's own config.json with --config",
        )
    if kind == "linear" and factor not in (0.0, 1.0):
        return {"rope_type": "linear", "factor": factor}
    if kind not in ("linear", "none", "yarn"):
        raise InputError(f"has RoPE scaling {kind} without its tensors", path=gguf.path)
    return None

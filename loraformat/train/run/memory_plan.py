"""Memory that training or generation will take, estimated before it begins, and advice if too much.

The figures are bounds made of shapes: the process as it is, two layers of mapped base, one
checkpointed activation per layer, the activations of one layer while it is computed, those that
other layers keep instead of recomputing them, the logits of a few tokens, generation from a prompt
(keys and values, activations of the prompt, logits), and for the adapter its factors, gradients and
optimizer states.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from loraformat.errors import ResourceError
from loraformat.train.loop.optimizer_options import state_bytes

__all__ = [
    "MemoryPlan",
    "ModelDims",
    "advise",
    "format_bytes",
    "generation_bytes",
    "inner_width",
    "plan_memory",
]

#: Logits that a loss holds at once, and what it makes of a few of them (bytes).
_LOGITS = 160 << 20
#: Tiles, reused buffers, and what the allocator keeps (bytes).
_WORKSPACE = 128 << 20
_FLOAT = 4
_NO_PARTS = ("base_on_disk", "initialisation", "limit")

#: Tensors of the size of the logits while the next token is chosen: as they come, as float32, and
#: what the choice is made from.
_LOGITS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class ModelDims:
    """The sizes that memory depends on.

    Attributes
    ----------
    layers, hidden, inner, vocabulary : int
        Decoder layers, hidden size, widest feed-forward size, tokens known.
    base_bytes : int
        Of all shards.
    layer_bytes : int
        Of the largest decoder layer.
    trained : int
        Trained numbers.
    extra_bytes : int
        Second moments.
    small : int
        Trained numbers in tensors that 8-bit optimizers keep states of 32 bits for.
    fixed : int
        Numbers of factors that are not trained: what PiSSA takes off.
    initial_bytes : int
        What it takes to find the factors of one module, where they are not drawn at random.
    """

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    base_bytes: int
    layer_bytes: int
    trained: int
    extra_bytes: int = 0
    small: int = 0
    fixed: int = 0
    initial_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes, by what they are for.

    Attributes
    ----------
    base_on_disk : int
        Stays there; not part of the sum.
    process : int
        Python, torch and transformers, as they are.
    templates : int
        The process that renders chat templates.
    mapped : int
        Pages of the base in memory at once; on a GPU what is kept there.
    activations : int
        Checkpointed ones, and those of the layer that is being computed.
    kept : int
        Those of layers that are not computed again.
    logits : int
    workspace : int
    generation : int
        What writing on from the longest prompt takes.
    adapter, gradients, optimizer, statistics : int
        Of the adapter; states on a disk are not part of the sum.
    initialisation : int
        Before the first step, beside process and adapter: for the factors that one module begins
        with. Not part of the sum, for it is gone before the rest comes.
    limit : int or None
        What is allowed.
    """

    base_on_disk: int
    process: int
    templates: int
    mapped: int
    activations: int
    kept: int
    logits: int
    workspace: int
    generation: int
    adapter: int
    gradients: int
    optimizer: int
    statistics: int
    initialisation: int = 0
    limit: int | None = None

    @property
    def parts(self) -> dict[str, int]:
        """What is in memory, by name."""
        told = asdict(self)
        return {name: told[name] for name in told if name not in _NO_PARTS}

    @property
    def total(self) -> int:
        """The most that is in memory, in the steps or before them."""
        return max(self.running, self.before)

    @property
    def running(self) -> int:
        """What is in memory during a step: the sum of the parts."""
        return sum(self.parts.values())

    @property
    def before(self) -> int:
        """What is in memory before the first step, while factors are found."""
        return self.process + self.adapter + self.initialisation

    @property
    def to_come(self) -> int:
        """What is not in memory when the plan is made."""
        return self.running - self.process - self.templates

    def to_json(self) -> dict[str, Any]:
        """Return the figures for ``json.dumps``."""
        return {**asdict(self), "total": self.total}

    def lines(self) -> list[str]:
        """Say it for people."""
        shown = [f"base on disk {format_bytes(self.base_on_disk)}, mapped, never loaded whole"]
        parts = ", ".join(
            f"{name} {format_bytes(size)}" for name, size in self.parts.items() if size
        )
        allowed = f" of {format_bytes(self.limit)} allowed" if self.limit is not None else ""
        shown.append(f"memory at most about {format_bytes(self.total)}{allowed}: {parts}")
        if self.initialisation:
            shown.append(
                f"before the first step {format_bytes(self.before)}, of which it takes "
                f"{format_bytes(self.initialisation)} to compute the initial factors"
            )
        return shown

    def refuse_if_too_much(self, advice: list[str]) -> None:
        """Raise if it is more than the limit.

        Raises
        ------
        ResourceError
        """
        if self.limit is not None and self.total > self.limit:
            parts = sorted(self._largest().items(), key=lambda item: -item[1])[:4]
            told = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts)
            raise ResourceError(
                f"the run needs about {format_bytes(self.total)} of memory, and "
                f"{format_bytes(self.limit)} are allowed ({told}, …)",
                hint="; or ".join(advice) or "allow more with --max-memory",
            )

    def _largest(self) -> dict[str, int]:
        """Return the parts of the total."""
        if self.running >= self.before:
            return self.parts
        return {name: getattr(self, name) for name in ("process", "adapter", "initialisation")}


def format_bytes(nbytes: float) -> str:
    """Return a size for people.

    Examples
    --------
    >>> format_bytes(2_200_000), format_bytes(3_140_000_000)
    ('2.2 MB', '3.1 GB')
    """
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def plan_memory(
    shape: ModelDims,
    *,
    rows: int,
    length: int,
    process: int,
    optimizer: str = "adamw",
    states: str = "memory",
    resident: int = 0,
    number_bytes: int = _FLOAT,
    templates: int = 0,
    generation: int = 0,
    spare: int = 0,
    limit: int | None = None,
) -> MemoryPlan:
    """Return the plan of a run.

    Parameters
    ----------
    shape : ModelDims
    rows, length : int
        Of what goes through the model at once between two updates: a micro-batch, or with
        layer-major order all of them.
    process : int
        What the process holds already (bytes).
    optimizer, states : str
        As in `OptimizerOptions`.
    resident : int
        What of the base stays where it is computed, on a GPU, besides two layers that come and
        go (bytes).
    number_bytes : int
        Of one number in an activation.
    templates : int
        What the process holds that renders chat templates (bytes).
    generation : int
        What writing on from a prompt takes, see `generation_bytes`. It does not come while a step
        is computed, but what a step frees stays with the process, in pieces that may not fit.
    spare : int
        What layers may take that keep their activations, if the limit allows it (bytes).
    limit : int, optional
        What is allowed (bytes).

    Examples
    --------
    A 70B shape, rank 8, 128 tokens:

    >>> shape = ModelDims(80, 8192, 28672, 128256, 39_500_000_000, 441_000_000, 103_500_000)
    >>> plan = plan_memory(shape, rows=1, length=128, process=240_000_000)
    >>> format_bytes(plan.optimizer), format_bytes(plan.total)
    ('828.0 MB', '3.5 GB')
    """
    tokens = rows * length
    inside = tokens * (12 * shape.hidden + 5 * shape.inner) * number_bytes
    on_disk = states == "disk"
    plan = MemoryPlan(
        base_on_disk=shape.base_bytes,
        process=process,
        templates=templates,
        mapped=2 * shape.layer_bytes + resident,
        activations=tokens * shape.hidden * (shape.layers + 1) * number_bytes + inside,
        kept=0,
        logits=min(_LOGITS, 2 * tokens * shape.vocabulary * number_bytes),
        workspace=_WORKSPACE,
        generation=generation,
        adapter=(shape.trained + shape.fixed) * _FLOAT,
        gradients=shape.trained * _FLOAT,
        optimizer=0 if on_disk else state_bytes(optimizer, shape.trained, shape.small),
        statistics=2 * shape.extra_bytes,
        initialisation=shape.initial_bytes,
        limit=limit,
    )
    left = spare if limit is None else min(spare, max(0, limit - plan.running))
    return replace(plan, kept=min(left, inside * shape.layers * 5 // 4))


def advise(
    plan: MemoryPlan, *, length: int, rows: int, optimizer: str, states: str, rank: int
) -> list[str]:
    """Return what would help, with numbers, the largest saving first."""
    if plan.limit is not None and plan.running <= plan.limit < plan.before:
        return ["choose another --init, whose factors are drawn at random"]
    of_adapter = plan.adapter + plan.gradients + plan.optimizer
    ideas = []
    if length > 64:
        ideas.append((plan.activations // 2, f"--seq-len {length // 2}"))
    if rows > 1:
        smaller = plan.activations * (rows - 1) // rows
        ideas.append((smaller, "one row at a time (--batch-size 1, no --layer-major)"))
    if plan.generation:
        ideas.append((plan.generation, "no --prompt"))
    if rank > 1:
        ideas.append((of_adapter // 2, f"--rank {max(1, rank // 2)}"))
    if optimizer == "adamw" and states == "memory":
        ideas.append((plan.optimizer, "--optimizer-states disk"))
        ideas.append((plan.optimizer * 3 // 4, "--optimizer adamw-8bit"))
    ideas.sort(key=lambda idea: -idea[0])
    return [f"{what} saves about {format_bytes(saved)}" for saved, what in ideas if saved > 1e6]


def generation_bytes(config: Any, prompt: int, new: int, number_bytes: int = _FLOAT) -> int:
    """Return a bound on what one continuation holds, besides the weights.

    Keys and values of all layers for prompt and new tokens, twice: they grow by a copy for each
    token, and what is let go lies in pieces that are too small for the next. One layer's at a time
    are there for each of the heads that share them. The prompt goes through at once: what a layer
    holds for it, as in a step without gradients.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        Of the language model.
    prompt, new : int
        Tokens.
    number_bytes : int
        Of one number in an activation.

    Examples
    --------
    >>> import transformers
    >>> config = transformers.LlamaConfig(
    ...     hidden_size=512, intermediate_size=1408, num_hidden_layers=12, vocab_size=64000,
    ...     num_attention_heads=8,
    ... )
    >>> generation_bytes(config, 100, 64), generation_bytes(config, 1000, 64)
    (23306000, 165761600)
    """
    hidden, tokens = _attention_width(config), prompt + new
    cache = 2 * tokens * int(config.num_hidden_layers) * _cached_width(config) * number_bytes
    inside = prompt * (13 * hidden + 5 * inner_width(config)) * number_bytes
    repeated = 2 * tokens * hidden * number_bytes
    logits = _LOGITS_AT_ONCE * int(config.vocab_size) * _FLOAT
    return cache + repeated + inside + logits + _scores(config, prompt, number_bytes)


def inner_width(config: Any) -> int:
    """Return a model's widest feed-forward size.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        Of the language model.
    """
    return _number(config, "intermediate_size") or 4 * int(config.hidden_size)


def _cached_width(config: Any) -> int:
    """Return how many numbers a layer keeps of a token.

    Keys and values of all their heads, or what both are computed from (latent attention).
    """
    heads = _number(config, "num_key_value_heads") or _number(config, "num_attention_heads") or 1
    if latent := _number(config, "kv_lora_rank"):
        return latent + _number(config, "qk_rope_head_dim")
    shared = getattr(config, "multi_query", False)  # by all heads, but for Falcon's newer models
    if shared and not getattr(config, "new_decoder_architecture", False):
        heads = 1
    return 2 * heads * _head_width(config)


def _attention_width(config: Any) -> int:
    """Return the widest of what goes through a layer besides its feed-forward part."""
    heads = _number(config, "num_attention_heads") or 1
    return max(int(config.hidden_size), heads * _head_width(config))


def _head_width(config: Any) -> int:
    """Return the widest head's size."""
    heads = _number(config, "num_attention_heads") or 1
    names = ("head_dim", "global_head_dim", "qk_head_dim", "v_head_dim")
    widest = max(_number(config, name) for name in names)
    return widest or -(-int(config.hidden_size) // heads)


def _scores(config: Any, prompt: int, number_bytes: int) -> int:
    """Return what attention holds of all pairs of tokens, where it computes them all at once."""
    if getattr(config, "_attn_implementation", None) != "eager":
        return prompt * prompt  # a mask
    return (_number(config, "num_attention_heads") or 1) * prompt**2 * 2 * (number_bytes + _FLOAT)


def _number(config: Any, name: str) -> int:
    """Return a size, the largest where each layer has its own; 0 if the config has none."""
    value = getattr(config, name, None)
    return max((n for n in (value if isinstance(value, list | tuple) else [value]) if n), default=0)

"""Memory and disk space that a run will take, estimated before it begins, and advice if too much.

The figures of memory are bounds made of shapes: the process as it is, two layers of mapped base,
one checkpointed activation per layer, the activations of one layer while it is computed, those that
other layers keep instead of recomputing them, the logits of a few tokens, generation from a prompt
(keys and values, activations of the prompt, logits), and for the adapter its factors, gradients and
optimizer states.

A checkpoint holds parameters, optimizer states and each rank's statistics, and an adapter to try
out. A new one is whole before the oldest is removed, so there is one more at times than are kept;
and so there are two at times of what ``--best`` keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from loraformat.errors import ResourceError
from loraformat.families.tensor_names import layer_of
from loraformat.train.data.options import DataOptions
from loraformat.train.engine.compute_dtype import activation_dtype
from loraformat.train.engine.meta_model import text_config
from loraformat.train.loop import memory
from loraformat.train.loop.optimizer_options import SMALL, state_bytes
from loraformat.train.lora.initialise import svd_bytes
from loraformat.train.run.options import TrainOptions
from loraformat.train.run.text_generation import SAMPLE, generation_bytes, inner_width

if TYPE_CHECKING:
    from loraformat.train.model import TrainableModel

__all__ = [
    "DiskPlan",
    "MemoryBudget",
    "MemoryPlan",
    "ModelDims",
    "advise",
    "format_bytes",
    "plan_disk",
    "plan_memory",
]

#: Logits that a loss holds at once, and what it makes of a few of them (bytes).
_LOGITS = 160 << 20
#: What CUDA takes of a GPU before anything is put there (bytes).
_CONTEXT = 500_000_000
#: Tiles, reused buffers, and what the allocator keeps (bytes).
_WORKSPACE = 128 << 20
_FLOAT = 4
_NO_PARTS = ("base_on_disk", "initialisation", "limit")


@dataclass(frozen=True, slots=True)
class ModelDims:
    """The sizes that memory depends on.

    Attributes
    ----------
    layers, hidden, inner, vocabulary : int
        Decoder layers, hidden size, widest feed-forward size, tokens known.
    base_bytes, layer_bytes : int
        Of all shards, and of the largest decoder layer.
    trained, fixed : int
        Numbers of factors that are trained, and that are not: what PiSSA takes off.
    extra_bytes : int
        Second moments.
    small : int
        Trained numbers in tensors that 8-bit optimizers keep states of 32 bits for.
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
    """Bytes of memory by purpose.

    Attributes
    ----------
    base_on_disk : int
        Stays there; not part of the sum.
    process, templates : int
        Python, torch and transformers, as they are; the process that renders chat templates.
    mapped : int
        Pages of the base in memory at once; on a GPU what is kept there.
    activations, kept : int
        Checkpointed ones, and those of the layer that is being computed; those of layers that are
        not recomputed.
    logits, workspace, generation : int
    adapter, gradients, optimizer, statistics : int
        Of the adapter; states on a disk are not part of the sum.
    initialisation : int
        Before the first step, besides process and adapter: for the initial factors of one module.
        Not part of the sum, for it is freed before the rest is needed.
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
        parts = _listed(self.parts)
        allowed = f" of {format_bytes(self.limit)} allowed" if self.limit is not None else ""
        shown.append(f"memory at most about {format_bytes(self.total)}{allowed}: {parts}")
        if self.initialisation:
            shown.append(
                f"before the first step {format_bytes(self.before)}, of which it takes "
                f"{format_bytes(self.initialisation)} to compute the initial factors"
            )
        return shown

    def refuse_if_too_much(self, advice: list[str]) -> None:
        """Raise a `ResourceError` if it is more than the limit."""
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


def _listed(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)


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
    """Return the plan of a run; sizes are in bytes.

    Parameters
    ----------
    shape : ModelDims
    rows, length : int
        Of what goes through the model at once between two updates: a micro-batch, or with
        layer-major order all of them.
    process, templates : int
        What this process holds already, and the one that renders chat templates.
    optimizer, states : str
        As in `OptimizerOptions`.
    resident : int
        What of the base stays on a GPU besides two layers that come and go.
    number_bytes : int
        Of one number in an activation.
    generation : int
        See `generation_bytes`. It is not needed while a step is computed, but what a step frees
        stays with the process, in pieces that may not fit.
    spare : int
        What layers may take that keep their activations, if the limit allows it.
    limit : int or None
        What is allowed.

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


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """The memory of one run: planned once, when model and data are open, and handed down.

    Attributes
    ----------
    dims : ModelDims
    plan : MemoryPlan
        `MemoryPlan.kept` is the part for activations that are not recomputed.
    advice : list of str
        What would make the run smaller, with numbers.
    """

    dims: ModelDims
    plan: MemoryPlan
    advice: list[str]

    @classmethod
    def of(
        cls,
        model: TrainableModel,
        options: TrainOptions,
        prompts: Iterable[int] = (),
        templates: int = 0,
    ) -> MemoryBudget:
        """Plan the memory of a run; raise a `ResourceError` if it is over ``max_memory``.

        The model's `activation_memory` is what activations may take if the limit allows it. The
        options are as they take effect; `prompts` are the tokens of each prompt that is continued,
        and `templates` is what the process holds that renders chat templates (bytes).
        """
        dims, config = _dims(model, options), text_config(model.config)
        on_gpu = options.device != "cpu"
        kept = dims.base_bytes if options.device_memory is None else options.device_memory
        adapter = _FLOAT * (dims.trained + dims.fixed)
        number_bytes = activation_dtype(model.compute_dtype).itemsize
        rows = options.batch_size * (options.grad_accum if options.layer_major else 1)
        length = options.seq_len or DataOptions().seq_len
        continued = (generation_bytes(config, n, SAMPLE.max_tokens, number_bytes) for n in prompts)
        plan = plan_memory(
            dims, rows=rows, length=length,
            process=_CONTEXT if on_gpu else max(0, memory.resident() - adapter),
            resident=min(kept, dims.base_bytes) if on_gpu else 0,
            optimizer=options.optimizer, states=options.optimizer_states,
            number_bytes=number_bytes, templates=0 if on_gpu else templates,
            generation=max(continued, default=0),
            spare=0 if options.layer_major else model.activation_memory, limit=options.max_memory,
        )  # fmt: skip
        advice = advise(
            plan, length=length, rows=rows, optimizer=options.optimizer,
            states=options.optimizer_states, rank=options.rank,
        )  # fmt: skip
        plan.refuse_if_too_much(advice)
        return cls(dims, plan, advice)


def _dims(model: TrainableModel, options: TrainOptions) -> ModelDims:
    config = text_config(model.config)
    layers: Counter[Any] = Counter()
    total = 0
    for tensor in model.bundle.checkpoint.tensors.values():
        total += tensor.nbytes
        if (layer := layer_of(tensor.name)) is not None:
            layers[layer] += tensor.nbytes
    branches = model.branches.values()
    trained = [parameter.numel() for parameter in model.trainable().values()]
    fixed = (factor for branch in branches for factor in (branch.fixed_a, branch.fixed_b))
    # The factors of an adapter that is continued are there, and those of a GPU are made on the CPU.
    begun = [] if options.adapter or options.device != "cpu" else branches
    return ModelDims(
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        inner=inner_width(config),
        vocabulary=int(config.vocab_size),
        base_bytes=total,
        layer_bytes=max(layers.values(), default=0),
        trained=sum(trained),
        extra_bytes=sum(t.nbytes for t in model.extra_state().values()),
        small=sum(numbers for numbers in trained if numbers < SMALL),
        fixed=sum(factor.numel() for factor in fixed if factor is not None),
        initial_bytes=max(
            (svd_bytes(b.target, b.a.shape[-2], options.init) for b in begun), default=0
        ),
    )


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


#: Headers, options and records of a checkpoint or an adapter (bytes).
_RECORDS = 1_000_000


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """Bytes, by what they are for.

    Attributes
    ----------
    checkpoints : int
        One more than are kept.
    best : int
        What ``--best`` keeps, twice.
    states : int
        Optimizer states that lie on the disk while the run goes on.
    adapter : int
        The result.
    """

    checkpoints: int
    best: int
    states: int
    adapter: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.checkpoints + self.best + self.states + self.adapter

    def to_json(self) -> dict[str, Any]:
        """Return the figures for ``json.dumps``."""
        return {**asdict(self), "total": self.total}

    def line(self) -> str:
        """Say it for people."""
        return f"disk at most about {format_bytes(self.total)}: {_listed(asdict(self))}"


def plan_disk(shape: ModelDims, options: TrainOptions, ranks: int = 1) -> DiskPlan:
    """Return the plan of a run; `ranks` are processes, each with statistics of its own.

    Examples
    --------
    A million numbers, AdamW, two checkpoints kept:

    >>> shape = ModelDims(2, 64, 256, 1000, 10**6, 10**5, trained=10**6)
    >>> plan_disk(shape, TrainOptions()).line()
    'disk at most about 59.0 MB: checkpoints 54.0 MB, adapter 5.0 MB'
    """
    states = state_bytes(options.optimizer, shape.trained, shape.small)
    parameters = _FLOAT * shape.trained
    # Statistics are summed in float64, and stored with an adapter in float32.
    adapter = parameters + _FLOAT * shape.fixed + shape.extra_bytes // 2 + _RECORDS
    checkpoint = parameters + states + ranks * shape.extra_bytes + adapter + _RECORDS
    best = parameters + shape.extra_bytes + _RECORDS if options.best else 0
    return DiskPlan(
        checkpoints=(options.keep + 1) * checkpoint,
        best=2 * best,
        states=states if options.optimizer_states == "disk" else 0,
        adapter=adapter,
    )

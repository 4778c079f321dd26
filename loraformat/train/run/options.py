"""Options of a training run: names, defaults and help in one table.

The command line, the YAML file and Python take them from here; a flag is a field's name with
dashes. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, TypeVar, get_args, get_type_hints

from loraformat.errors import UsageError
from loraformat.ops.arguments import byte_count, many
from loraformat.train.data.options import DataOptions
from loraformat.train.loop.optimizer_options import OPTIMIZERS, SCHEDULES, OptimizerOptions
from loraformat.train.lora.options import INITIALISATIONS, LoraOptions

__all__ = ["SETTINGS", "Setting", "TrainOptions", "options_of", "value_of"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One option.

    Attributes
    ----------
    name : str
        Field of `TrainOptions`; flag and YAML key have dashes instead of underscores.
    section : str
        Heading in ``--help``.
    kind : str
        ``integer``, ``number``, ``text``, ``texts``, ``names``, ``flag``, ``size`` or
        ``ranks``.
    help : str
    default : object
    choices : tuple of str
        The words that a text may be.
    metavar : str or None
    free : bool
        May differ when a run goes on: it does not change what is computed, or what it names is
        compared by its content.
    """

    name: str
    section: str
    kind: str
    help: str
    default: Any
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    free: bool = False

    @property
    def flag(self) -> str:
        """The name with dashes."""
        return self.name.replace("_", "-")

    def plain(self, value: Any) -> Any:
        """Return a value as JSON and YAML have it."""
        if self.kind == "ranks":
            return dict(value)
        return list(value) if isinstance(value, tuple) else value


def _setting(
    section: str, default: Any, help_text: str, metavar: str | None = None, **more: Any
) -> Any:
    metadata = {"section": section, "help": help_text, "metavar": metavar, **more}
    return field(default=default, metadata=metadata)


_run, _adapter, _data, _optimisation, _evaluation, _output, _memory = (
    partial(_setting, section)
    for section in (
        "run", "Adapter", "Data", "Optimisation", "Evaluation", "Output", "Memory"
    )
)  # fmt: skip
#: Homes of the defaults that parts of a run share with `TrainOptions`.
_LORA, _DATA, _OPTIMIZER = LoraOptions(), DataOptions(), OptimizerOptions()
#: What numbers of `TrainOptions` are at least, in the order in which they are checked.
_LEAST = {
    "epochs": 1, "grad_accum": 1, "keep": 1, "eval_every": 0, "early_stop": 0, "seed": 0,
    "clip": 0, "lora_plus": 1, "weight_decay": 0, "steps": 1, "save_every": 1,
}  # fmt: skip
#: Kinds of options, by the annotations of their fields.
_KINDS = {
    "bool": "flag", "int": "integer", "float": "number", "str": "text",
    "tuple[str, ...]": "texts", "tuple[tuple[str, int], ...]": "ranks",
}  # fmt: skip


_Part = TypeVar("_Part", DataOptions, LoraOptions)


def _words(name: str) -> tuple[str, ...]:
    return get_args(get_type_hints(DataOptions)[name])


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """What a run is started with; see ``loraformat train --help`` for each of them.

    Examples
    --------
    >>> options = TrainOptions(rank=8, lr=1e-4)
    >>> options.lora().rank, options.data_options().seq_len, options.changed()
    (8, 512, {'rank': 8, 'lr': 0.0001})
    """

    base: str = _run("", "The bundle to train on.", free=True)
    data: tuple[str, ...] = _run((), "Files, directories or datasets on the Hub.", free=True)
    output: str = _run("", "The new adapter.", free=True)

    rank: int = _adapter(_LORA.rank, "Rank of every module.", "R")
    alpha: float | None = _adapter(
        _LORA.alpha, "LoRA alpha; deltas are scaled by alpha/rank. [default: the rank]", "A"
    )
    rslora: bool = _adapter(_LORA.rslora, "Rank-stabilised LoRA: scale by alpha/sqrt(rank).")
    targets: tuple[str, ...] = _adapter(
        _LORA.targets,
        "Target modules: all-linear, attention, mlp, module names or globs; comma-separated, "
        "repeatable.",
        "T", kind="names",
    )  # fmt: skip
    ranks: tuple[tuple[str, int], ...] = _adapter(
        (), "Rank of modules that match a name or glob. Repeatable.", "GLOB=R"
    )
    dropout: float = _adapter(_LORA.dropout, "LoRA dropout probability.", "P")
    init: str = _adapter(_LORA.init, "Initialisation of the factors.", choices=INITIALISATIONS)
    original: str = _adapter("", "Unquantized original of the base, for --init loftq.", "PATH")
    dora: bool = _adapter(_LORA.dora, "DoRA: also train a magnitude per output feature.")
    embeddings: bool = _adapter(_LORA.embeddings, "Also adapt the token embeddings.")
    head: bool = _adapter(_LORA.head, "Also adapt the output head.")
    statistics: bool = _adapter(_LORA.statistics, "Collect activation statistics for `reduce`.")
    adapter: str = _adapter(
        "", "Continue training this adapter, with its ranks and scaling.", "PATH"
    )
    allow_base_mismatch: bool = _adapter(
        False, "Accept an adapter that was made for another base.", free=True
    )

    seq_len: int | None = _data(
        None,
        "Maximum sequence length in tokens. [default: 512, or the model's context if shorter]",
        "N",
    )  # fmt: skip
    batch_size: int = _data(_DATA.batch_size, "Sequences per micro-batch.", "N")
    train_on: str = _data(
        _DATA.train_on,
        "Compute the loss on completions and assistant turns only, or on all tokens.",
        choices=_words("train_on"),
    )  # fmt: skip
    over_length: str = _data(
        _DATA.over_length,
        "What to do with samples longer than --seq-len.",
        choices=_words("over_length"),
    )
    packing: bool = _data(_DATA.packing, "Pack several samples into one sequence.")
    shuffle: bool = _data(_DATA.shuffle, "Shuffle the samples in each epoch.")
    bad_rows: str = _data(
        _DATA.bad_rows, "What to do with rows that cannot be read.", choices=_words("bad_rows")
    )
    split_text: str = _data(
        _DATA.split_text, "Treat a text file as one document, or each paragraph as one.",
        choices=_words("split_text"),
    )  # fmt: skip
    chat_template: str = _data("", "Jinja chat template that replaces the tokenizer's.", "FILE")
    subset: str = _data(_DATA.subset, "Subset of a dataset on the Hub.", "NAME")
    split: str = _data(_DATA.split, "Split of a dataset on the Hub.", "NAME")

    epochs: int = _optimisation(1, "Number of epochs.", "N")
    steps: int | None = _optimisation(None, "Number of optimizer steps; overrides --epochs.", "N")
    grad_accum: int = _optimisation(
        4, "Gradient accumulation: micro-batches per step, weighted by their target tokens.", "N"
    )
    layer_major: bool = _optimisation(
        False,
        "Run all micro-batches of a step through one layer before reading the next; for slow "
        "disks.",
    )  # fmt: skip
    lr: float = _optimisation(2e-4, "Peak learning rate.", "X")
    schedule: str = _optimisation(
        "cosine", "Learning-rate schedule after warmup.", choices=SCHEDULES
    )
    warmup: float = _optimisation(0.03, "Warmup steps, or a fraction of all steps if below 1.", "N")
    lora_plus: float = _optimisation(
        1.0, "LoRA+: ratio of the learning rate of B to that of A.", "X"
    )
    weight_decay: float = _optimisation(
        _OPTIMIZER.weight_decay, "Decoupled weight decay of matrices.", "X"
    )
    clip: float = _optimisation(1.0, "Maximum gradient norm; 0 disables clipping.", "X")
    optimizer: str = _optimisation(
        _OPTIMIZER.kind, "Optimizer; the 8-bit ones need bitsandbytes.", choices=tuple(OPTIMIZERS)
    )
    optimizer_states: str = _optimisation(
        _OPTIMIZER.states, "Where to keep the AdamW states; does not affect the result.",
        choices=("memory", "disk"), free=True,
    )  # fmt: skip
    seed: int = _optimisation(
        _DATA.seed, "Random seed for initialisation, shuffling and dropout.", "N"
    )
    deterministic: bool = _optimisation(False, "Fail on non-deterministic GPU kernels.")

    eval: tuple[str, ...] = _evaluation(
        (), "Held-out data to evaluate on. Repeatable.", "DATA", free=True
    )
    eval_every: int = _evaluation(
        0, "Steps between evaluations; 0 evaluates only before and after training.", "N"
    )
    early_stop: int = _evaluation(
        0, "Stop after this many evaluations without a lower held-out loss; 0 disables it.", "N"
    )
    best: bool = _evaluation(
        False, "Write the adapter with the lowest held-out loss instead of the last."
    )
    prompt: tuple[str, ...] = _evaluation(
        (), "Generate a sample from this prompt at every evaluation. Repeatable.", "TEXT", free=True
    )

    save_every: int | None = _output(
        None, "Steps between checkpoints. [default: one every ten minutes]", "N", free=True
    )
    keep: int = _output(2, "Number of checkpoints to keep.", "N", free=True)
    tensorboard: bool = _output(False, "Also log to TensorBoard.", free=True)
    plot: bool = _output(True, "Plot the loss curve, if matplotlib is installed.", free=True)

    device: str = _memory("cpu", "Device: cpu, cuda, cuda:1, …", "D")
    compute_dtype: str = _memory(
        "auto",
        "Dtype of activations and matrix products (f16: of products only). auto: f32 on a CPU, "
        "bf16 on a GPU; fastest: bf16 also on a CPU that multiplies it faster.",
        choices=("auto", "fastest", "f32", "bf16", "f16"),
    )  # fmt: skip
    device_memory: int | None = _memory(
        None, "GPU memory for base weights; the rest is streamed.", "SIZE", kind="size", free=True
    )
    activation_memory: int | None = _memory(
        None,
        "Memory for activations that are kept for the backward pass; other layers recompute "
        "theirs (gradient checkpointing). [default: half of the memory left when the whole "
        "base is cached]",
        "SIZE", kind="size", free=True,
    )  # fmt: skip
    max_memory: int | None = _memory(
        None, "Fail before training if the memory plan needs more.", "SIZE", kind="size", free=True
    )

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UsageError(f"{name.replace('_', '-')} is {value}, wanted at least {least}")
        if not self.eval and (self.eval_every or self.early_stop or self.best or self.prompt):
            raise UsageError(
                "eval-every, early-stop, best and prompt need held-out data",
                hint="name them with --eval",
            )
        if self.early_stop and not self.eval_every:
            raise UsageError("early-stop needs eval-every")

    def _part(self, kind: type[_Part], **other: Any) -> _Part:
        """Return the options of a kind that have their names here; ``other`` overrides."""
        names = [entry.name for entry in fields(kind)]
        return kind(**{name: getattr(self, name) for name in names} | other)

    def lora(self) -> LoraOptions:
        """Return what is trained."""
        return self._part(LoraOptions, ranks=dict(self.ranks))

    def ignored_flags(self) -> tuple[str, ...]:
        """Return the flags that say nothing, since an adapter that is trained on has its own.

        Examples
        --------
        >>> TrainOptions(adapter="first", rank=8, dropout=0.1).ignored_flags()
        ('rank',)
        """
        if not self.adapter:
            return ()
        heeded = ("dropout", "statistics", "adapter", "allow_base_mismatch")
        of_lora = [s.flag for s in SETTINGS if s.section == "Adapter" and s.name not in heeded]
        return tuple(flag for flag in self.changed() if flag in of_lora)

    def data_options(self, **other: Any) -> DataOptions:
        """Return how data become batches; ``other`` overrides."""
        length = _DATA.seq_len if self.seq_len is None else self.seq_len
        template = self.chat_template or None
        return self._part(DataOptions, **{"chat_template": template, "seq_len": length} | other)

    def optimizer_options(self) -> OptimizerOptions:
        """Return how parameters are updated."""
        return OptimizerOptions(
            self.optimizer, weight_decay=self.weight_decay, states=self.optimizer_states
        )

    def to_json(self) -> dict[str, Any]:
        """Return all of them as JSON values, by flag."""
        return {setting.flag: setting.plain(getattr(self, setting.name)) for setting in SETTINGS}

    def changed(self) -> dict[str, Any]:
        """Return those that are not the default, by flag."""
        return {
            setting.flag: setting.plain(value)
            for setting in SETTINGS
            if (value := getattr(self, setting.name)) != setting.default
        }


#: Every option, in the order of ``--help``.
SETTINGS = tuple(
    Setting(entry.name, default=entry.default, **{
        "kind": _KINDS[str(entry.type).removesuffix(" | None")], **entry.metadata
    })
    for entry in fields(TrainOptions)
)  # fmt: skip


def options_of(given: Mapping[str, Any]) -> TrainOptions:
    """Return the options of those members whose names are options; None is the default."""
    return TrainOptions(
        **{
            setting.name: value_of(setting, given[setting.name])
            for setting in SETTINGS
            if given.get(setting.name) is not None
        }
    )


def value_of(setting: Setting, value: Any) -> Any:
    """Return a value in the form that `TrainOptions` holds.

    It may be a path, one text or several, a mapping of globs to ranks, a size such as ``4GB``.

    Raises
    ------
    UsageError
        If it is none of the words that the option knows.
    """
    if setting.kind == "texts":
        return tuple(str(part) for part in many(value))
    if setting.kind == "names":
        return tuple(s for one in many(value) for part in one.split(",") if (s := part.strip()))
    if setting.kind == "ranks":
        return tuple(value.items() if isinstance(value, Mapping) else value)
    if setting.kind == "size":
        return byte_count(value, setting.flag)
    if setting.kind != "text":
        return value
    if setting.choices and value not in setting.choices:
        raise UsageError(f"{setting.flag} is {value!r}, wanted one of {', '.join(setting.choices)}")
    return str(value)

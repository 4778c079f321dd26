"""All options of a training run: names, defaults and help in one table.

The command line, the YAML file and Python take them from here; a flag is a field's name with
dashes. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

from loraformat.errors import UsageError
from loraformat.train.data.options import DataOptions
from loraformat.train.loop.optimizer_options import OPTIMIZERS, OptimizerOptions
from loraformat.train.loop.schedule import SCHEDULES
from loraformat.train.lora.options import INITIALISATIONS, LoraOptions

__all__ = ["SETTINGS", "Setting", "TrainOptions"]


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


def _setting(section: str, kind: str, default: Any, help_text: str, **more: Any) -> Any:
    return field(
        default=default,
        metadata={"section": section, "kind": kind, "help": help_text, **more},
    )


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

    base: str = _setting("run", "text", "", "The bundle to train on.", free=True)
    data: tuple[str, ...] = _setting(
        "run", "texts", (), "Files, directories, Hub datasets.", free=True
    )
    output: str = _setting("run", "text", "", "The new adapter.", free=True)

    rank: int = _setting("LoRA", "integer", 16, "Rank of every module.", metavar="R")
    alpha: float | None = _setting(
        "LoRA", "number", None, "Scale by alpha/rank; by default the rank itself.", metavar="A"
    )
    rslora: bool = _setting("LoRA", "flag", False, "Scale by alpha over the rank's square root.")
    targets: tuple[str, ...] = _setting(
        "LoRA",
        "names",
        ("all-linear",),
        "all-linear, attention, mlp, names of modules, or globs; comma-separated, repeatable.",
        metavar="T",
    )
    ranks: tuple[tuple[str, int], ...] = _setting(
        "LoRA",
        "ranks",
        (),
        "Another rank for modules of that name or glob. Repeatable.",
        metavar="GLOB=R",
    )
    dropout: float = _setting(
        "LoRA", "number", 0.0, "Share of inputs that A does not see.", metavar="P"
    )
    init: str = _setting("LoRA", "text", "kaiming", "How factors begin.", choices=INITIALISATIONS)
    original: str = _setting(
        "LoRA",
        "text",
        "",
        "The model that the base was quantized from, for --init loftq.",
        metavar="PATH",
    )
    dora: bool = _setting("LoRA", "flag", False, "Train a magnitude per output, too.")
    embeddings: bool = _setting("LoRA", "flag", False, "Train the token embeddings, too.")
    head: bool = _setting("LoRA", "flag", False, "Train the output head, too.")
    statistics: bool = _setting(
        "LoRA", "flag", True, "Collect second moments, for reduce, on the way."
    )
    adapter: str = _setting(
        "LoRA", "text", "", "Begin with this adapter, its ranks and its scaling.", metavar="PATH"
    )

    seq_len: int | None = _setting(
        "Data",
        "integer",
        None,
        "Most tokens in a row; by default 512, or the model's context if that is less.",
        metavar="N",
    )
    batch_size: int = _setting("Data", "integer", 1, "Rows of a micro-batch.", metavar="N")
    train_on: str = _setting(
        "Data",
        "text",
        "completions",
        "Learn completions and assistant turns only, or all.",
        choices=_words("train_on"),
    )
    over_length: str = _setting(
        "Data",
        "text",
        "refuse",
        "What becomes of samples that are too long.",
        choices=_words("over_length"),
    )
    packing: bool = _setting("Data", "flag", True, "Put several samples into one row.")
    shuffle: bool = _setting("Data", "flag", True, "Another order in each epoch.")
    bad_rows: str = _setting(
        "Data",
        "text",
        "refuse",
        "What becomes of rows that cannot be read.",
        choices=_words("bad_rows"),
    )
    split_text: str = _setting(
        "Data",
        "text",
        "document",
        "What is one document in a text file.",
        choices=_words("split_text"),
    )
    chat_template: str = _setting(
        "Data", "text", "", "Jinja file, instead of the tokenizer's.", metavar="FILE"
    )
    subset: str = _setting("Data", "text", "", "Subset of a Hub dataset.", metavar="NAME")
    split: str = _setting("Data", "text", "train", "Split of a Hub dataset.", metavar="NAME")

    epochs: int = _setting("Steps", "integer", 1, "Times that the data are seen.", metavar="N")
    steps: int | None = _setting(
        "Steps", "integer", None, "So many steps, instead of epochs.", metavar="N"
    )
    grad_accum: int = _setting(
        "Steps",
        "integer",
        4,
        "Micro-batches of a step, weighted by their learned tokens.",
        metavar="N",
    )
    layer_major: bool = _setting(
        "Steps",
        "flag",
        False,
        "Take all micro-batches through a layer before the next is read: for slow disks.",
    )
    lr: float = _setting("Steps", "number", 2e-4, "Highest learning rate.", metavar="X")
    schedule: str = _setting("Steps", "text", "cosine", "The way down from it.", choices=SCHEDULES)
    warmup: float = _setting(
        "Steps", "number", 0.03, "Steps of the way up; below 1 a share.", metavar="N"
    )
    lora_plus: float = _setting(
        "Steps", "number", 1.0, "B's learning rate over A's (LoRA+).", metavar="X"
    )
    weight_decay: float = _setting("Steps", "number", 0.0, "Decoupled, on matrices.", metavar="X")
    clip: float = _setting(
        "Steps", "number", 1.0, "Largest norm of the gradient; 0: any.", metavar="X"
    )
    optimizer: str = _setting(
        "Steps", "text", "adamw", "The 8-bit ones need bitsandbytes.", choices=tuple(OPTIMIZERS)
    )
    optimizer_states: str = _setting(
        "Steps",
        "text",
        "memory",
        "Where AdamW's states lie; the same bits.",
        choices=("memory", "disk"),
        free=True,
    )
    seed: int = _setting("Steps", "integer", 0, "Of factors, order and dropout.", metavar="N")
    deterministic: bool = _setting("Steps", "flag", False, "Refuse GPU kernels that are not.")

    eval: tuple[str, ...] = _setting(
        "Held-out data",
        "texts",
        (),
        "Measure the loss on these. Repeatable.",
        metavar="DATA",
        free=True,
    )
    eval_every: int = _setting(
        "Held-out data",
        "integer",
        0,
        "Steps between evaluations; 0: before and after only.",
        metavar="N",
    )
    early_stop: int = _setting(
        "Held-out data",
        "integer",
        0,
        "Stop after so many evaluations without a lower loss; 0: never.",
        metavar="N",
    )
    best: bool = _setting(
        "Held-out data",
        "flag",
        False,
        "Write the adapter of the lowest held-out loss, not the last.",
    )
    prompt: tuple[str, ...] = _setting(
        "Held-out data",
        "texts",
        (),
        "Continue this at every evaluation; in a chat, answer it. Repeatable.",
        metavar="TEXT",
        free=True,
    )

    save_every: int | None = _setting(
        "Record",
        "integer",
        None,
        "Steps between checkpoints; by default one every ten minutes.",
        metavar="N",
        free=True,
    )
    keep: int = _setting(
        "Record", "integer", 2, "Checkpoints that are kept.", metavar="N", free=True
    )
    tensorboard: bool = _setting("Record", "flag", False, "Write for TensorBoard, too.", free=True)
    plot: bool = _setting(
        "Record", "flag", True, "Draw the loss curve, if matplotlib is there.", free=True
    )

    device: str = _setting("Machine", "text", "cpu", "cpu, cuda, cuda:1 …", metavar="D")
    compute_dtype: str = _setting(
        "Machine",
        "text",
        "auto",
        "Type of activations and products (f16: of products alone). auto: f32 on a CPU, bf16 on a "
        "GPU; fastest: bf16 where the CPU multiplies it faster, too.",
        choices=("auto", "fastest", "f32", "bf16", "f16"),
    )
    device_memory: int | None = _setting(
        "Machine",
        "size",
        None,
        "What the base may take on the GPU; the rest is streamed.",
        metavar="SIZE",
        free=True,
    )
    activation_memory: int | None = _setting(
        "Machine",
        "size",
        None,
        "What layers may take that keep their activations; the others compute them again. By "
        "default half of the memory that is left when the whole base is cached.",
        metavar="SIZE",
        free=True,
    )
    max_memory: int | None = _setting(
        "Machine",
        "size",
        None,
        "Refuse to start if the plan needs more.",
        metavar="SIZE",
        free=True,
    )

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1),
            ("grad_accum", 1),
            ("keep", 1),
            ("eval_every", 0),
            ("early_stop", 0),
            ("seed", 0),
            ("clip", 0),
            ("lora_plus", 1),
            ("weight_decay", 0),
        ):
            if not getattr(self, name) >= least:
                raise _out_of_range(name, getattr(self, name), f"at least {least}")
        for name in ("steps", "save_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise _out_of_range(name, getattr(self, name), "at least 1")
        if not self.eval and (self.eval_every or self.early_stop or self.best or self.prompt):
            raise UsageError(
                "eval-every, early-stop, best and prompt need held-out data",
                hint="name them with --eval",
            )
        if self.early_stop and not self.eval_every:
            raise UsageError("early-stop needs eval-every")

    def lora(self) -> LoraOptions:
        """Return what is trained."""
        names = {entry.name for entry in fields(LoraOptions)}
        members = {name: getattr(self, name) for name in names}
        return LoraOptions(**{**members, "ranks": dict(self.ranks)})

    def unheeded(self) -> tuple[str, ...]:
        """Return the flags that say nothing, since an adapter that is trained on has its own.

        Examples
        --------
        >>> TrainOptions(adapter="first", rank=8, dropout=0.1).unheeded()
        ('rank',)
        """
        if not self.adapter:
            return ()
        heeded = ("dropout", "statistics", "adapter")
        of_lora = [s.flag for s in SETTINGS if s.section == "LoRA" and s.name not in heeded]
        return tuple(flag for flag in self.changed() if flag in of_lora)

    def data_options(self, **other: Any) -> DataOptions:
        """Return how data become batches; ``other`` overrides."""
        names = {entry.name for entry in fields(DataOptions)}
        members = {name: getattr(self, name) for name in names}
        members["chat_template"] = self.chat_template or None
        members["seq_len"] = DataOptions().seq_len if self.seq_len is None else self.seq_len
        return DataOptions(**{**members, **other})

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


def _out_of_range(name: str, value: object, wanted: str) -> UsageError:
    return UsageError(f"{name.replace('_', '-')} is {value}, wanted {wanted}")


def _settings() -> tuple[Setting, ...]:
    return tuple(
        Setting(entry.name, default=entry.default, **entry.metadata)
        for entry in fields(TrainOptions)
    )


#: Every option, in the order of ``--help``.
SETTINGS = _settings()

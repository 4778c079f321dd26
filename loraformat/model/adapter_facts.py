"""Facts about an adapter's files, for the rules.

An `Adapter` says what an adapter means; what it cannot hold its reader refuses. Other programs
read the same files in other ways, so that the facts here are those of the files: raw names, the
config's own fields, half pairs, numbers that are none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["AdapterFacts", "BaseFacts", "Loading", "ModuleFacts"]


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """One module that an adapter changes.

    Attributes
    ----------
    name : str
        As transformers calls it: ``model.layers.0.self_attn.q_proj``.
    rank, in_features, out_features : int
        From the shapes; 0 where a half is missing.
    alpha, scaling : float
        The module's own alpha, and the factor of B A that it was trained with.
    dtypes : tuple of str
        Of A and B, as safetensors names them.
    missing : str or None
        ``lora_A`` or ``lora_B``, if that half is not there.
    dora, bias : bool
        It has a magnitude; a bias of its own (``lora_bias``).
    experts : int
        Of fused experts, else 0.
    embedding : bool
        Its factors are ``lora_embedding_A`` and ``lora_embedding_B``.
    zero : bool
        B is zero, so that it has no effect.
    base_shape : tuple of int or None
        Of the base's weight; None if no base was named, or it has none of that name.
    """

    name: str
    rank: int
    in_features: int
    out_features: int
    alpha: float
    scaling: float
    dtypes: tuple[str, ...] = ("F32", "F32")
    missing: str | None = None
    dora: bool = False
    bias: bool = False
    experts: int = 0
    embedding: bool = False
    zero: bool = False
    base_shape: tuple[int, ...] | None = None

    @property
    def leaf(self) -> str:
        """Last part of the name: ``q_proj``."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """The base that an adapter is compared with.

    Attributes
    ----------
    model_type : str or None
        As its config says.
    tied : bool
        The head is the embedding.
    fingerprint : str or None
        Of a bundle.
    named : bool
        Its tensors are known, not its config alone.
    layers : int or None
    tokens : int or None
        Rows of its embedding.
    gguf_architecture : str or None
        What GGUF calls its architecture, if that has a name for it.
    commit : str or None
        Of its repository, if it is from the Hub.
    shared_block : str or None
        The part of a name below which several of its layers have the same weights.
    single_experts : bool
        Checkpoints of it have names for the linears of each of its experts.
    """

    model_type: str | None = None
    tied: bool = False
    fingerprint: str | None = None
    named: bool = False
    layers: int | None = None
    tokens: int | None = None
    gguf_architecture: str | None = None
    commit: str | None = None
    shared_block: str | None = None
    single_experts: bool = False


@dataclass(frozen=True, slots=True)
class Loading:
    """What PEFT does with an adapter on a base of these shapes.

    Attributes
    ----------
    problem : str or None
        Why it does not load.
    ignored : tuple of str
        Tensors that are left out without an error, though the base has what they change: their
        names are others, or the config does not name them.
    unknown : tuple of str
        Tensors that are left out as the base has nothing of the kind.
    taken : int
        Tensors that are loaded.
    proven : bool
        PEFT itself has loaded it, or loads all of its kind; else rules say so.
    fits : bool
        Each of its tensors belongs to one of the base's, and has its sizes.
    vocabularies : tuple of int or None
        Tokens of the adapter and of the base, if these are all that does not fit.
    """

    problem: str | None = None
    ignored: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    taken: int = 0
    proven: bool = True
    fits: bool = False
    vocabularies: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """Facts about an adapter.

    Attributes
    ----------
    format : str
        Name of the converter that looked at it.
    modules : tuple of ModuleFacts
    replaced : tuple of str
        Tensors that it replaces as a whole.
    rows : tuple of str
        Embeddings of which it replaces rows.
    last_token : int or None
        The largest of the tokens whose rows it replaces.
    task : str or None
        ``task_type`` of its config.
    labels : int or None
        Rows of the head that it replaces, if that classifies.
    config_rank : int or None
        ``r``, if there is a config.
    config_alpha : object
        ``lora_alpha`` as JSON has it: an int, a float, or None without a config.
    rslora : bool
    patterns : tuple of str
        ``rank_pattern`` and ``alpha_pattern``, those that are not empty.
    init : str or None
        A start of the factors by which PEFT changes the base.
    invocation_tokens : bool
        It is an aLoRA.
    dora : bool
        The config says so, or a module has a magnitude.
    bias : bool
        The config, or a tensor, says that it has biases.
    odd_names : tuple of str
        Tensors whose names are not those that PEFT writes.
    empty : tuple of str
        Tensors without elements.
    beside : tuple of str
        Other files of weights in its directory.
    sharded : bool
        Its tensors lie in several files with an index.
    nonfinite : tuple of str
        Tensors with NaN or infinity.
    refusal, refusal_hint : str or None
        Why loraformat itself does not read it as low-rank deltas, and its advice.
    architecture : str or None
        GGUF's name of the architecture that it is for.
    base_model, base_fingerprint, base_commit : str or None
        What it says of its base; the commit on the Hub only if it is one.
    tokenizer_change, template_change : str or None
        What its own tokenizer, or chat template, has otherwise than the base's, in a sentence.
    base : BaseFacts or None
        The one that it is held against.
    foreign : tuple of str
        Modules and tensors of that base under names that it has neither on disk nor in memory.
    loading : Loading or None
        What PEFT does with it on that base.
    """

    format: str
    modules: tuple[ModuleFacts, ...] = ()
    replaced: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    last_token: int | None = None
    task: str | None = None
    labels: int | None = None
    config_rank: int | None = None
    config_alpha: Any = None
    rslora: bool = False
    patterns: tuple[str, ...] = ()
    init: str | None = None
    invocation_tokens: bool = False
    dora: bool = False
    bias: bool = False
    odd_names: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    sharded: bool = False
    nonfinite: tuple[str, ...] = ()
    refusal: str | None = None
    refusal_hint: str | None = None
    architecture: str | None = None
    base_model: str | None = None
    base_fingerprint: str | None = None
    base_commit: str | None = None
    tokenizer_change: str | None = None
    template_change: str | None = None
    base: BaseFacts | None = None
    foreign: tuple[str, ...] = ()
    loading: Loading | None = None

    @property
    def ranks(self) -> list[int]:
        """All ranks."""
        return sorted({module.rank for module in self.modules if module.rank})

    @property
    def rank(self) -> int:
        """Largest rank."""
        return max(self.ranks, default=0)

    @property
    def leaves(self) -> set[str]:
        """Last names of the modules."""
        return {module.leaf for module in self.modules}

"""Which places of a model are trained, and with what rank.

No regular expressions: a word for a group, a name, the last parts of a name, or a glob of
either. What matches nothing is an error that names the nearest; a run that trains less than
it was asked to is found out too late otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from loraformat.errors import UsageError, nearest, printable
from loraformat.train.lora.options import LoraOptions
from loraformat.train.lora.target_module import TargetModule

__all__ = ["GROUPS", "matches", "resolve"]

_ATTENTION = re.compile(r"(^|\.)(\w*attn|\w*attention)(\.|$)")
_MLP = re.compile(
    r"(^|\.)(\w*mlp|feed_forward|ffn|\w*moe|\w*experts?)(\.|$)|\.(fc\d*|fc_in|fc_out)$"
)
#: Routers send tokens to experts: nobody means them by "all linears".
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")


def _is_linear(site: TargetModule) -> bool:
    return (
        site.kind in ("linear", "experts")
        and site.in_layers
        and site.in_peft != "refused"
        and not site.shared
        and not _ROUTER.search(site.name)
    )


def _is_attention(site: TargetModule) -> bool:
    return _is_linear(site) and bool(_ATTENTION.search(site.name))


def _is_mlp(site: TargetModule) -> bool:
    return _is_linear(site) and not _is_attention(site) and bool(_MLP.search(site.name))


_GLOB = re.compile(r"[*?\[]")

#: Words that stand for groups.
GROUPS: dict[str, Callable[[TargetModule], bool]] = {
    "all-linear": _is_linear,
    "attention": _is_attention,
    "mlp": _is_mlp,
}


def matches(name: str, pattern: str) -> bool:
    """Tell whether a name, or a pattern, means a module.

    Examples
    --------
    >>> matches("model.layers.0.self_attn.q_proj", "q_proj")
    True
    >>> matches("model.layers.11.self_attn.q_proj", "layers.1?.*.q_proj")
    True
    >>> matches("model.layers.0.self_attn.q_proj", "proj")
    False
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def resolve(sites: Sequence[TargetModule], options: LoraOptions) -> dict[str, int]:
    """Return the rank of every place that is trained, by name, in the model's order.

    Parameters
    ----------
    sites : sequence of Site
    options : LoraOptions

    Raises
    ------
    UsageError
        If a target or a rank's pattern means nothing, naming the nearest.
    """
    chosen = {site.name for word in options.targets for site in _meant(sites, word)}
    for kind, wanted in (("embedding", options.embeddings), ("head", options.head)):
        if wanted:
            chosen |= {site.name for site in _of_kind(sites, kind)}
    names = [site.name for site in sites if site.name in chosen]
    ranks = dict.fromkeys(names, options.rank)
    for pattern, rank in options.named():
        found = [name for name in names if matches(name, pattern)]
        if not found:
            raise UsageError(
                f"the rank of {printable(pattern)} is of no module that is trained"
                + _nearest(pattern, names)
            )
        ranks.update(dict.fromkeys(found, rank))
    return ranks


def _of_kind(sites: Sequence[TargetModule], kind: str) -> list[TargetModule]:
    found = [site for site in sites if site.kind == kind]
    if not found:
        raise UsageError(f"this model has no {kind} that can be trained")
    return found


def _meant(sites: Sequence[TargetModule], word: str) -> list[TargetModule]:
    group = GROUPS.get(word)
    found = [site for site in sites if (group(site) if group else _is_named(site, word))]
    if shared := [site for site in found if site.shared]:
        raise UsageError(
            f"{printable(shared[0].name)} shares its weight with other layers: PEFT would adapt "
            "one of them, and a merge all",
            hint="leave it out; all-linear does",
        )
    if refused := [site for site in found if site.in_peft == "refused"]:
        raise UsageError(
            f"PEFT refuses to adapt {printable(refused[0].name)}: a state-space kernel multiplies "
            "by its weight",
            hint="leave it out; all-linear does",
        )
    if found:
        return found
    names = [site.name for site in sites]
    raise UsageError(
        f"target {printable(word)} is no module of this model" + _nearest(word, names),
        hint=f"wanted {', '.join(GROUPS)}, the name of a module, its last part, or a glob",
    )


def _is_named(site: TargetModule, word: str) -> bool:
    """Tell whether a word means a place. A router is meant by its name, and not by a glob."""
    if site.kind == "parameter" and _GLOB.search(word):
        return False
    return matches(site.name, word)


def _nearest(word: str, names: Iterable[str]) -> str:
    """Return words that name the most similar last part, or the most similar name."""
    names = list(names)
    last_parts = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    return nearest(word, names if "." in word else [*GROUPS, *last_parts])

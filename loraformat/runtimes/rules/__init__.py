"""The compatibility rules."""

from __future__ import annotations

from loraformat.runtimes.record import Rule
from loraformat.runtimes.rules.base import BASE_RULES, LOADING_RULES
from loraformat.runtimes.rules.files import FILE_RULES, PROMPT_RULES
from loraformat.runtimes.rules.method import METHOD_RULES
from loraformat.runtimes.rules.modules import MODULE_RULES
from loraformat.runtimes.rules.scaling import SCALING_RULES
from loraformat.runtimes.rules.values import VALUE_RULES

__all__ = ["FORMAT", "RULES"]

#: The rule that `loraformat.runtimes.judge` keeps itself: another format than the runtime reads.
FORMAT = "FORMAT"

#: In the order in which findings are shown.
RULES: tuple[Rule, ...] = (
    *METHOD_RULES,
    *SCALING_RULES,
    *MODULE_RULES,
    *FILE_RULES,
    *BASE_RULES,
    *LOADING_RULES,
    *PROMPT_RULES,
    *VALUE_RULES,
)

"""Chat templates that write today's date, made to write the same one every day.

Otherwise a run that goes on past midnight, or is continued tomorrow, would train on other
tokens than it began with, and nobody could repeat it.
"""

from __future__ import annotations

import re
from datetime import date
from functools import lru_cache

__all__ = ["on_one_day"]

_DAY = date(2024, 7, 26)  # what Llama 3.2's template writes where there is no clock
_CALL = re.compile(r"""strftime_now\(\s*(?:"([^"]{0,80})"|'([^']{0,80})')\s*\)""")


@lru_cache(maxsize=8)
def on_one_day(template: str) -> str:
    """Return a Jinja template in which ``strftime_now`` knows one day only: 26 July 2024.

    Parameters
    ----------
    template : str

    Returns
    -------
    str
        The same text if it asks for no date.

    Examples
    --------
    >>> on_one_day("{{ bos_token }}")
    '{{ bos_token }}'
    >>> on_one_day("{{ strftime_now('%Y') }}").endswith("{{ '2024' }}")
    True
    """

    def written(call: re.Match[str]) -> str:
        return repr(_DAY.strftime(call[1] or call[2] or ""))

    fixed = _CALL.sub(written, template)
    if "strftime_now(" not in fixed:
        return fixed
    # A format that is put together in the template; +%} keeps a line end that follows.
    return f"{{%- macro strftime_now(format) -%}}{_DAY.isoformat()}{{%- endmacro +%}}{fixed}"

"""Advice common to several runtimes."""

from __future__ import annotations

__all__ = ["INIT"]

INIT = "save it again with path_initial_model_for_weight_conversion, as PEFT's documentation shows"

"""``adapter_config.json``: what is honoured, what is refused by name, and the scaling."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from loraformat import strict_json
from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.folder import Folder

__all__ = ["CONFIG_NAME", "LoraSettings", "read_settings"]

CONFIG_NAME = "adapter_config.json"

_MAX_CONFIG_BYTES = 1 << 20
_MAX_RANK = 16384
_MAX_QUANTIFIERS = 3
_MERGE_IT = "merge it with PEFT, where it was trained"

#: Fields that change the mathematics in a way that a low-rank delta does not hold, and the remedy.
_REFUSED = {
    "alora_invocation_tokens": ("aLoRA acts on some tokens only", "use it in PEFT, unmerged"),
    "arrow_config": ("Arrow routes between adapters", "use it in PEFT, unmerged"),
    "use_bdlora": ("BD-LoRA's factors are block-diagonal", _MERGE_IT),
    "kasa_config": ("KaSA truncates the base", _MERGE_IT),
    "use_qalora": ("QALoRA pools its input", _MERGE_IT),
    "layer_replication": ("layer_replication builds another stack of layers", _MERGE_IT),
    "target_parameters": ("target_parameters (experts) cannot be read yet", _MERGE_IT),
    "trainable_token_indices": ("trainable tokens cannot be read yet", _MERGE_IT),
    "megatron_config": ("Megatron shards its factors", "export it to plain LoRA first"),
}
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


class LoraSettings:
    """The fields of a LoRA config that decide what its tensors mean.

    Attributes
    ----------
    config : dict
        All of it.
    rslora : bool
    conv1d : bool
        ``fan_in_fan_out``: the base holds its weights as (in, out).
    """

    def __init__(self, config: dict[str, Any], path: Path) -> None:
        self.config, self._path = config, path
        self._refuse()
        self.rslora = config.get("use_rslora") is True
        self.conv1d = config.get("fan_in_fan_out") is True
        self._number(config.get("r", 8), "r", whole=True)
        self._alpha = self._number(config.get("lora_alpha", 8), "lora_alpha")
        self._alphas = [
            (self._pattern(key), self._number(value, f"alpha_pattern of {printable(key)}"))
            for key, value in self._object("alpha_pattern").items()
        ]

    def _refuse(self) -> None:
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise UnsupportedError(
                f"peft_type is {printable(kind)}, and only LORA is a low-rank delta",
                path=self._path,
            )
        for field, (reason, remedy) in _REFUSED.items():
            if self.config.get(field):
                raise UnsupportedError(f"{field}: {reason}", path=self._path, hint=remedy)
        start = self.config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise UnsupportedError(
                f"init_lora_weights is {printable(start)}, which changes the base as PEFT loads it",
                path=self._path,
                hint="save it with path_initial_model_for_weight_conversion, as PEFT's docs show",
            )

    def _object(self, field: str) -> dict[str, Any]:
        value = self.config.get(field) or {}
        if not isinstance(value, dict):
            raise InputError(f"{field} is not an object", path=self._path)
        return value

    def _number(self, value: Any, what: str, *, whole: bool = False) -> float:
        numeric = type(value) is int or (type(value) is float and math.isfinite(value))
        if not numeric or (whole and (type(value) is not int or not 1 <= value <= _MAX_RANK)):
            wanted = f"an integer from 1 to {_MAX_RANK}" if whole else "a finite number"
            raise InputError(f"{what} is {printable(value)}, wanted {wanted}", path=self._path)
        return float(value)

    def _pattern(self, key: str) -> re.Pattern[str]:
        # A repeated group can take exponential time, and many repetitions a high power.
        repeats = len(re.findall(r"[*+{]", key))
        if len(key) > 512 or repeats > _MAX_QUANTIFIERS or re.search(r"\)\s*[*+?{]", key):
            raise InputError(
                f"alpha_pattern {printable(key)} is a pattern that may take for ever to match",
                path=self._path,
                hint="name the modules, without repetition",
            )
        try:
            return re.compile(rf"(.*\.)?({key})$")
        except re.error as error:
            raise InputError(
                f"alpha_pattern {printable(key)} is no regular expression: {error}", path=self._path
            ) from None

    def alpha(self, module: str) -> float:
        """Return α of a module: the first pattern that matches wins, as in PEFT."""
        return next((a for pattern, a in self._alphas if pattern.match(module)), self._alpha)

    def scaling(self, module: str, rank: int) -> float:
        """Return α/r, or α/√r with rsLoRA; r is the rank of the module's own factors."""
        return self.alpha(module) / (math.sqrt(rank) if self.rslora else rank)


def read_settings(folder: Folder) -> LoraSettings:
    """Read and check a config.

    Raises
    ------
    InputError
        If it is damaged or hostile.
    UnsupportedError
        Naming the field that a low-rank delta does not hold, with the remedy.
    """
    path = folder.path / CONFIG_NAME
    try:
        config = strict_json.loads(folder.read(CONFIG_NAME, _MAX_CONFIG_BYTES))
    except strict_json.StrictJsonError as error:
        raise InputError(f"not strict JSON: {error}", path=path) from None
    if not isinstance(config, dict):
        raise InputError("not a JSON object", path=path)
    return LoraSettings(config, path)

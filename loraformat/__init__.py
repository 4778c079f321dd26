"""loraformat: NF4 base weights and LoRA adapters: formats, converters, algebra, training.

The names below are loaded on first use, so that importing the package costs nothing. The packages
`loraformat.train` and `loraformat.demo` can be called as the verbs of their names.
"""

from __future__ import annotations

import sys
from importlib import import_module
from inspect import Signature, signature
from types import ModuleType
from typing import TYPE_CHECKING, Any

from loraformat.version import __version__

if TYPE_CHECKING:
    from loraformat.api.check import check as check
    from loraformat.api.check import fix as fix
    from loraformat.api.convert import convert as convert
    from loraformat.api.demo import demo as demo
    from loraformat.api.evaluate import evaluate as evaluate
    from loraformat.api.evaluate import generate as generate
    from loraformat.api.hub import pull as pull
    from loraformat.api.hub import push as push
    from loraformat.api.look import formats as formats
    from loraformat.api.look import info as info
    from loraformat.api.look import open_adapter as open_adapter
    from loraformat.api.look import open_bundle as open_bundle
    from loraformat.api.look import open_model as open_model
    from loraformat.api.look import verify as verify
    from loraformat.api.merge import merge as merge
    from loraformat.api.merge import unmerge as unmerge
    from loraformat.api.plots import plot_errors as plot_errors
    from loraformat.api.plots import plot_loss as plot_loss
    from loraformat.api.plots import plot_spectrum as plot_spectrum
    from loraformat.api.remove import remove as remove
    from loraformat.api.shape import combine as combine
    from loraformat.api.shape import extract as extract
    from loraformat.api.shape import reduce as reduce
    from loraformat.api.shape import spectrum as spectrum
    from loraformat.api.train import train as train
    from loraformat.demo.pipeline import DemoReport as DemoReport
    from loraformat.errors import LoraFormatError as LoraFormatError
    from loraformat.ops.check.check import CheckReport as CheckReport
    from loraformat.ops.combine.report import CombinationReport as CombinationReport
    from loraformat.ops.convert.adapter import AdapterConversion as AdapterConversion
    from loraformat.ops.convert.report import ConversionReport as ConversionReport
    from loraformat.ops.convert.report import ModelConversion as ModelConversion
    from loraformat.ops.extract.report import ExtractionReport as ExtractionReport
    from loraformat.ops.formats import FormatsReport as FormatsReport
    from loraformat.ops.info.report import AdapterInfo as AdapterInfo
    from loraformat.ops.info.report import InfoReport as InfoReport
    from loraformat.ops.info.report import ModelInfo as ModelInfo
    from loraformat.ops.merge.report import MergeReport as MergeReport
    from loraformat.ops.pull.report import PullReport as PullReport
    from loraformat.ops.push.report import PushReport as PushReport
    from loraformat.ops.reduce import ReductionReport as ReductionReport
    from loraformat.ops.remove import RemovalReport as RemovalReport
    from loraformat.ops.report import Report as Report
    from loraformat.ops.spectrum.spectrum import SpectrumReport as SpectrumReport
    from loraformat.ops.unmerge.report import UnmergeReport as UnmergeReport
    from loraformat.ops.verify import VerificationReport as VerificationReport
    from loraformat.train.run.evaluate import EvaluationReport as EvaluationReport
    from loraformat.train.run.generate import GenerationReport as GenerationReport
    from loraformat.train.run.report import TrainReport as TrainReport

#: Module of each public name.
_HOMES = {
    "AdapterConversion": "loraformat.ops.convert.adapter",
    "AdapterInfo": "loraformat.ops.info.report",
    "CheckReport": "loraformat.ops.check.check",
    "CombinationReport": "loraformat.ops.combine.report",
    "ConversionReport": "loraformat.ops.convert.report",
    "DemoReport": "loraformat.demo.pipeline",
    "EvaluationReport": "loraformat.train.run.evaluate",
    "ExtractionReport": "loraformat.ops.extract.report",
    "FormatsReport": "loraformat.ops.formats",
    "GenerationReport": "loraformat.train.run.generate",
    "InfoReport": "loraformat.ops.info.report",
    "LoraFormatError": "loraformat.errors",
    "MergeReport": "loraformat.ops.merge.report",
    "ModelConversion": "loraformat.ops.convert.report",
    "ModelInfo": "loraformat.ops.info.report",
    "PullReport": "loraformat.ops.pull.report",
    "PushReport": "loraformat.ops.push.report",
    "ReductionReport": "loraformat.ops.reduce",
    "RemovalReport": "loraformat.ops.remove",
    "Report": "loraformat.ops.report",
    "SpectrumReport": "loraformat.ops.spectrum.spectrum",
    "TrainReport": "loraformat.train.run.report",
    "UnmergeReport": "loraformat.ops.unmerge.report",
    "VerificationReport": "loraformat.ops.verify",
    "check": "loraformat.api.check",
    "combine": "loraformat.api.shape",
    "convert": "loraformat.api.convert",
    "demo": "loraformat.api.demo",
    "evaluate": "loraformat.api.evaluate",
    "extract": "loraformat.api.shape",
    "fix": "loraformat.api.check",
    "formats": "loraformat.api.look",
    "generate": "loraformat.api.evaluate",
    "info": "loraformat.api.look",
    "merge": "loraformat.api.merge",
    "open_adapter": "loraformat.api.look",
    "open_bundle": "loraformat.api.look",
    "open_model": "loraformat.api.look",
    "plot_errors": "loraformat.api.plots",
    "plot_loss": "loraformat.api.plots",
    "plot_spectrum": "loraformat.api.plots",
    "pull": "loraformat.api.hub",
    "push": "loraformat.api.hub",
    "reduce": "loraformat.api.shape",
    "remove": "loraformat.api.remove",
    "spectrum": "loraformat.api.shape",
    "train": "loraformat.api.train",
    "unmerge": "loraformat.api.merge",
    "verify": "loraformat.api.look",
}

__all__ = [
    "AdapterConversion",
    "AdapterInfo",
    "CheckReport",
    "CombinationReport",
    "ConversionReport",
    "DemoReport",
    "EvaluationReport",
    "ExtractionReport",
    "FormatsReport",
    "GenerationReport",
    "InfoReport",
    "LoraFormatError",
    "MergeReport",
    "ModelConversion",
    "ModelInfo",
    "PullReport",
    "PushReport",
    "ReductionReport",
    "RemovalReport",
    "Report",
    "SpectrumReport",
    "TrainReport",
    "UnmergeReport",
    "VerificationReport",
    "__version__",
    "check",
    "combine",
    "convert",
    "demo",
    "evaluate",
    "extract",
    "fix",
    "formats",
    "generate",
    "info",
    "merge",
    "open_adapter",
    "open_bundle",
    "open_model",
    "plot_errors",
    "plot_loss",
    "plot_spectrum",
    "pull",
    "push",
    "reduce",
    "remove",
    "spectrum",
    "train",
    "unmerge",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loraformat' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


class _VerbPackage(ModuleType):
    """A package that can also be called as the verb of its name: ``loraformat.train(...)``."""

    @property
    def __signature__(self) -> Signature:
        return signature(self._verb())

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._verb()(*arguments, **options)

    def _verb(self) -> Any:
        leaf = self.__name__.rpartition(".")[2]
        return getattr(import_module(f"{__name__}.api.{leaf}"), leaf)


class _Package(ModuleType):
    """The type of this package: submodules named as verbs become callable when imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("train", "demo") and isinstance(value, ModuleType):
            value.__class__ = _VerbPackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

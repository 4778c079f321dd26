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
    from loraformat.demo.pipeline import DemoReport as DemoReport
    from loraformat.demo.pipeline import demo as demo
    from loraformat.errors import LoraFormatError as LoraFormatError
    from loraformat.model.description import AdapterInfo as AdapterInfo
    from loraformat.model.description import InfoReport as InfoReport
    from loraformat.model.description import ModelInfo as ModelInfo
    from loraformat.model.report import Report as Report
    from loraformat.ops.check.check import CheckReport as CheckReport
    from loraformat.ops.check.check import check as check
    from loraformat.ops.check.check import fix as fix
    from loraformat.ops.combine.combine import CombinationReport as CombinationReport
    from loraformat.ops.combine.combine import combine as combine
    from loraformat.ops.convert.adapter import AdapterConversion as AdapterConversion
    from loraformat.ops.convert.convert import convert as convert
    from loraformat.ops.convert.report import ConversionReport as ConversionReport
    from loraformat.ops.convert.report import ModelConversion as ModelConversion
    from loraformat.ops.extract.extract import extract as extract
    from loraformat.ops.extract.report import ExtractionReport as ExtractionReport
    from loraformat.ops.formats import FormatsReport as FormatsReport
    from loraformat.ops.formats import formats as formats
    from loraformat.ops.info.error_plot import plot_errors as plot_errors
    from loraformat.ops.info.model import info as info
    from loraformat.ops.merge.merge import merge as merge
    from loraformat.ops.merge.report import MergeReport as MergeReport
    from loraformat.ops.opening.adapter import open_adapter as open_adapter
    from loraformat.ops.opening.model import open_bundle as open_bundle
    from loraformat.ops.opening.model import open_model as open_model
    from loraformat.ops.pull.pull import PullReport as PullReport
    from loraformat.ops.pull.pull import pull as pull
    from loraformat.ops.push.push import push as push
    from loraformat.ops.push.report import PushReport as PushReport
    from loraformat.ops.reduce import ReductionReport as ReductionReport
    from loraformat.ops.reduce import reduce as reduce
    from loraformat.ops.remove import RemovalReport as RemovalReport
    from loraformat.ops.remove import remove as remove
    from loraformat.ops.spectrum.plot import plot_spectrum as plot_spectrum
    from loraformat.ops.spectrum.spectrum import SpectrumReport as SpectrumReport
    from loraformat.ops.spectrum.spectrum import spectrum as spectrum
    from loraformat.ops.unmerge.subtract import UnmergeReport as UnmergeReport
    from loraformat.ops.unmerge.unmerge import unmerge as unmerge
    from loraformat.ops.verify import VerificationReport as VerificationReport
    from loraformat.ops.verify import verify as verify
    from loraformat.train.run.evaluate import EvaluationReport as EvaluationReport
    from loraformat.train.run.generate import GenerationReport as GenerationReport
    from loraformat.train.run.loss_curve import plot_loss as plot_loss
    from loraformat.train.run.report import TrainReport as TrainReport
    from loraformat.train.run.verbs import evaluate as evaluate
    from loraformat.train.run.verbs import generate as generate
    from loraformat.train.run.verbs import train as train

#: Public names by module.
_NAMES = {
    "demo.pipeline": "DemoReport demo",
    "errors": "LoraFormatError",
    "ops.check.check": "CheckReport check fix",
    "ops.combine.combine": "CombinationReport combine",
    "ops.convert.adapter": "AdapterConversion",
    "ops.convert.convert": "convert",
    "ops.convert.report": "ConversionReport ModelConversion",
    "ops.extract.extract": "extract",
    "ops.extract.report": "ExtractionReport",
    "ops.formats": "FormatsReport formats",
    "ops.info.error_plot": "plot_errors",
    "ops.info.model": "info",
    "model.description": "AdapterInfo InfoReport ModelInfo",
    "ops.merge.merge": "merge",
    "ops.merge.report": "MergeReport",
    "ops.opening.adapter": "open_adapter",
    "ops.opening.model": "open_bundle open_model",
    "ops.pull.pull": "PullReport pull",
    "ops.push.push": "push",
    "ops.push.report": "PushReport",
    "ops.reduce": "ReductionReport reduce",
    "ops.remove": "RemovalReport remove",
    "model.report": "Report",
    "ops.spectrum.plot": "plot_spectrum",
    "ops.spectrum.spectrum": "SpectrumReport spectrum",
    "ops.unmerge.subtract": "UnmergeReport",
    "ops.unmerge.unmerge": "unmerge",
    "ops.verify": "VerificationReport verify",
    "train.run.evaluate": "EvaluationReport",
    "train.run.generate": "GenerationReport",
    "train.run.loss_curve": "plot_loss",
    "train.run.report": "TrainReport",
    "train.run.verbs": "evaluate generate train",
}
#: Module of each public name.
HOMES = {name: f"loraformat.{module}" for module in _NAMES for name in _NAMES[module].split()}

__all__ = ["__version__", *HOMES]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'loraformat' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})


class _VerbPackage(ModuleType):
    """A package that can also be called as the verb of its name: ``loraformat.train(...)``."""

    @property
    def __signature__(self) -> Signature:
        return signature(self._verb())

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._verb()(*arguments, **options)

    def _verb(self) -> Any:
        return __getattr__(self.__name__.rpartition(".")[2])


class _Package(ModuleType):
    """The type of this package: submodules named as verbs become callable when imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("train", "demo") and isinstance(value, ModuleType):
            value.__class__ = _VerbPackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

"""Reports: the members of their JSON, one short line, and a table for notebooks."""

import json
from dataclasses import fields

import pytest

from loraformat.demo.pipeline import DemoReport
from loraformat.model.adapter_facts import AdapterFacts
from loraformat.model.description import AdapterInfo, InfoReport, ModelInfo
from loraformat.model.report import Report
from loraformat.ops.check.check import CheckReport
from loraformat.ops.combine.combine import CombinationReport, CombinedModule
from loraformat.ops.convert.adapter import AdapterConversion
from loraformat.ops.convert.report import ConversionReport, ModelConversion
from loraformat.ops.extract.report import ExtractionReport
from loraformat.ops.merge.report import MergeReport
from loraformat.ops.pull.pull import PullReport
from loraformat.ops.push.report import PushReport
from loraformat.ops.reduce import ReductionReport
from loraformat.ops.spectrum.spectrum import SpectrumReport
from loraformat.ops.unmerge.subtract import UnmergeReport
from loraformat.ops.verify import VerificationReport
from loraformat.train.run.evaluate import EvaluationReport
from loraformat.train.run.generate import GenerationReport
from loraformat.train.run.report import TrainReport

WRITTEN = "notes seconds dry_run"
#: What each verb's ``--json`` has always had.
MEMBERS = {
    ModelConversion: "source target source_format target_format tensors quantized parameters "
    "input_bytes output_bytes bits_per_weight errors_by_kind quantized_before original lost "
    + WRITTEN,
    AdapterConversion: "source target source_format target_format verbatim modules parameters "
    "ranks input_bytes output_bytes base_model base_fingerprint lost kind " + WRITTEN,
    MergeReport: "source target source_format target_format adapters merged replaced tensors "
    "modules total output_bytes undo beside quantized_before warnings lost " + WRITTEN,
    UnmergeReport: "source target exact tensors restored error_bound modules output_bytes "
    + WRITTEN,
    CombinationReport: "sources target method weights modules parameters " + WRITTEN,
    ExtractionReport: "base tuned target modules replaced unchanged left_out parameters captured "
    + WRITTEN,
    ReductionReport: "source target modules old_parameters new_parameters energy " + WRITTEN,
    SpectrumReport: "source modules parameters suggested suggested_parameters notes",
    PushReport: "source repo url kind base_model files removed left_out card commit pull_request "
    "tag changed " + WRITTEN,
    PullReport: "repo commit target format files left_out base_model base_revision base_path "
    + WRITTEN,
    VerificationReport: "path format tensors hashed findings",
    CheckReport: "path format base ranks modules verdicts findings",
    ModelInfo: "path format architecture model_type layers parameters quantized_parameters "
    "weight_bytes total_bytes bits_per_weight quantized_bits_per_weight block_sizes double_quant "
    "dtypes fingerprint created_by source quantized_before adapters tensors kind",
    AdapterInfo: "path format ranks alphas scalings targets parameters bytes dtypes base_model "
    "base_fingerprint bundle dora biases embeddings replacements replaced_rows notes modules kind",
    EvaluationReport: "base results data notes",
    GenerationReport: "notes prompt text tokens seconds",
}
#: Members that are not plain JSON values.
MADE = {"facts": AdapterFacts("peft"), "losses": {}, "kind": "adapter", "written": None}


def made(kind):
    values = {entry.name: [] if "list" in str(entry.type) else 1 for entry in fields(kind)}
    named = {name: value for name, value in MADE.items() if name in values}
    texts = {entry.name: {} for entry in fields(kind) if str(entry.type).startswith("dict")}
    return kind(**{**values, **texts, **named})


@pytest.mark.parametrize("kind", MEMBERS, ids=lambda kind: kind.__name__)
def test_members_of_the_json(kind):
    report = made(kind)
    if kind is EvaluationReport:
        report = EvaluationReport(base="base")
    members = report.to_dict()
    assert sorted(members) == sorted(MEMBERS[kind].split())
    json.dumps(members)


@pytest.mark.parametrize("kind", [*MEMBERS, TrainReport, DemoReport], ids=lambda k: k.__name__)
def test_every_report_has_the_shared_members(kind):
    assert issubclass(kind, Report)
    assert {"notes", "lost", "seconds", "dry_run"} <= {entry.name for entry in fields(kind)}
    assert kind.__repr__ is Report.__repr__ and kind._repr_html_ is Report._repr_html_


def test_convert_and_info_have_one_type_each():
    assert all(issubclass(kind, ConversionReport) for kind in (ModelConversion, AdapterConversion))
    assert all(issubclass(kind, InfoReport) for kind in (ModelInfo, AdapterInfo))
    assert "tensors" not in made(ModelInfo).to_dict(tensors=False)
    assert "modules" not in made(AdapterInfo).to_dict(tensors=False)


def report_of(path):
    modules = [CombinedModule(f"m{n}", [1], 1, 1.0, 0.0) for n in range(500)]
    return CombinationReport([path, "b"], "c", "svd", [1.0, 0.5], modules, 7, notes=[path] * 3)


def test_the_short_line_is_short():
    said = repr(report_of("x" * 10_000))
    assert said == (
        "CombinationReport(sources=[2], target='c', method='svd', weights=[2], modules=[500], "
        "parameters=7, notes=[3])"
    )
    long = made(MergeReport)
    assert len(repr(long)) < 400


def test_notebooks_get_a_table_of_escaped_text():
    said = report_of("<script>alert(1)</script>")._repr_html_()
    assert "<script" not in said and "&lt;script&gt;" in said
    assert "<details><summary>500</summary>" in said and "m499" in said

"""The kit finds what is wrong: converters with one fault each, and the test that catches it."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from loraformat_converters import safetensors

import loraformat
from loraformat.errors import UnsupportedError
from loraformat.testing import ConverterContract, samples

GOOD = safetensors.CONVERTER


def contract(**fields):
    """Return the kit for a converter that differs from ours in some fields."""

    class Contract(ConverterContract):
        converter = replace(GOOD, **fields)

    return Contract()


def changed(change):
    """Return a reader that opens as ours does, then changes the checkpoint."""
    return lambda path, options: change(GOOD.read(path, options))


def eager(path, options):
    opened = GOOD.read(path, options)
    loaded = {name: bytes(tensor.load()) for name, tensor in opened.tensors.items()}
    opened.close()
    tensors = {
        name: replace(tensor, load=lambda name=name: memoryview(loaded[name]))
        for name, tensor in opened.tensors.items()
    }
    return replace(opened, tensors=tensors)


def without_last_tensor(opened):
    return replace(opened, tensors=dict(list(opened.tensors.items())[:-1]))


def dated(model, publication, options):
    publication.write("date.txt", str(time.time_ns()).encode())
    return GOOD.write(model, publication, options)


def elsewhere(model, publication, options):
    (publication.work.parent / "cache").write_bytes(b"")
    return GOOD.write(model, publication, options)


def hoarding(model, publication, options):
    tensors = {}
    for name, tensor in model.tensors.items():
        view = tensor.load()
        tensors[name] = replace(tensor, load=lambda view=view: view)
    return GOOD.write(replace(model, tensors=tensors), publication, options)


def silent(model, publication, options):
    return GOOD.write(model, publication, replace(options, progress=lambda nbytes: None))


def crashing(path, options):
    try:
        return GOOD.read(path, options)
    except Exception:
        raise KeyError("header") from None


def careless(model, publication, options):
    """Writes carried files without looking at their names."""
    written = GOOD.write(replace(model, files=()), publication, options)
    for file in model.files:
        target = publication.work / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read())
    return written


FAULTS = [
    ("test_record_is_complete", {"name": "Two Words"}, ()),
    ("test_record_is_complete", {"summary": ""}, ()),
    ("test_record_is_complete", {"suffixes": ("npz",)}, ()),
    ("test_record_is_announced", {"name": "unannounced"}, ()),
    ("test_record_is_announced", {"summary": "a copy of the record"}, ()),
    ("test_does_not_claim_junk", {"sniff": lambda path: True}, ()),
    ("test_does_not_claim_other_formats", {"sniff": lambda path: any(path.glob("*"))}, ()),
    ("test_round_trip", {"read": changed(without_last_tensor)}, ("weights",)),
    ("test_config_comes_back", {"read": changed(lambda o: replace(o, config=b"{}"))}, ("weights",)),
    ("test_other_files_come_back", {"read": changed(lambda o: replace(o, files=()))}, ("weights",)),
    ("test_same_model_same_bytes", {"write": dated}, ("weights",)),
    ("test_opening_reads_no_weight", {"read": eager}, ()),
    ("test_writing_holds_few_tensors", {"write": hoarding}, ()),
    ("test_round_trip", {"write": silent}, ("weights",)),
    ("test_closing_lets_go", {"read": changed(lambda o: replace(o, close=lambda: None))}, ()),
    ("test_sources_are_named", {"read": changed(lambda o: replace(o, sources=()))}, ()),
    ("test_failure_leaves_nothing", {"write": elsewhere}, ()),
    ("test_no_file_leaves_the_output", {"write": careless}, ("../escaped",)),
    ("test_no_file_leaves_the_output", {"write": careless}, ("{}/escaped",)),
]


@pytest.mark.parametrize("test, fields, arguments", FAULTS)
def test_a_fault_is_found(tmp_path, test, fields, arguments):
    method = getattr(contract(**fields), test)
    takes_path = "tmp_path" in method.__code__.co_varnames[: method.__code__.co_argcount]
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        method(*((tmp_path,) if takes_path else ()), *arguments)


def test_errors_of_other_libraries_are_found(tmp_path):
    with pytest.raises(KeyError):
        contract(read=crashing).test_bad_files_are_refused(tmp_path, "half")


def test_more_bad_files_are_run(tmp_path):
    """A damage that goes unnoticed fails the kit, so the hook is really called."""

    class Contract(ConverterContract):
        converter = GOOD

        def hostile(self):
            return {"nothing at all": lambda model: None}

    with pytest.raises(pytest.fail.Exception, match="nothing at all went unnoticed"):
        Contract().test_bad_files_are_refused(tmp_path, "nothing at all")


def test_a_format_with_less_room_says_so():
    class Contract(ConverterContract):
        converter = replace(GOOD, loses=())
        carries_files = False

    with pytest.raises(AssertionError, match="loses must say"):
        Contract().test_room_that_is_missing_is_declared()


@pytest.mark.parametrize("stores", ["dense", "nf4", "both"])
def test_samples_fit_what_a_writer_stores(stores):
    kinds = {
        name: {type(tensor).__name__ for tensor in model.tensors.values()}
        for name, model in samples(stores).items()
    }
    if stores == "dense":
        assert all(found == {"DenseTensor"} for found in kinds.values())
    elif stores == "nf4":
        assert all("NF4Tensor" in found for found in kinds.values())
    else:
        assert {"NF4Tensor"} <= set.union(*kinds.values()) and {"DenseTensor"} in kinds.values()


def test_pytest_is_imported_by_the_kit_alone():
    package = Path(loraformat.__file__).parent
    importing = [
        path.name
        for path in package.rglob("*.py")
        if any(line.strip().startswith(("import pytest", "from pytest")) for line in path.open())
    ]
    assert importing == ["contract.py"]


def test_an_unsupported_model_is_no_reason_to_fail(tmp_path, monkeypatch):
    """Other converters may refuse the sample; the kit goes on without them."""
    from loraformat import plugins
    from loraformat.bundle import converter as bundle

    def refuse(*arguments):
        raise UnsupportedError("not this one")

    stubborn = replace(bundle.CONVERTER, write=refuse)
    monkeypatch.setattr(plugins, "all_converters", lambda: [stubborn, GOOD])
    contract().test_does_not_claim_other_formats(tmp_path)

"""Every kind of file gives the same rows; hostile ones give one line that says where."""

import csv
import gzip
import io
import json
import os
import sys
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraformat.errors import FileChangedError, InputError, MissingDependencyError, UsageError
from loraformat.train.data import DataOptions
from loraformat.train.data.row import LONGEST_ROW
from loraformat.train.data.row_sources import HubRows, open_sources

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ROWS = [
    {"prompt": "one\r\ntwo", "completion": 'say "]}\\", please'},
    {"prompt": "", "completion": "vier → 4 😀\u2028\u0085,;\t"},
    {"prompt": "a, b", "completion": "c\n\nd"},
]


def read(*names, **options):
    options = DataOptions(**options)
    return [
        source.read(i).fields for source in open_sources(names, options) for i in range(len(source))
    ]


def as_csv(rows, delimiter=",", line_end="\r\n"):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=line_end)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows, **options):
    file = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows), file, **options)
    return file.getvalue()


def as_arrow(rows, opened=pa.ipc.new_stream):
    table, file = pa.Table.from_pylist(rows), io.BytesIO()
    with opened(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return file.getvalue()


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


FORMS = {
    "a.jsonl": as_lines(ROWS),
    "b.ndjson": b"\xef\xbb\xbf" + as_lines(ROWS).replace(b"}\n", b"}\r\n\n  \n").rstrip(),
    "c.json": json.dumps(ROWS, indent=1).encode(),
    "d.json": json.dumps({"version": 1, "of": {"data": [0]}, "data": ROWS, "x": []}).encode(),
    "e.json": as_lines(ROWS),
    "f.csv": as_csv(ROWS),
    "g.tsv": b"\xef\xbb\xbf" + as_csv(ROWS, "\t", "\n"),
    "h.parquet": as_parquet(ROWS, row_group_size=2),
    "i.arrow": as_arrow(ROWS),
    "j.arrow": as_arrow(ROWS, pa.ipc.new_file),
    "k.jsonl.gz": gzip.compress(as_lines(ROWS[:1]), mtime=0)
    + gzip.compress(as_lines(ROWS[1:]), mtime=0),
    "l.JSONL.zst": pa.compress(as_lines(ROWS), "zstd", asbytes=True),
    "m.csv.gz": gzip.compress(as_csv(ROWS), mtime=0),
    "n.json.zst": pa.compress(json.dumps(ROWS).encode(), "zstd", asbytes=True),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_holds_the_same_rows(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FORMS[name])
    assert read(path) == ROWS
    (source,) = open_sources(path, DataOptions())
    assert source.read(2).fields == ROWS[2]  # in any order
    assert source.read(0).fields == ROWS[0]


def test_a_directory_is_read_in_the_order_of_names(tmp_path):
    for place, name in enumerate(["z/b.jsonl", "a.jsonl", "z/a.csv", ".hidden/a.jsonl", "README"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        rows = [{"text": str(place)}]
        path.write_bytes(as_csv(rows) if name.endswith("csv") else as_lines(rows))
    assert [row["text"] for row in read(tmp_path)] == ["1", "2", "0"]
    assert [row["text"] for row in read(tmp_path / "z", tmp_path / "a.jsonl")] == ["2", "0", "1"]


def test_what_datasets_saves(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.select([2, 0, 1]).save_to_disk(tmp_path / "one")  # an order of its own, flattened
    assert read(tmp_path / "one") == [ROWS[2], ROWS[0], ROWS[1]]
    splits = {"train": table, "test": table.select([1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two", num_shards={"train": 2, "test": 1})
    assert read(tmp_path / "two") == ROWS
    assert read(tmp_path / "two", split="test") == read(tmp_path / "two" / "test") == [ROWS[1]]
    with pytest.raises(
        InputError, match=r"two: has no split 'dev'; it has train, test; choose one"
    ):
        read(tmp_path / "two", split="dev")
    with pytest.raises(UsageError, match="split is 'test', and the data are files"):
        read(tmp_path / "one", split="test")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_data_files": [{"filename": "../secret.arrow"}]}, r"\.\."),
        ({"_data_files": [{"filename": 5}]}, "names no files"),
        ({"_data_files": []}, "names no files"),
        ([], "is not a JSON object"),
    ],
)  # fmt: skip
def test_a_saved_data_set_that_is_not_sound(tmp_path, state, message):
    (tmp_path / "secret.arrow").write_bytes(as_arrow(ROWS))
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "dataset_info.json").write_text("{}")
    (saved / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=message):
        read(saved)


def test_members_that_arrow_adds_are_left_out(tmp_path):
    rows = [
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": given}}]}]}
        for given in ({"city": "Paris", "near": ["a"]}, {"unit": "h"})
    ]
    (tmp_path / "a.parquet").write_bytes(as_parquet(rows))
    (tmp_path / "b.arrow").write_bytes(as_arrow(rows))
    assert read(tmp_path / "a.parquet") == read(tmp_path / "b.arrow") == rows
    assert HubRows("org/name", datasets.Dataset.from_list(rows)).read(1).fields == rows[1]


def test_links_that_lead_out_of_a_directory(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (inside / "a.txt").symlink_to(outside / "secret.txt")
    with pytest.raises(InputError, match=r"inside/a\.txt: leads out of its directory"):
        read(inside)
    (inside / "a.txt").unlink()
    (inside / "b").symlink_to(outside, target_is_directory=True)
    with pytest.raises(InputError, match=r"inside/b: is a link to a directory"):
        read(inside)
    # A link that the user names is the user's own.
    (tmp_path / "named.txt").symlink_to(outside / "secret.txt")
    assert read(tmp_path / "named.txt") == [{"text": "secret"}]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: not strict JSON"),
        ("a.jsonl", b'{"text": "a"}\n["a"]', "line 2: is JSON, but not an object"),
        ("a.jsonl", b'{"text": NaN}', "line 1: not strict JSON: NaN is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1: not strict JSON: not UTF-8 at byte 10"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', "line 1: .* occurs twice"),
        ("a.jsonl", b"[" * 100_000, "line 1: not strict JSON: nested deeper"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16 or UTF-32, wanted UTF-8"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", r"is compressed, .*; name it a\.jsonl\.gz"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", "not sound gzip"),
        ("a.jsonl.gz", gzip.compress(as_lines(ROWS), mtime=0)[:-9], "not sound gzip"),
        ("a.jsonl.zst", pa.compress(as_lines(ROWS), "zstd", asbytes=True)[:-5], "not sound Zstan"),
        ("a.jsonl.zst", as_lines(ROWS), "not sound Zstandard"),
        ("a.txt.gz", gzip.compress(bytes(70 << 20), mtime=0), "more than 1000 times its size"),
        ("a.gz", gzip.compress(b"a", mtime=0), r"suffix \.gz says nothing"),
        ("a.arrow", as_arrow(ROWS)[:100], "not sound Arrow"),
        ("a.arrow", b"ARROW1 and more", "not sound Arrow"),
        ("a.json", b'[{"text": "a"}, {"text": "b"', "not JSON: brackets that do not close"),
        ("a.json", b'[{"text": "a}]', "not JSON: a string that does not end"),
        ("a.json", b'[{"text": "a"},]', "not JSON: a comma before the end"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', r"not JSON: no comma, and no \]"),
        ("a.json", b'[{"text": "a"}, 5]', r"element 2 \(byte 16\): is JSON, but not an object"),
        ("a.json", b"[,]", "not JSON: no value where one was wanted"),
        ("a.json", b"[" * 100_000, "not JSON: brackets that do not close"),
        ("a.json", b'{"rows": [\n{"text": "a"}]}', 'an object without an array under "data"'),
        ("a.json", b'{"data": [{"text": "a"}', "not JSON"),
        ("a.json", b'{5: "a",\n "data": []}', "not JSON: no key"),
        ("a.json", b'"a"', "not JSON: neither an array nor an object"),
        ("a.csv", b"text,text\na,b", "line 1: wanted a header with a different name"),
        ("a.csv", b"text,other\na,b\nc\n", "line 3: 1 fields, wanted the 2 of the header"),
        ("a.csv", b'text\n"a\nb\n', "line 2: not CSV"),
        ("a.csv", b"text\na\n\xff\n", "line 3: not UTF-8 at byte 7"),
        ("a.txt", b"abc\xff", "byte 3: not UTF-8 text"),
        ("a.parquet", b"PAR1", "not Parquet"),
        ("a.parquet", b"PAR1" + b"\xff" * 40 + b"PAR1", "not Parquet"),
        ("a.parquet", as_parquet(ROWS)[:-40] + as_parquet(ROWS)[-8:], "not (sound )?Parquet"),
        ("a.parquet", as_parquet([{"text": b"\xff"}]), "row 1: holds no text"),
        ("a.docx", b"PK", "suffix .docx says nothing .* name it .jsonl"),
        ("a", b"text", "suffix missing says nothing"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
    assert path.read_bytes() == data


@pytest.mark.parametrize("name", ["missing.jsonl", "no/such/place", "org/name.jsonl"])
def test_what_is_not_there(name):
    with pytest.raises(InputError, match="no such file or directory"):
        read(name)


def test_a_directory_without_rows(tmp_path):
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(InputError, match=r"holds no file named \.jsonl"):
        read(tmp_path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="is not a regular file"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_row_that_is_too_long(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    long = b'"' + b"a" * LONGEST_ROW + b'"'
    path.write_bytes(
        {
            "jsonl": b'{"text": ' + long + b'}\n{"text": "b"}\n',
            "json": b'[{"text": ' + long + b'}, {"text": "b"}]',
            "csv": b"text\n" + long + b"\nb\n",
        }[suffix]
    )
    tracemalloc.start()
    with pytest.raises(InputError, match=r"(longer|more) than 16777216 bytes"):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 6 * LONGEST_ROW
    tracemalloc.stop()
    if suffix != "csv":
        (source,) = open_sources(path, DataOptions())
        assert source.read(1).fields == {"text": "b"}


def test_long_fields_of_csv_leave_the_interpreters_limit_alone(tmp_path):
    path = tmp_path / "a.csv"
    rows = [{"text": "word, " * 100_000}]
    path.write_bytes(as_csv(rows))
    before = csv.field_size_limit()
    assert read(path) == rows
    assert csv.field_size_limit() == before


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@quick
@given(st.lists(st.dictionaries(words, words | st.integers(0, 99) | st.lists(words), max_size=3),
                max_size=6), st.sampled_from([None, 1]), st.booleans(), st.booleans())  # fmt: skip
def test_any_json_array(tmp_path, rows, indent, ascii_only, inside):
    path = tmp_path / "a.json"
    whole = {"a": rows, "data": rows} if inside else rows
    path.write_text(json.dumps(whole, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    assert read(path) == rows


@quick
@given(st.lists(st.fixed_dictionaries({"text": words, "b": words}), min_size=1, max_size=6))
def test_any_csv(tmp_path, rows):
    path = tmp_path / "a.csv"
    path.write_bytes(as_csv(rows))
    # csv reads a lone carriage return in a field as it stands, as we do.
    assert read(path) == rows


@quick
@given(
    st.binary(max_size=300),
    st.sampled_from(
        [".json", ".jsonl", ".csv", ".txt", ".parquet", ".arrow", ".jsonl.gz", ".txt.zst"]
    ),
)
def test_any_bytes_are_rows_or_an_error(tmp_path, data, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    try:
        assert all(isinstance(row, dict) for row in read(path))
    except InputError as error:
        assert str(path) in str(error)


@quick
@given(st.data())
def test_damaged_parquet_is_rows_or_an_error(tmp_path, data):
    whole = bytearray(as_parquet(ROWS))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "a.parquet"
    path.write_bytes(whole)
    try:
        read(path)
    except InputError as error:
        assert str(path) in str(error)


def test_parquet_reads_only_what_means_something(tmp_path):
    path = tmp_path / "a.parquet"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_bytes(as_parquet([{"messages": messages, "image": b"\xff"}]))
    assert read(path) == [{"messages": messages}]


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = tmp_path / "a.parquet"
    path.write_bytes(as_parquet(ROWS))
    with pytest.raises(MissingDependencyError, match=r"pip install 'loraformat\[data\]'"):
        read(path)


def test_a_file_that_is_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_lines(ROWS))
    (source,) = open_sources(path, DataOptions())
    path.write_bytes(as_lines(ROWS[:1]))
    with pytest.raises(FileChangedError, match="changed while it was being trained on"):
        source.read(0)

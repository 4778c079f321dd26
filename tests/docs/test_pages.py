"""How pages are read and run: a page that says otherwise than its commands is found."""

from pathlib import Path

import pytest

from tools.pages import elided, examples, figures, run, with_outputs, wording

PAGE = """\
# A page

```sh
echo one   # said
python -c "print('two')"
```

```text
old
```

```python
print("three")
```

```text
not run
```

Words between.

```sh
touch made
```

```text
```

```sh
exit 4     # exit code 4
```
"""


def test_blocks_and_what_they_print() -> None:
    first, second, third, last = examples(PAGE)
    assert (first.language, first.shown, first.exit_code) == ("sh", "old\n", 0)
    assert (second.code, second.shown) == ('print("three")\n', "not run\n")
    assert (third.shown, last.shown, last.exit_code) == ("", None, 4)


def test_outputs_are_written_anew_and_nothing_else(tmp_path: Path) -> None:
    renewed = with_outputs(PAGE, tmp_path, {})
    assert renewed == PAGE.replace("old\n", "one\ntwo\n").replace("not run\n", "three\n")
    assert (tmp_path / "made").exists()
    assert with_outputs(renewed, tmp_path, {}) == renewed


@pytest.mark.parametrize("code", ["false\ntrue", "exit 3", "no-such-verb", "echo $UNSET"])
def test_a_block_that_fails(code: str, tmp_path: Path) -> None:
    (example,) = examples(f"```sh\n{code}\n```\n")
    with pytest.raises(AssertionError, match="exit code"):
        run(example, tmp_path, {})


def test_a_finding_that_is_not_found(tmp_path: Path) -> None:
    (example,) = examples("```sh\ntrue # exit code 4\n```\n")
    with pytest.raises(AssertionError, match="exit code 0"):
        run(example, tmp_path, {})


def test_neither_folder_nor_port_is_shown(tmp_path: Path) -> None:
    (example,) = examples('```sh\necho "$PWD/mine $HF_ENDPOINT/me"\n```\n')
    said = run(example, tmp_path, {"HF_ENDPOINT": "http://127.0.0.1:4711"})
    assert said == "mine https://huggingface.co/me\n"


def test_wording_and_figures() -> None:
    one = "wrote 1,024 bytes (1.02 kB) in 4 min 3 s, 9.3% of abcdef0123"
    other = "wrote 99 bytes (5.02 MB) in 3.5 s,  1% of 0123abcdef"
    assert wording(one) == wording(other)
    assert wording(one) != wording(other.replace("wrote", "read"))
    assert figures(one)[:3] == [1024, 1.02, 9.3]


def test_the_middle_of_a_table_is_left_out() -> None:
    rows = [f"model.layers.{n} x\n" for n in range(9)]
    said = elided("head\n" + "".join(rows) + "foot\n")
    assert said == f"head\n{rows[0]}{rows[1]}...\n{rows[-1]}foot\n"
    assert elided("".join(rows[:4])) == "".join(rows[:4])

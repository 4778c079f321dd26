"""What is in the data, counted before training; what cannot be trained on is refused here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from loraformat.errors import InputError
from loraformat.train.data.options import DataOptions

__all__ = ["DatasetStats"]

_BAD_ROWS_SHOWN = 5


@dataclass(slots=True)
class DatasetStats:
    """Counts over one pass of all rows.

    Attributes
    ----------
    sources : list of (str, int)
        Name and rows of each file or data set.
    rows, bad : int
        Rows, and those skipped because they cannot be read.
    bad_examples : list of str
        What is wrong with the first five.
    samples, tokens, trained : int
        What is trained on, and how many of its tokens are learned.
    pieces : int
        Samples that are text, cut to ``seq_len``; these are learned whole.
    rendered : int
        Samples that the chat template wrote.
    unlearned : int
        Samples with no token to learn; left out.
    all_learned : int
        Conversations and completions without any prompt.
    over_length, longest : int
        Conversations and completions longer than ``seq_len``, and the longest of all samples.
    first_over_length : str
        Where the first one stands.
    dropped, truncated, cut : int
        Over-length samples left out, or cut, and the tokens cut off.
    split, parts : int
        Over-length samples split, and into how many; those with nothing to learn are among
        `unlearned`, too.
    rewritten : int
        Conversations that became one sample per turn, as the template rewrites old turns.
    straddling : int
        Learned tokens that also stand for the end of a prompt.
    endless : int
        Samples that end without a special token: nothing in them teaches to stop.
    wordless : int
        Answers without a word, which are not learned.
    unwritten : dict of str to int
        What rows say and the chat template does not write, and how often.
    """

    sources: list[tuple[str, int]] = field(default_factory=list)
    rows: int = 0
    bad: int = 0
    bad_examples: list[str] = field(default_factory=list)
    samples: int = 0
    tokens: int = 0
    trained: int = 0
    pieces: int = 0
    rendered: int = 0
    unlearned: int = 0
    all_learned: int = 0
    over_length: int = 0
    longest: int = 0
    first_over_length: str = ""
    dropped: int = 0
    truncated: int = 0
    cut: int = 0
    split: int = 0
    parts: int = 0
    rewritten: int = 0
    straddling: int = 0
    endless: int = 0
    wordless: int = 0
    unwritten: dict[str, int] = field(default_factory=dict)

    def count_bad(self, problem: object) -> None:
        """Count a row that is skipped."""
        self.bad += 1
        if len(self.bad_examples) < _BAD_ROWS_SHOWN:
            self.bad_examples.append(str(problem))

    def to_json(self) -> dict[str, Any]:
        """Return the counts for ``json.dumps``."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Say what is in the data, and what was done to it, in sentences for people.

        Examples
        --------
        >>> DatasetStats(rows=2, samples=2, tokens=10, trained=4, longest=6).lines()
        ['2 rows, 2 samples, 10 tokens, 4 of them learned (40.0 %), longest sample 6']
        """
        share = 100 * self.trained / max(self.tokens, 1)
        said = [
            f"{self.rows} rows, {self.samples} samples, {self.tokens} tokens, "
            f"{self.trained} of them learned ({share:.1f} %), longest sample {self.longest}"
        ]
        notes = (
            (self.bad, "bad rows skipped"),
            (self.dropped, "samples longer than seq-len dropped"),
            (self.truncated, f"samples longer than seq-len truncated, {self.cut} tokens cut off"),
            (self.split, f"samples longer than seq-len split into {self.parts}"),
            (self.unlearned, "samples left out: no token of them is learned"),
            (self.wordless, "answers without a word are not learned"),
            (self.all_learned, "samples without a prompt: every token of them is learned"),
            (self.rewritten, "conversations became one sample per assistant turn: "
             "the chat template rewrites earlier turns"),
            (self.straddling, "learned tokens also hold the end of a prompt: "
             "does it end in a space that belongs to the completion?"),
            (self.endless, "samples end without an end-of-turn token: "
             "the model does not learn from them to stop"),
        )  # fmt: skip
        said += [f"{count} {what}" for count, what in notes if count]
        said += [
            f"{count} {what} left out: the chat template does not write them"
            for what, count in sorted(self.unwritten.items())
        ]
        return said + [f"skipped: {problem}" for problem in self.bad_examples]

    def refuse_if_useless(self, options: DataOptions) -> None:
        """Raise if nothing good can come from training on this.

        Raises
        ------
        InputError
            If there are no rows, samples are too long and that was not provided for,
            nothing is learned, or no sample of a data set of answers has a question.
        """
        path = self.sources[0][0] if len(self.sources) == 1 else None
        if self.rows == 0:
            raise InputError("holds no rows" if path else "the data hold no rows", path=path)
        if self.over_length and options.over_length == "refuse":
            raise InputError(
                f"{self.over_length} samples are longer than {options.seq_len} tokens, the "
                f"longest {self.longest}; the first is {self.first_over_length}",
                path=path,
                hint=f"allow for them with --seq-len {self.longest}, or choose what becomes of "
                "them: --over-length drop, split, truncate (the end is cut off) or truncate-start",
            )
        if self.trained == 0:
            raise InputError(
                f"no token to learn in {self.rows} rows: {self.bad} bad rows, {self.dropped} "
                f"samples dropped, {self.unlearned} without a completion or an assistant's turn",
                path=path,
                hint="check the fields and roles, or learn everything with --train-on all",
            )
        answers = self.samples - self.pieces
        if options.train_on == "completions" and answers and self.all_learned == answers:
            raise InputError(
                f"every token of all {answers} samples would be learned: no sample has a prompt",
                path=path,
                hint='write {"text": …} rows, or say that this is meant with --train-on all',
            )

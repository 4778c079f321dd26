"""Small SentencePiece models, and the forms in which transformers keeps them."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from made_tokenizers import CORPUS
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers.convert_slow_tokenizer import generate_merges

_TRAINED = dict(
    model_type="bpe", vocab_size=700, byte_fallback=True, character_coverage=0.995,
    split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True, max_sentence_length=1 << 20, minloglevel=2,
)  # fmt: skip
#: As Gemma has them: runs are user-defined, numbers of special tokens are its own.
RUNS = [c * n for c in "\n▁" for n in range(2, 8)] + ["\t\t"]
GEMMA = dict(
    add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, eos_piece="<eos>",
    bos_piece="<bos>", user_defined_symbols=[*RUNS, "<table>", "<start_of_turn>"],
)  # fmt: skip


@cache
def trained(name: str = "llama", texts: tuple[str, ...] = tuple(CORPUS), **more: Any) -> bytes:
    """Train a ``tokenizer.model``, by default on the text of this repository."""
    writer = io.BytesIO()
    options = {**_TRAINED, **more, **{"llama": {}, "gemma": GEMMA, "unigram": dict(
        model_type="unigram"), "nfkc": dict(normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True)}[name]}  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=writer, **options
    )
    return writer.getvalue()


def pieces(model: bytes) -> Any:
    return ModelProto.FromString(model).pieces


def tokenizer_json(model: bytes, *, metaspace: str | None = None, by: str = "score") -> dict:
    """Return what transformers' converters for Llama and Gemma make of a model.

    Parameters
    ----------
    metaspace : {"first", "always", "never"}, optional
        Instead of the normalizer of Llama 2 and Gemma.
    by : {"score", "number"}
        What the merges are sorted by: transformers has had both.
    """
    found = pieces(model)
    vocabulary = {piece.piece: number for number, piece in enumerate(found)}
    scores = [(piece.piece, piece.score) for piece in found]
    prefix = ModelProto.FromString(model).normalizer_spec.add_dummy_prefix
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    bos = next(piece.piece for piece in found if piece.piece in ("<s>", "<bos>"))
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": number, "content": piece.piece, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": piece.type != 4}
            for number, piece in enumerate(found) if piece.type in (2, 3, 4)
        ],
        "normalizer": None if metaspace else replace if not prefix else {
            "type": "Sequence", "normalizers": [prepend, replace]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": metaspace,
                          "split": False} if metaspace else None if prefix else {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
            "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [vocabulary[bos]], "tokens": [bos]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>",
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": True, "vocab": vocabulary,
            "merges": [list(pair) for pair in generate_merges(
                vocabulary, scores if by == "score" else None)],
        },
    }  # fmt: skip


def add(tokenizer: dict, *texts: str, rows: int = 0, **options: Any) -> dict:
    """Add tokens behind the vocabulary."""
    for text in texts:
        number = len(tokenizer["model"]["vocab"]) + sum(
            token["content"] not in tokenizer["model"]["vocab"]
            for token in tokenizer["added_tokens"]
        )
        tokenizer["added_tokens"].append(
            {"id": number, "content": text, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": True, **options})  # fmt: skip
    return tokenizer


def write(directory: Path, tokenizer: dict) -> Path:
    text = json.dumps(tokenizer, ensure_ascii=False)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    return directory

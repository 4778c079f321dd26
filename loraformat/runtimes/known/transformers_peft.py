"""transformers with PEFT: where most adapters come from."""

from __future__ import annotations

from loraformat.runtimes.record import Runtime, caution, differs, refuses, unknown
from loraformat.runtimes.scaling import as_trained

__all__ = ["TRANSFORMERS"]

TRANSFORMERS = Runtime(
    name="transformers",
    title="transformers + PEFT",
    version="PEFT 0.21.2, tested",
    format="peft",
    format_remedy="peft",
    format_why="PEFT reads directories with adapter_config.json",
    scaling=as_trained,
    asks_peft=True,
    treats={
        "METHOD": caution("depends on the method in PEFT; not checked", "advice"),
        "INIT_MUTATES_BASE": caution(
            "PEFT modifies the base on every load of the adapter, which needs the base in full "
            "precision",
            "advice",
        ),
        "KEY_PREFIX": differs(
            "PEFT leaves these at their initial values, with a warning", "rewrite"
        ),
        "LOAD_FAILS": refuses("PEFT raises this error", "rewrite"),
        "LOAD_RESIZED": refuses(
            "PEFT raises this error",
            "merge",
            "merge it, which resizes the base; or resize the base before PEFT loads it: "
            "model.resize_token_embeddings",
        ),
        "LOAD_OTHER_BASE": refuses("PEFT raises this error", "other-base"),
        "LOAD_IGNORES": differs(
            "PEFT ignores them, at most with a warning",
            "rewrite",
        ),
        "LOAD_UNKNOWN": differs(
            "PEFT ignores them, at most with a warning",
            "other-base",
        ),
        "LOAD_UNPROVEN": unknown(
            "how PEFT loads an adapter into each transformers class can only be tested with PEFT",
            "advice",
            "install both and check again: pip install 'loraformat[demo]'",
        ),
        "DTYPE": None,  # cast as they are loaded
        "TIED_HEAD": caution(
            "it is correct unmerged; PEFT's merge_and_unload also changes the tied tensor",
            "merge",
        ),
        "SHARED_BLOCK": caution(
            "it is right unmerged; merged, a delta of one layer would act in all that share the "
            "weight",
            "advice",
            "use it beside its base, without merge_and_unload",
        ),
        "TOKENIZER_CHANGED": caution(
            "PEFT loads no tokenizer", "advice", "load the tokenizer from the adapter's directory"
        ),
        "CHAT_TEMPLATE_CHANGED": caution(
            "PEFT loads no tokenizer, which has the chat template",
            "advice",
            "set the tokenizer's chat_template to the text of the adapter's",
        ),
    },
)

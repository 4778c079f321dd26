"""Model cards: text generated from facts, without file access.

A card says what an adapter or a bundle is, how it is used, what it was trained on and what
its files hash to. What is not known is left out; nothing is asked for and nothing invented.
Text from strangers (names in a config, a training record) is escaped wherever it stands.
"""

from loraformat.card.adapter import adapter_card
from loraformat.card.bundle import bundle_card
from loraformat.card.document import Document, is_template
from loraformat.card.facts import AdapterFacts, Base, BundleFacts, FileFact, Licence

__all__ = [
    "AdapterFacts",
    "Base",
    "BundleFacts",
    "Document",
    "FileFact",
    "Licence",
    "adapter_card",
    "bundle_card",
    "is_template",
]

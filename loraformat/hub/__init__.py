"""The Hugging Face Hub: inputs by id, commit contents, publishing.

Downloading, caching, authentication and ``HF_HUB_OFFLINE`` are huggingface_hub's. Here is
decided what is asked for, whether what came is what the Hub has, and what is said in one
line when it fails. The token is huggingface_hub's own; it is never read here but to see
that there is one.
"""

from loraformat.hub.source import Source, hub_id, resolve

__all__ = ["Source", "hub_id", "resolve"]

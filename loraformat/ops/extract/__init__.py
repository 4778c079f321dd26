"""An adapter out of a base and its fine-tune."""

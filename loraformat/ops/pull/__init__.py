"""``loraformat pull``: downloads from the Hugging Face Hub."""

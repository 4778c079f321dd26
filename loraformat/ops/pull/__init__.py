"""``loraformat pull``: a repository of the Hugging Face Hub as a directory."""

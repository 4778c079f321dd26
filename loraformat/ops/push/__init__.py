"""``loraformat push``: publishing on the Hugging Face Hub."""

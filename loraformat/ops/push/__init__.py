"""``loraformat push``: an adapter or a bundle on the Hugging Face Hub."""

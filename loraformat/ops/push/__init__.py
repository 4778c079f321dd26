"""``loraformat push``: publishing on the Hugging Face Hub.

In which order to read: `push`; `upload_plan` (files and card of what is published), `files` (which
files), `base_info` (the base model on the Hub), `report`.
"""

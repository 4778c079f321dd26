"""The Hub as a verb: what is published, where to, and what comes back."""

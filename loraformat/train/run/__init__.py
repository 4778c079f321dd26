"""One training run, evaluation or try-out, from options to report."""

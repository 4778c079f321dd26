"""Low-rank linear algebra on numpy arrays.

Start with `lora` (a delta as factors, truncation by SVD); `thin_qr` and `subspace` are what it
computes with, `ranks` chooses ranks, `interference` combines whole deltas (TIES, DARE).
"""

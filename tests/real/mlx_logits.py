"""A program: mlx-lm's logits of token ids 0 to 19, ``MODEL ADAPTER OUT.npy``; ADAPTER may be ''."""

import sys

import mlx.core as mx
import numpy
from mlx_lm import load

model, _ = load(sys.argv[1], adapter_path=sys.argv[2] or None)
numpy.save(sys.argv[3], numpy.array(model(mx.arange(20)[None]).astype(mx.float32)))

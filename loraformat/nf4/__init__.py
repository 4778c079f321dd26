"""The NF4 codec: 4-bit codes, one scale per block, scales quantized again.

Start with `codec`; `tables` holds the levels, `quant_state` the JSON text that bitsandbytes keeps
beside each weight, `kernels` the same arithmetic in C and in torch. Only `codec` and `kernels`
import torch.
"""

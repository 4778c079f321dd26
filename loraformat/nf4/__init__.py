"""The NF4 codec: 4-bit codes, absmax scales per block, double quantization.

Start with `codec`; `quantized` is the record of a tensor, `rows` decodes and multiplies rows of a
matrix, `tables` holds the levels, `quant_state` the JSON text that bitsandbytes keeps
beside each weight, `kernels` the same arithmetic in C and in numpy.
"""

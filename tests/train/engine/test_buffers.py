"""Memory for products: aligned, of every type, and used again after it is freed."""

import pytest
import torch

from loraformat.train.engine.buffers import empty_matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 8), (3, 5), (512, 2048), (511, 2047)])
def test_a_matrix_to_be_written(shape, dtype):
    made = empty_matrix(torch.ones(1, dtype=dtype), *shape)
    assert made.shape == shape and made.dtype == dtype and made.is_contiguous()
    assert made.data_ptr() % 64 == 0
    assert torch.equal(made.fill_(3), torch.full(shape, 3.0, dtype=dtype))


def test_in_inference_mode_it_is_what_torch_would_make():
    with torch.inference_mode():
        made = empty_matrix(torch.ones(1), 512, 2048)
        assert made.is_inference()
    assert not empty_matrix(torch.ones(1), 512, 2048).is_inference()

"""The precision map: with train.precision bf16 every large product of forward and backward is bf16 under CUDA's
autocast rules, and none mixes dtypes.

By emulation on every machine. With torch's CUDA build on fake CUDA tensors, by CUDA's own autocast (marker
`fake_cuda`): bash tests/fake_cuda.sh makes an environment for it and runs that.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support import kinds
from tests.support.precision import CudaLists, Products
from vltrain.ops import attention_choice

MOST_FP32 = 0.01  # of all multiplications
# Where T5's bias of positions is trained, a CPU takes torch's plain attention, which multiplies in fp32; CUDA's
# memory-efficient kernel takes bf16.
CPU_ONLY = {"t5-full": 0.03}
MOST_GROUPED = 0.1


@pytest.fixture(scope="module")
def most_fp32() -> float:
    """`MOST_FP32`, or more where torch's CPU kernel does not take grouped queries (2.8), so that plain attention
    multiplies in fp32 there too."""
    query, key = torch.randn(1, 4, 5, 8, dtype=torch.bfloat16), torch.randn(1, 2, 5, 8, dtype=torch.bfloat16)
    with Products() as products:
        nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    return MOST_GROUPED if products.fp32_share else MOST_FP32


@pytest.mark.parametrize("name", kinds.NAMES)
def test_products_are_bf16_and_none_mixes_dtypes(name, most_fp32, monkeypatch):
    monkeypatch.setattr(attention_choice, "TILED_THREADS", 0)  # a CPU's tiles multiply in fp32, and CUDA has none
    model, batch = kinds.make(name, dtype=torch.bfloat16)
    with Products() as products:
        with CudaLists(), torch.autocast("cpu", torch.bfloat16):
            loss = model.train()(batch).loss_sum
        forward = products.by_dtype.copy()
        loss.backward()
    assert not products.mixed
    assert products.by_dtype[torch.bfloat16] > 1.5 * forward[torch.bfloat16] > 0
    assert products.fp32_share <= max(CPU_ONLY.get(name, 0.0), most_fp32), products.wide.most_common(8)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters() if parameter.grad is not None)


def test_the_rig_sees_fp32_and_mixed_products():
    norm, linear = nn.LayerNorm(8), nn.Linear(8, 8)
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    with Products() as products, CudaLists(), torch.autocast("cpu", torch.bfloat16):
        normed = norm(x)
        assert normed.dtype == torch.float32, "on CUDA a norm gives fp32"
        linear(normed)
        assert products.fp32_share == 0
        with torch.autocast("cpu", enabled=False):
            linear(normed)
    assert products.fp32_share == 0.5
    with pytest.raises(RuntimeError, match="same dtype"), Products(), CudaLists():
        linear(x)

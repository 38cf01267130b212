"""Which products run in which dtype: a dispatch mode that counts them, and CUDA's autocast rules on CPU tensors.

CUDA's autocast differs from the CPU's in what it runs in fp32: norms, softmax, powers and the like, whose results are
then fp32 as well. The emulation is the CPU's autocast, whose products are CUDA's, with those functions' inputs cast to
fp32 (`FP32`, from the documentation of torch.amp). Functions in place are not autocast on either.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FP32 = {
    "pow",
    "rdiv",
    "rpow",
    "rtruediv",
    "acos",
    "asin",
    "binary_cross_entropy_with_logits",
    "cdist",
    "cosh",
    "cosine_embedding_loss",
    "cosine_similarity",
    "cross_entropy",
    "cumprod",
    "cumsum",
    "dist",
    "erfinv",
    "exp",
    "expm1",
    "group_norm",
    "hinge_embedding_loss",
    "kl_div",
    "l1_loss",
    "layer_norm",
    "log",
    "log10",
    "log_softmax",
    "log1p",
    "log2",
    "logsumexp",
    "margin_ranking_loss",
    "mse_loss",
    "nll_loss",
    "norm",
    "normalize",
    "pdist",
    "prod",
    "reciprocal",
    "rsqrt",
    "sinh",
    "smooth_l1_loss",
    "soft_margin_loss",
    "softmax",
    "softmin",
    "softplus",
    "sum",
    "renorm",
    "tan",
    "triplet_margin_loss",
}


class CudaLists(TorchFunctionMode):
    """CUDA's rules on CPU tensors, inside `torch.autocast("cpu", ...)`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").strip("_") not in FP32 or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        args, kwargs = tree_map(_widened, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    narrow = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products by dtype; `mixed` names those of several dtypes or devices."""

    def __init__(self) -> None:
        super().__init__()
        self.by_dtype: Counter[torch.dtype] = Counter()
        self.mixed: list[str] = []
        self.wide: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        tensors = [one for one in tree_leaves(args) if isinstance(one, torch.Tensor) and one.is_floating_point()]
        count = _multiplications(name, tensors, result)
        if name.startswith("_scaled_dot_product"):
            tensors = tensors[: 4 if "backward" in name else 3]  # behind them: output, and log-sums in fp32
        if count:
            dtypes, devices = {one.dtype for one in tensors}, {one.device.type for one in tensors}
            if len(dtypes) > 1 or len(devices) > 1:
                self.mixed.append(f"{func}: {[(tuple(one.shape), one.dtype, one.device.type) for one in tensors]}")
            self.by_dtype[tensors[0].dtype] += count
            if tensors[0].dtype == torch.float32:
                self.wide[f"{func} of {[tuple(one.shape) for one in tensors]}"] += count
        return result

    @property
    def fp32_share(self) -> float:
        return self.by_dtype[torch.float32] / max(sum(self.by_dtype.values()), 1)


def _multiplications(name: str, tensors: list[torch.Tensor], result: Any) -> int:
    """Of a product; 0 for what is none."""
    if name in ("mm", "bmm"):
        return result.numel() * tensors[0].shape[-1]
    if name in ("addmm", "baddbmm"):
        return result.numel() * tensors[1].shape[-1]
    if name == "convolution":
        return result.numel() * tensors[1][0].numel()
    if name == "convolution_backward":
        return tensors[0].numel() * tensors[2][0].numel()
    if name.startswith("_scaled_dot_product") and len(tensors) >= 3:
        query, key = tensors[:2] if "backward" not in name else tensors[1:3]
        return 2 * query.numel() * key.shape[-2]
    return 0

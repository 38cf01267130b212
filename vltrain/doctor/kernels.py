"""Small cases of the kernels that training may use, each against plain operations in float64 on the same device.

A case gives its largest error, as a share of the largest true value, over results and gradients. What cannot run here
by its nature (no package, no GPU, an older GPU) raises `NotHere`. Run by `vltrain.doctor.isolated` in a process of its
own.

Attention is called here as `vltrain.ops.attention` and `vltrain.ops.attention_choice` do, and not through them: they
import transformers, which imports much else, so that one broken package would keep all cases from being tried.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vltrain.distributed.hardware import device
from vltrain.doctor.findings import ABSENT, OK, PROBLEM, Finding
from vltrain.models.quantise import FrozenLinear, quantise_linears
from vltrain.ops import reference
from vltrain.ops.fused import fused_adapter

SEGMENTS = (37, 64, 27)
HEADS, HEAD_DIM = 4, 64


class NotHere(Exception):
    """The case cannot run on this machine; `do` says what would change that."""

    def __init__(self, found: str, do: str = "") -> None:
        super().__init__(found)
        self.do = do


@dataclass(frozen=True)
class Case:
    """A kernel to try: `measure` returns its error, of which `allowed` is what rounding explains."""

    what: str
    measure: Callable[[], float]
    allowed: float
    used_for: str


def examine(case: Case) -> Finding:
    """Runs a case."""
    try:
        error = case.measure()
    except NotHere as missing:
        return Finding(
            status=ABSENT, what=case.what, found=str(missing), needed=f"only for {case.used_for}", do=missing.do
        )
    by = (
        "on this GPU"
        if torch.cuda.is_available()
        else "on the CPU"
        if case.what.startswith("bitsandbytes")
        else "in Triton's interpreter"
    )
    if not error <= case.allowed:  # a NaN is not
        return Finding(
            status=PROBLEM,
            what=case.what,
            found=f"wrong results {by}: off by {{error}} of the largest value",
            needed=f"{case.allowed:g} at most",
            do=f"reinstall the package for this torch and GPU, or do without it ({case.used_for})",
            numbers={"error": error},
        )
    return Finding(
        status=OK,
        what=case.what,
        found=f"right {by}: off by {{error}} ({case.allowed:g} allowed)",
        numbers={"error": error},
    )


def _require_package(module: str, distribution: str, do: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise NotHere(f"the package {distribution} is not installed", do)


def _require_gpu(capability: tuple[int, int]) -> None:
    if not torch.cuda.is_available():
        raise NotHere("needs a GPU")
    found = torch.cuda.get_device_capability(device())
    if found < capability:
        raise NotHere("needs compute capability {}.{}, this GPU has {}.{}".format(*capability, *found))


def _dtype() -> torch.dtype:
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device()) >= (8, 0):
        return torch.bfloat16
    return torch.float32


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device(), dtype).requires_grad_()


def largest_error(function: Callable[..., Tensor], truth: Callable[..., Tensor], inputs: Sequence[Tensor]) -> float:
    """The largest difference between a function and its truth in float64, over the result and the gradients of all
    inputs that have one."""
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    found, expected = function(*inputs), truth(*exact)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected.device, found.dtype)
    trained = [number for number, tensor in enumerate(inputs) if tensor.requires_grad]
    gradients = torch.autograd.grad(found, [inputs[number] for number in trained], upstream)
    true_gradients = torch.autograd.grad(expected, [exact[number] for number in trained], upstream.double())
    pairs = zip((found, *gradients), (expected, *true_gradients), strict=True)
    return torch.stack([(ours.double() - true).abs().max() / true.abs().max() for ours, true in pairs]).max().item()


def _triton() -> float:
    _require_package("triton", "triton", "pip install triton (torch's CUDA builds bring it)")
    scaled_exp = importlib.import_module("vltrain.doctor.triton_case").scaled_exp
    x = _random(1000).detach()
    true = 0.5 * x.double().exp()
    return ((scaled_exp(x, 0.5).double() - true).abs().max() / true.max()).item()


def _adapter() -> float:
    _require_package("triton", "triton", "pip install triton (torch's CUDA builds bring it)")
    rows, width, dim = 48, 96, 8
    norm_weight = torch.linspace(0.5, 1.5, width, device=device())

    def truth(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
        z = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * norm_weight.double()
        return reference.bottleneck_adapter(z, down[None], down_bias, up[None], up_bias)

    inputs = [
        _random(rows, width, dtype=_dtype()),
        _random(dim, width),
        _random(dim),
        _random(width, dim),
        _random(width),
    ]
    return largest_error(lambda *given: fused_adapter(*given, norm_weight=norm_weight), truth, inputs)


def _liger() -> float:
    _require_package("liger_kernel", "liger-kernel", "bash launch/setup_env.sh --with gpu")
    operations = importlib.import_module("liger_kernel.ops")  # an import that fails is found without a GPU too
    _require_gpu((7, 0))  # Triton's interpreter lacks what two of these kernels call

    def ours(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        normed = operations.LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False, None)
        return operations.LigerSiLUMulFunction.apply(gate, normed)

    def truth(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return F.silu(gate) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

    inputs = [
        _random(24, 128, dtype=_dtype()),
        _random(24, 128, dtype=_dtype(), seed=1),
        _random(128, dtype=_dtype(), seed=2).detach(),
    ]
    return largest_error(ours, truth, inputs)


def _quantised(bits: int, most_lost: float) -> float:
    """The product against that of the dequantised weights, which must be near the ones they were made of."""
    _require_package("bitsandbytes", "bitsandbytes", "bash launch/setup_env.sh --with quant")
    block = nn.Sequential(nn.Linear(256, 192)).to(device()).requires_grad_(False)
    nn.init.normal_(block[0].weight, generator=torch.Generator(device()).manual_seed(3))
    original = block[0].weight.double()
    quantise_linears(block, bits)
    quantised = block[0]
    assert isinstance(quantised, FrozenLinear)
    kept = quantised.dequantised(torch.float32).double()
    lost = ((kept - original).norm() / original.norm()).item()
    if not lost <= most_lost:
        raise ArithmeticError(
            f"dequantised weights are off by {lost:.3g} of the original ones' norm, {most_lost} at most was expected"
        )
    bias = quantised.bias.double()
    return largest_error(quantised, lambda x: F.linear(x, kept, bias), [_random(40, 256, dtype=_dtype())])


def _attention(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> float:
    """`function(q, k, v, starts, longest)` on packed segments, [T, H, D] each."""
    tokens, lengths = sum(SEGMENTS), torch.tensor(SEGMENTS)
    starts = F.pad(lengths.cumsum(0), (1, 0)).to(device(), torch.int32)

    def ours(*states: Tensor) -> Tensor:
        result = function(*states, starts, max(SEGMENTS))
        return result[0] if isinstance(result, tuple) else result

    def truth(*states: Tensor) -> Tensor:
        return reference.packed_attention(*(one.transpose(0, 1)[None] for one in states), lengths)[0]

    return largest_error(
        ours, truth, [_random(tokens, HEADS, HEAD_DIM, dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    )


def _flash(module: str, distribution: str, capability: tuple[int, int], do: str) -> float:
    """flash-attn 2 and 4 have one import name, so that the name of the distribution tells which is there."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise NotHere(f"the package {distribution} is not installed", do) from None
    _require_gpu(capability)
    run = importlib.import_module(module).flash_attn_varlen_func
    return _attention(
        lambda q, k, v, starts, longest: run(
            q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
        )
    )


def _varlen() -> float:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        raise NotHere(f"torch {torch.__version__} has none", "take a torch that has torch.nn.attention.varlen")
    _require_gpu((8, 0))
    run = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    # Causality was an argument of its own before windows came.
    causal = {"is_causal": True} if "is_causal" in inspect.signature(run).parameters else {"window_size": (-1, 0)}
    return _attention(lambda q, k, v, starts, longest: run(q, k, v, starts, starts, longest, longest, **causal))


ROUNDING = 2e-2  # of bf16 inputs, results and gradients
FLASH = "bash launch/setup_env.sh --with flash"
CASES: dict[str, Case] = {
    "triton": Case("Triton", _triton, 1e-5, "the kernels below"),
    "adapter": Case("fused adapter kernel", _adapter, ROUNDING, "model.adapter.impl: triton"),
    "liger": Case("Liger", _liger, ROUNDING, "model.llm.kernels: liger"),
    "flash2": Case(
        "flash-attn 2", lambda: _flash("flash_attn", "flash-attn", (8, 0), FLASH), ROUNDING, "fast attention"
    ),
    "flash3": Case(
        "flash-attn 3", lambda: _flash("flash_attn_interface", "flash-attn-3", (9, 0), ""), ROUNDING, "fast attention"
    ),
    "flash4": Case(
        "flash-attn 4", lambda: _flash("flash_attn.cute", "flash-attn-4", (9, 0), ""), ROUNDING, "fast attention"
    ),
    "varlen": Case("torch varlen_attn", _varlen, ROUNDING, "fast attention"),
    "bits4": Case("bitsandbytes, 4 bits", lambda: _quantised(4, 0.15), ROUNDING, "model.bits: 4"),
    "bits8": Case("bitsandbytes, 8 bits", lambda: _quantised(8, 0.02), 5e-2, "model.bits: 8"),
}

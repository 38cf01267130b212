"""Which attention a LLaMA's packed rows take: decided here alone, by device, dtype of products, compute capability,
sizes and packages.

`auto` takes the first that can run of

    flash_attention_3  flash_attention_4  flash_attention_2   flash-attn's kernels, where a package of them is installed
    varlen                                                    torch's own build of such a kernel, from torch 2.10
    tiled                                                     queries in tiles, on a CPU
    sdpa                                                      torch's attention over segments as a padded batch,
                                                              anywhere

and says in the log why not those before it. Compute capability sorts the first three out: 3 is Hopper's, 4 Hopper's and
Blackwell's, 2 runs from Ampere on. A package counts once the functions that are needed have been imported from it:
flash-attn 2 and 4 share an import name, and either may have been built for another torch.

`tiled` itself hands rows to `sdpa` whose segments that computes faster (`vltrain.ops.packed.tiled.worth_tiling`).
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vltrain.errors import InputError
from vltrain.ops.attention import PACKED_SDPA, PACKED_TILED, PACKED_VARLEN, varlen_offers

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
INSTALL_FLASH = "bash launch/setup_env.sh --with flash"


@dataclass(frozen=True)
class Kernel:
    """What a variable-length kernel can compute. Compute capability: first digits, from `oldest` to `newest`."""

    oldest: int
    newest: int | None
    longest_head: int
    any_head: bool = False
    """Whether heads may be of a length that is no multiple of 8."""
    dropout: bool = False


@dataclass(frozen=True)
class Package:
    """Where transformers looks for a kernel: a distribution, and the module that has its functions."""

    distribution: str
    module: str
    install: str


KERNELS = {
    "flash_attention_3": Kernel(oldest=8, newest=9, longest_head=256),
    "flash_attention_4": Kernel(oldest=9, newest=12, longest_head=128),
    "flash_attention_2": Kernel(oldest=8, newest=None, longest_head=256, any_head=True, dropout=True),
    # Beyond 192 its backward runs on some cards of a capability and not on others.
    "varlen": Kernel(oldest=8, newest=None, longest_head=192),
}
PACKAGES = {
    "flash_attention_2": Package("flash-attn", "flash_attn", INSTALL_FLASH),
    "flash_attention_3": Package("flash-attn-3", "flash_attn_interface", "its build from flash-attn's folder hopper"),
    "flash_attention_4": Package("flash-attn-4", "flash_attn.cute", "pip install flash-attn-4"),
}
IMPLEMENTATIONS = {"sdpa": PACKED_SDPA, "tiled": PACKED_TILED, "varlen": PACKED_VARLEN}
TILED_THREADS = 2
"""Up to which `tiled` was measured: SDPA spreads over more of them, as its work needs no large products."""


def choose_attention(
    requested: str,
    config: Any,
    device: torch.device | str,
    dtype: torch.dtype,
    key: str = "model.llm.attention",
    *,
    beyond: str | None = None,
    log: bool = True,
) -> str:
    """Settles `auto` of the setting `key` and returns transformers' name of the implementation, logging (`log`) the
    choice and its reason.

    An outline on the meta device runs nowhere, so that it may be asked for anything and stands for it with `sdpa`, or
    with `tiled`, which keeps more in memory.

    Args:
        config: of the LLaMA, for the length of its heads and its dropout.
        device: of the forwards.
        dtype: of matrix products.
        beyond: what of the LLM's attention the kernels cannot compute, beside what its config says, in words
            (`vltrain.models.backbones.packed_decoder.beyond_kernels`); None: nothing.

    Raises: InputError if an implementation is asked for that cannot run.
    """
    device, beyond = torch.device(device), beyond or beyond_kernels(config)
    if device.type == "meta":
        return {"eager": "eager", "tiled": PACKED_TILED}.get(requested, PACKED_SDPA)
    if requested == "tiled" and (reason := why_not_tiled(config, device)):
        raise InputError(f"{key}: found 'tiled', but {reason}. Use 'auto' or 'sdpa'")
    if requested in KERNELS and (reason := why_not(requested, config, device, dtype, beyond)):
        raise InputError(f"{key}: found '{requested}', but {reason}. Use 'auto' or 'sdpa'")
    chosen, because = requested, f"{key} asks for it"
    if requested == "auto":
        chosen, reasons = "sdpa", {}
        for name in KERNELS:
            reason = why_not(name, config, device, dtype, beyond)
            if reason is None:
                chosen = name
                break
            reasons[name] = reason
        because = _because(reasons) or "it is installed and fits"
        if chosen == "sdpa" and device.type == "cpu":
            reason = why_not_tiled(config, device) or _why_not_measured()
            chosen, because = ("sdpa", f"{because}; tiled: {reason}") if reason else ("tiled", because)
    if log:
        logger.info("attention of packed rows: %s (%s)", chosen, because)
    return IMPLEMENTATIONS.get(chosen, chosen)


def setting_of(implementation: str) -> str:
    """How the setting names what transformers calls so, as `choose_attention` returned it."""
    return next((name for name, known in IMPLEMENTATIONS.items() if known == implementation), implementation)


def beyond_kernels(config: Any) -> str | None:
    """What of an LLM's attention the variable-length kernels cannot compute, as its config says it, in words; None:
    nothing."""
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return "attends in chunks"
    softcap = getattr(config, "attn_logit_softcapping", None)
    return None if softcap is None else f"caps its attention's logits at {softcap}"


def why_not(name: str, config: Any, device: torch.device, dtype: torch.dtype, beyond: str | None = None) -> str | None:
    """Why the kernel `name` cannot run here, or None. Packages are asked last, and imported only if all else fits."""
    kernel = KERNELS[name]
    if beyond is not None:
        return f"this LLM {beyond}, which none of these kernels computes"
    if device.type != "cuda":
        return f"the model runs on '{device}', and it needs a CUDA device"
    if dtype not in HALF:
        return (
            f"matrix products are in {str(dtype).removeprefix('torch.')} (train.precision), and it computes in bf16 "
            "or fp16 only"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < kernel.oldest or (kernel.newest is not None and major > kernel.newest):
        wanted = f"{kernel.oldest}.0 or newer" if kernel.newest is None else f"{kernel.oldest}.0 to {kernel.newest}.x"
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and it needs {wanted}"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head > kernel.longest_head or (head % 8 and not kernel.any_head):
        taken = f"up to {kernel.longest_head}" if kernel.any_head else f"multiples of 8 up to {kernel.longest_head}"
        return f"this LLM's heads have {head} entries, and it takes {taken}"
    dropout = getattr(config, "attention_dropout", 0.0)
    if dropout and not kernel.dropout:
        return f"this LLM has an attention_dropout of {dropout}, and it has none"
    if name == "varlen":
        if not varlen_offers():
            return f"torch {torch.__version__} has no varlen_attn, and 2.10 is the first that does"
        if getattr(config, "sliding_window", None) is not None and not varlen_offers("window_size"):
            return f"this LLM attends in sliding windows, and the varlen_attn of torch {torch.__version__} has none"
        return None
    return _why_no_package(name)


def why_not_tiled(config: Any, device: torch.device) -> str | None:
    """Why `tiled` cannot run here, or None."""
    if device.type != "cpu":
        return f"the model runs on '{device}', and it is made for CPUs"
    dropout = getattr(config, "attention_dropout", 0.0)
    return f"this LLM has an attention_dropout of {dropout}, and it has none" if dropout else None


def _why_not_measured() -> str | None:
    """Why nobody knows that `tiled` is faster here, or None."""
    if not torch.backends.mkl.is_available():
        return "it was measured with MKL's products, which this torch does not have"
    threads = torch.get_num_threads()
    return None if threads <= TILED_THREADS else f"it was measured with {TILED_THREADS} threads at most, not {threads}"


def _why_no_package(name: str) -> str | None:
    """Why transformers cannot use the flash-attn that `name` stands for, or None. Imports its functions if it is
    installed."""
    package = PACKAGES[name]
    version = _installed(package.distribution)
    others = [other for other in PACKAGES.values() if other != package and _root(other) == _root(package)]
    twins = [other.distribution for other in others if _installed(other.distribution)]
    twin = f"{twins[0]}, which has the same import name {_root(package)}," if twins else ""
    if version is None:
        return (
            f"the package {package.distribution} is not installed"
            + (f" ({twin} is)" if twin else "")
            + f": {package.install}"
        )
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return f"transformers {transformers.__version__} does not know it"
    try:
        module = importlib.import_module(package.module)
        missing = [
            function for function in ("flash_attn_func", "flash_attn_varlen_func") if not hasattr(module, function)
        ]
        failure = f"{package.module} has no {missing[0]}" if missing else None
    except Exception as error:  # a binary made for another torch or CUDA fails in any way
        failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    if failure:
        mend = (
            f"{twin} is installed too: keep one of the two"
            if twin
            else f"install it again for torch {torch.__version__}"
        )
        return f"{package.distribution} {version} is installed, but its import fails ({failure}); {mend}"
    if not getattr(transformers.utils, f"is_flash_attn_{name[-1]}_available")():
        return f"transformers {transformers.__version__} does not accept {package.distribution} {version}"
    return None


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _root(package: Package) -> str:
    return package.module.partition(".")[0]


def _because(reasons: dict[str, str]) -> str:
    """`flash_attention_3, varlen: REASON; ...`: each reason once."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    if len(names) == 1 and len(reasons) == len(KERNELS):
        return f"of flash-attn and varlen: {next(iter(names))}"
    return "; ".join(f"{', '.join(of)}: {reason}" for reason, of in names.items())

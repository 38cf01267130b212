"""At which rate a run would compute: of a card's data sheet, or of this machine's device as it was measured, times the
utilisation that the user states."""

from __future__ import annotations

import torch

from vltrain.config.command_line import COMMAND_LINE
from vltrain.distributed.hardware import GPU_PEAK_FLOPS, PRECISIONS, data_sheet_flops, measured_gemm_flops
from vltrain.distributed.rates import STALE_DAYS, Rate, keep_rate, kept_rate, own_device
from vltrain.errors import InputError, nearest
from vltrain.memory.duration import Pace

_PRODUCT_SIZES = {"cuda": 8192, "cpu": 512}
NOT_STATED = "at least that, since training is slower than one large product (--utilisation says how much)"


def pace_of(
    dtype: torch.dtype, *, card: str | None, utilisation: float | None, bandwidth: float | None, measure: bool
) -> Pace | None:
    """The rate to plan by; None where nothing says it.

    Args:
        dtype: of matrix products.
        card: a GPU by its name; None: this machine's device, GPU or CPU.
        utilisation: share of the rate that training reaches; None: all of it, which `Pace.origin` then says.
        bandwidth: bytes a second that a rank sends.
        measure: now, on this machine, and remembered.

    Raises: InputError for a card that is in no table, or that nothing says the utilisation of.
    """
    if card is not None:
        if measure:
            raise InputError(
                f"{COMMAND_LINE}: --measure: found beside --card {card}; it measures this machine's device"
            )
        return _by_data_sheet(dtype, card, utilisation, bandwidth)
    name = next(name for name, one in PRECISIONS.items() if one == dtype)
    rate = _measured(dtype, name) if measure else kept_rate(own_device(), name)
    if rate is None:
        return None
    origin = f"{_tera(rate.flops)} in {name} on {rate.device}, measured on {rate.day}"
    if rate.days_old > STALE_DAYS:
        origin += f" ({rate.days_old} days ago: --measure does it anew)"
    return _pace(rate.flops, utilisation, bandwidth, origin)


def _by_data_sheet(dtype: torch.dtype, card: str, utilisation: float | None, bandwidth: float | None) -> Pace:
    flops = data_sheet_flops(card, dtype)
    if flops is None:
        raise InputError(f"{COMMAND_LINE}: --card: found '{card}'; {nearest(card, GPU_PEAK_FLOPS)}")
    if utilisation is None:
        raise InputError(
            f"{COMMAND_LINE}: --card: found '{card}' without --utilisation, the share of its {_tera(flops)} that "
            "training reaches, such as 0.4"
        )
    return _pace(flops, utilisation, bandwidth, f"{_tera(flops)} of {card}'s data sheet")


def _pace(flops: float, utilisation: float | None, bandwidth: float | None, origin: str) -> Pace:
    origin += f"; {NOT_STATED}" if utilisation is None else f", of which training reaches {utilisation:g}"
    origin += "" if bandwidth is None else f"; {bandwidth / 1e9:g} GB/s between ranks"
    return Pace(flops=flops * (1.0 if utilisation is None else utilisation), bandwidth=bandwidth, origin=origin)


def _measured(dtype: torch.dtype, name: str) -> Rate:
    size = _PRODUCT_SIZES["cuda" if torch.cuda.is_available() else "cpu"]
    return keep_rate(own_device(), name, measured_gemm_flops(dtype, size))


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.3g} TFLOP/s"

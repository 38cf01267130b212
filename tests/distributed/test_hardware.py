"""Speeds that MFU is a share of."""

import pytest
import torch

from vltrain.distributed import hardware
from vltrain.distributed.hardware import choose_dtype, data_sheet_flops, peak_flops


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA A40", 150e12, 37.4e12),
    ],
)
def test_a_known_gpus_peak_is_its_data_sheets(
    name: str, bf16: float, fp32: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert (peak_flops(torch.bfloat16), peak_flops(torch.float32)) == (bf16, fp32)
    assert data_sheet_flops(name) == bf16


def test_an_unknown_gpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L400")
    monkeypatch.setattr(hardware, "measured_gemm_flops", lambda dtype: {torch.float32: 3.0}[dtype])
    assert peak_flops(torch.float32) == 3.0


def test_fp32_is_fp32_in_convolutions_too(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    choose_dtype("fp32")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32

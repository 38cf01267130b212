"""The fused adapter kernel against the equation in float64: values and every gradient, in Triton's interpreter or on the GPU that is there."""

import functools
import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from vltrain.config import AdapterConfig
from vltrain.errors import InputError
from vltrain.models.adapters import make_adapter
from vltrain.models.adapters.table import NormThenAdapter
from vltrain.ops import reference
from vltrain.ops.fused import fused_adapter

triton = pytest.importorskip("triton", reason="triton has no package for this machine")
from vltrain.ops import triton_adapter  # noqa: E402

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "down", "down_bias", "up", "up_bias")
# What rounding to a dtype changes, as a share of the largest value. TF32 products lie behind the half-width ones.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def tensors(rows: int, width: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + width + dim)
    draw = functools.partial(torch.randn, generator=generator)
    drawn = [draw(rows, width).to(dtype), draw(dim, width) / width**0.5, draw(dim), draw(width, dim) / dim**0.5, draw(width)]
    return [tensor.to(DEVICE).requires_grad_() for tensor in drawn]


def truth(x, down, down_bias, up, up_bias, norm_weight, scale):
    z = x.double()
    if norm_weight is not None:
        z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6) * norm_weight.double()
    return reference.bottleneck_adapter(z, down[None], down_bias, up[None], up_bias, scale=scale)


def assert_near(found: torch.Tensor, expected: torch.Tensor, rounding: float, what: str) -> None:
    largest = expected.abs().max().clamp(min=1e-30)
    assert torch.isfinite(found).all(), f"{what}: not finite"
    worst = ((found.double() - expected.double()).abs().max() / largest).item()
    assert worst <= rounding, f"{what}: off by {worst:.2e} of the largest value"


@pytest.fixture
def poisoned_memory(monkeypatch):
    """New tensors are full of NaN, so that a place which a kernel should have written and did not is seen."""
    empty = torch.Tensor.new_empty

    def new_empty(self, *shape, **options):
        made = empty(self, *shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda tensor: torch.full_like(tensor, float("nan")))


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(
    "rows, width, dim, dtype",
    [
        (5, 40, 4, torch.float32), (33, 257, 16, torch.float32), (70, 130, 32, torch.float32), (1, 64, 1, torch.float32), (40, 96, 8, torch.float32),
        (64, 128, 8, torch.bfloat16), (37, 200, 17, torch.bfloat16), (33, 136, 16, torch.float16),
    ],
)  # fmt: skip
def test_values_and_every_gradient(poisoned_memory, rows, width, dim, dtype, with_norm):
    ours = tensors(rows, width, dim, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    norm_weight = torch.rand(width, device=DEVICE) + 0.5 if with_norm else None
    found, expected = fused_adapter(*ours, scale=0.7, norm_weight=norm_weight), truth(*exact, norm_weight, 0.7)
    assert found.dtype == dtype
    assert_near(found, expected, ROUNDING[dtype], "y")
    upstream = torch.randn_like(found)
    found.backward(upstream)
    expected.backward(upstream.double())
    for name, mine, other in zip(NAMES, ours, exact, strict=True):
        assert mine.grad.dtype == mine.dtype and mine.grad.shape == mine.shape
        # Sums over rows of exact products: the weights' gradients carry no rounding of the states beyond that of what they read.
        assert_near(mine.grad, other.grad, ROUNDING[dtype] if name == "x" else max(ROUNDING[torch.float32], ROUNDING[dtype] / 5), f"gradient of {name}")


@pytest.mark.parametrize("with_norm", [False, True])
def test_bands_and_shares_of_rows_add_up(monkeypatch, with_norm):
    """More rows than a band holds, and more than one program of the columns' kernel takes; the last band is cut short."""
    monkeypatch.setattr(triton_adapter, "BAND_BYTES", 2 * 140 * 4 * 64)
    monkeypatch.setattr(triton_adapter, "TARGET_PROGRAMS", 4)
    assert triton_adapter.bands(150, 140, 4, 128) == (64, 2, 32)
    ours = tensors(150, 140, 4, torch.float32)
    norm_weight = torch.rand(140, device=DEVICE) + 0.5 if with_norm else None
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    fused_adapter(*ours, norm_weight=norm_weight).square().sum().backward()
    truth(*exact, norm_weight, 1.0).square().sum().backward()
    for name, mine, other in zip(NAMES, ours, exact, strict=True):
        assert_near(mine.grad, other.grad, 5e-6, f"gradient of {name}")


@pytest.mark.parametrize("layout", ["transposed", "every other row", "every other column", "3-d"])
def test_states_that_are_not_contiguous(layout):
    x, *weights = tensors(20, 36, 4, torch.float32)
    wide = torch.randn(40, 72, device=DEVICE)
    states = {
        "transposed": torch.randn(36, 20, device=DEVICE).t(), "every other row": wide[::2, :36], "every other column": wide[:, ::2], "3-d": wide[:, :36].view(2, 20, 36),
    }[layout]  # fmt: skip
    found = fused_adapter(states, *weights)
    assert found.shape == states.shape
    assert_near(found, truth(states, *weights, None, 1.0), 2e-6, layout)


@pytest.mark.parametrize("with_norm", [False, True])
def test_an_upstream_gradient_with_strides_of_its_own_and_states_without_gradient(with_norm):
    _, *weights = tensors(20, 36, 4, torch.float32)
    states = torch.randn(20, 36, device=DEVICE)
    norm_weight = torch.rand(36, device=DEVICE) if with_norm else None
    exact = [weight.detach().double().requires_grad_() for weight in weights]
    upstream = torch.randn(36, 20, device=DEVICE).t()
    fused_adapter(states, *weights, norm_weight=norm_weight).backward(upstream)
    truth(states, *exact, norm_weight, 1.0).backward(upstream.double())
    for name, mine, other in zip(NAMES[1:], weights, exact, strict=True):
        assert_near(mine.grad, other.grad, 2e-6, f"gradient of {name}")


def test_no_rows():
    x, *weights = tensors(0, 36, 4, torch.float32)
    found = fused_adapter(x, *weights)
    found.sum().backward()
    assert found.shape == (0, 36) and all(weight.grad.abs().max() == 0 for weight in weights)


def test_the_same_call_gives_the_same_bits():
    first, second = (tensors(150, 140, 8, torch.bfloat16) for _ in range(2))
    for ours in (first, second):
        fused_adapter(*ours).float().square().sum().backward()
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(first, second, strict=True))


def test_autocast_decides_the_results_dtype():
    ours = tensors(8, 36, 4, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = fused_adapter(*ours)
    assert found.dtype == torch.bfloat16
    assert_near(found, truth(*ours, None, 1.0), 1e-2, "y")


@pytest.mark.parametrize("with_norm", [False, True])
def test_torch_knows_the_operator(with_norm):
    """Schema, meta kernel, autograd and tracing, by torch's own checks."""
    ours = [tensor.detach().requires_grad_() for tensor in tensors(9, 36, 4, torch.float32)]
    norm_weight = torch.rand(36, device=DEVICE) if with_norm else None
    arguments = (ours[0], norm_weight, *ours[1:], 0.7, 1e-6, torch.float32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(triton_adapter.bottleneck_adapter, arguments, test_utils=tests)


def test_it_compiles_without_a_graph_break():
    ours, others = (tensors(9, 36, 4, torch.float32) for _ in range(2))
    compiled = torch.compile(lambda *given: fused_adapter(*given, scale=0.5) * 2, fullgraph=True, backend="aot_eager")
    compiled(*ours).sum().backward()
    (fused_adapter(*others, scale=0.5) * 2).sum().backward()
    for mine, other in zip(ours, others, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


class RmsNorm(torch.nn.Module):
    """A LLaMA's, by its attributes."""

    variance_epsilon = 1e-6

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


@pytest.mark.parametrize("norm", ["frozen rms", "trained rms", "layer"])
def test_an_adapter_module_gives_the_same_by_either_implementation(norm):
    """Fused with the norm where that is a frozen RMSNorm, and after it where not; also the norm's own gradient."""
    results = {}
    for impl in ("torch", "triton"):
        torch.manual_seed(0)
        adapter = make_adapter(48, AdapterConfig(dim=4, groups=2, down_groups=2, impl=impl))
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter)
        before = (torch.nn.LayerNorm(48) if norm == "layer" else RmsNorm(48)).requires_grad_(norm != "frozen rms")
        module = NormThenAdapter(OrderedDict(norm=before, adapter=adapter)).to(DEVICE)
        x = torch.randn(2, 7, 48, device=DEVICE, requires_grad=True)
        y = module(x)
        y.square().sum().backward()
        results[impl] = {"y": y.detach(), "x": x.grad, **{name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}}
    assert results["torch"].keys() == results["triton"].keys()
    for name, expected in results["torch"].items():
        assert_near(results["triton"][name], expected, 1e-5, name)


@pytest.mark.parametrize("changes, named", [({"dim": 34}, "dim = 34"), ({"dropout": 0.1}, "dropout = 0.1")])
def test_what_the_kernel_cannot_do_is_refused(changes, named):
    with pytest.raises(InputError, match=named):
        make_adapter(68, AdapterConfig(**{"dim": 4, **changes}, impl="triton"))


def test_without_cuda_it_is_refused_unless_interpreted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="no CUDA device"):
        make_adapter(48, AdapterConfig(impl="triton"))


def test_it_compiles_ahead_of_time_for_a100_and_h100_without_spills(tmp_path):
    """The sizes of the real models, in a process where Triton compiles instead of interpreting."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    out = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "tests.benchmarks.kernels", "--widths", "4096", "--dims", "16", "--compile-only", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())["compiled"]
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90"} and {row["kernel"] for row in rows} == {"forward", "backward rows", "backward columns"}
    for row in rows:
        assert row["spills"] == 0, row
        assert row["shared_bytes"] <= 163 * 1024, row  # what an A100 gives a block
    assert all(row[f"{name}_ratio"] <= 1.1 for row in json.loads(out.read_text())["bytes"] for name in ("forward", "backward"))

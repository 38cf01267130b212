"""The fused adapter kernel against the equation in float64: values and every gradient, in Triton's interpreter or on
the GPU that is there."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vltrain.config.model.mmt import AdapterConfig
from vltrain.errors import InputError
from vltrain.models.adapters import make_adapter
from vltrain.models.adapters.table import NormThenAdapter
from vltrain.ops import reference
from vltrain.ops.fused import fused_adapter, runs_fused

triton = pytest.importorskip("triton", reason="triton has no package for this machine")
from vltrain.ops import adapter_launch, triton_adapter

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "down", "down_bias", "up", "up_bias")
# How far a result may be from the truth, as a share of its norm, by the dtype that the products' operands are rounded
# to. Rounding to bf16 changes a number by 2^-8 of itself at most (Triton's interpreter cuts off instead: 2^-7), by 0.4
# of that in the mean square, and up to five roundings lie between the states and a result: x, D, hidden or dhidden, U,
# and the result itself. Roundings add up to 0.4 sqrt(5) of it, cuts, which all go one way, to 0.35 * 5.
# In fp32 one rounding changes 2^-24; sums of n numbers of any sign add up to sqrt(n) times that, two of n <= 300 follow
# each other.
ROUNDING = {torch.float32: 2 * 300**0.5 * 2**-24, torch.bfloat16: 2 * (2**-8 if DEVICE == "cuda" else 2**-7)}


def tensors(rows: int, width: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + width + dim)
    draw = functools.partial(torch.randn, generator=generator)
    drawn = [
        draw(rows, width).to(dtype),
        draw(dim, width) / width**0.5,
        draw(dim),
        draw(width, dim) / dim**0.5,
        draw(width),
    ]
    return [tensor.to(DEVICE).requires_grad_() for tensor in drawn]


def drawn_like(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers on a CPU and on a GPU."""
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor.device, tensor.dtype)


def rms_weight(width: int) -> torch.Tensor:
    return (torch.rand(width, generator=torch.Generator().manual_seed(2)) + 0.5).to(DEVICE)


def truth(x, down, down_bias, up, up_bias, norm_weight, scale):
    z = x.double()
    if norm_weight is not None:
        z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6) * norm_weight.double()
    return reference.bottleneck_adapter(z, down[None], down_bias, up[None], up_bias, scale=scale)


def assert_near(found: torch.Tensor, expected: torch.Tensor, rounding: float, what: str) -> None:
    assert torch.isfinite(found).all(), f"{what}: not finite"
    off = ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()
    assert off <= rounding, f"{what}: off by {off:.2e} of its norm"


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
        (5, 40, 4, torch.float32),
        (33, 257, 16, torch.float32),
        (70, 130, 32, torch.float32),
        (1, 64, 1, torch.float32),
        (40, 96, 8, torch.float32),
        (64, 128, 8, torch.bfloat16),
        (37, 200, 17, torch.bfloat16),
        (33, 136, 16, torch.bfloat16),
        (1, 300, 32, torch.bfloat16),
        (130, 272, 32, torch.bfloat16),
    ],
)
def test_values_and_every_gradient(poisoned_memory, rows, width, dim, dtype, with_norm):
    ours = tensors(rows, width, dim, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    norm_weight = rms_weight(width) if with_norm else None
    found, expected = fused_adapter(*ours, scale=0.7, norm_weight=norm_weight), truth(*exact, norm_weight, 0.7)
    assert found.dtype == dtype
    assert_near(found, expected, ROUNDING[dtype], "y")
    upstream = drawn_like(found)
    found.backward(upstream)
    expected.backward(upstream.double())
    for name, mine, other in zip(NAMES, ours, exact, strict=True):
        assert mine.grad.dtype == mine.dtype and mine.grad.shape == mine.shape
        assert_near(mine.grad, other.grad, ROUNDING[dtype], f"gradient of {name}")
    # No operand of it is rounded: dy is added up as it comes.
    assert_near(ours[-1].grad, exact[-1].grad, ROUNDING[torch.float32], "gradient of up_bias")


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(
    "rows, width, dim, dtype", [(33, 257, 16, torch.float32), (40, 96, 3, torch.float32), (37, 200, 17, torch.bfloat16)]
)
def test_without_biases(poisoned_memory, rows, width, dim, dtype, with_norm):
    x, down, _, up, _ = tensors(rows, width, dim, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, down, up)]
    norm_weight = rms_weight(width) if with_norm else None
    found = fused_adapter(x, down, None, up, None, scale=0.7, norm_weight=norm_weight)
    expected = truth(exact[0], exact[1], None, exact[2], None, norm_weight, 0.7)
    assert_near(found, expected, ROUNDING[dtype], "y")
    upstream = drawn_like(found)
    found.backward(upstream)
    expected.backward(upstream.double())
    for name, mine, other in zip(("x", "down", "up"), (x, down, up), exact, strict=True):
        assert mine.grad.dtype == mine.dtype and mine.grad.shape == mine.shape
        assert_near(mine.grad, other.grad, ROUNDING[dtype], f"gradient of {name}")


@pytest.mark.parametrize("with_norm", [False, True])
def test_shares_of_rows_add_up(monkeypatch, with_norm):
    """More rows than a program of the columns' kernel takes; the last share is cut short."""
    monkeypatch.setattr(adapter_launch, "COLUMNS_PROGRAMS", 9)
    launch = triton_adapter.launches(torch.float32, torch.float32, 16, False)["backward columns"]
    shares, share_rows = triton_adapter.row_shares(150, 140, launch)
    assert shares > 1 and share_rows > launch.rows and (shares - 1) * share_rows < 150 < shares * share_rows
    ours = tensors(150, 140, 4, torch.float32)
    norm_weight = rms_weight(140) if with_norm else None
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    fused_adapter(*ours, norm_weight=norm_weight).square().sum().backward()
    truth(*exact, norm_weight, 1.0).square().sum().backward()
    for name, mine, other in zip(NAMES, ours, exact, strict=True):
        assert_near(mine.grad, other.grad, ROUNDING[torch.float32], f"gradient of {name}")


@pytest.mark.parametrize(
    "num_rows, width", [(1, 64), (31, 768), (2560, 1024), (8192, 4096), (8191, 5120), (300_000, 768)]
)
def test_shares_hold_each_row_once(num_rows, width):
    for products, height in ((torch.bfloat16, 16), (torch.bfloat16, 32), (torch.float32, 32)):
        launch = triton_adapter.launches(products, products, height, True)["backward columns"]
        shares, share_rows = triton_adapter.row_shares(num_rows, width, launch)
        assert share_rows % launch.rows == 0 and (shares - 1) * share_rows < num_rows <= shares * share_rows
        assert (
            shares == 1 or (shares - 1) * -(-width // launch.columns) < adapter_launch.COLUMNS_PROGRAMS
        )  # so the partial sums stay small


@pytest.mark.parametrize("layout", ["transposed", "every other row", "every other column", "3-d"])
def test_states_that_are_not_contiguous(layout):
    x, *weights = tensors(20, 36, 4, torch.float32)
    wide = torch.randn(40, 72, device=DEVICE)
    states = {
        "transposed": torch.randn(36, 20, device=DEVICE).t(),
        "every other row": wide[::2, :36],
        "every other column": wide[:, ::2],
        "3-d": wide[:, :36].view(2, 20, 36),
    }[layout]
    found = fused_adapter(states, *weights)
    assert found.shape == states.shape
    assert_near(found, truth(states, *weights, None, 1.0), ROUNDING[torch.float32], layout)


@pytest.mark.parametrize("with_norm", [False, True])
def test_an_upstream_gradient_with_strides_of_its_own_and_states_without_gradient(with_norm):
    _, *weights = tensors(20, 36, 4, torch.float32)
    states = torch.randn(20, 36, device=DEVICE)
    norm_weight = rms_weight(36) if with_norm else None
    exact = [weight.detach().double().requires_grad_() for weight in weights]
    upstream = torch.randn(36, 20, device=DEVICE).t()
    fused_adapter(states, *weights, norm_weight=norm_weight).backward(upstream)
    truth(states, *exact, norm_weight, 1.0).backward(upstream.double())
    for name, mine, other in zip(NAMES[1:], weights, exact, strict=True):
        assert_near(mine.grad, other.grad, ROUNDING[torch.float32], f"gradient of {name}")


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


@pytest.mark.parametrize("with_norm", [False, True])
def test_under_autocast_fp32_states_are_multiplied_in_its_dtype(poisoned_memory, with_norm):
    """As behind a ViT's LayerNorm on CUDA: results in bf16, the states' gradient in fp32; off by what bf16 rounds, and
    by more than fp32 would."""
    ours = tensors(37, 136, 4, torch.float32)
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    norm_weight = rms_weight(136) if with_norm else None
    with torch.autocast(DEVICE, torch.bfloat16):
        found = fused_adapter(*ours, norm_weight=norm_weight)
    assert found.dtype == torch.bfloat16
    expected, upstream = truth(*exact, norm_weight, 1.0), drawn_like(found)
    assert_near(found, expected, ROUNDING[torch.bfloat16], "y")
    found.backward(upstream)
    expected.backward(upstream.double())
    for name, mine, other in zip(NAMES, ours, exact, strict=True):
        assert mine.grad.dtype == torch.float32
        assert_near(mine.grad, other.grad, ROUNDING[torch.bfloat16], f"gradient of {name}")
    assert (ours[1].grad - exact[1].grad).norm() > 1e-4 * exact[1].grad.norm()


@pytest.mark.parametrize("with_norm, bias", [(False, True), (True, True), (True, False)])
def test_torch_knows_the_operator(with_norm, bias):
    """Schema, meta kernel, autograd and tracing, by torch's own checks."""
    ours = [tensor.detach().requires_grad_() for tensor in tensors(9, 36, 4, torch.float32)]
    if not bias:
        ours[2] = ours[4] = None
    norm_weight = rms_weight(36) if with_norm else None
    arguments = (ours[0], norm_weight, *ours[1:], 0.7, 1e-6, torch.float32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(triton_adapter.bottleneck_adapter, arguments, test_utils=tests)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_without_a_graph_break(dynamic, bias):
    """`dynamic`: sizes are symbols, as in the blocks that `train.compile` compiles."""
    ours, others = (tensors(9, 36, 4, torch.float32) for _ in range(2))
    if not bias:
        for given in (ours, others):
            given[2] = given[4] = None
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *given: fused_adapter(*given, scale=0.5) * 2, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    compiled(*ours).sum().backward()
    (fused_adapter(*others, scale=0.5) * 2).sum().backward()
    for mine, other in zip(ours, others, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.grad, other.grad)


class Symbol(int):
    """A size in a graph of torch 2.11, which cannot be multiplied by a bool."""

    def __mul__(self, other):
        assert type(other) is not bool
        return int(self) * other

    __rmul__ = __mul__


@pytest.mark.parametrize("bias", [False, True])
def test_sizes_of_gradients_are_not_multiplied_by_bools(bias):
    states = SimpleNamespace(shape=(Symbol(7), Symbol(36)), new_empty=lambda shape, dtype=None: tuple(shape))
    shapes = triton_adapter._empty_gradients(states, Symbol(4), bias, True)
    assert shapes == ((7, 36), (4, 36), (4 * bias,), (36, 4), (36 * bias,))


class RmsNorm(torch.nn.Module):
    """A LLaMA's, by its attributes."""

    variance_epsilon = 1e-6

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


@pytest.mark.parametrize(
    "norm, bias",
    [("frozen rms", True), ("frozen rms", False), ("trained rms", True), ("layer", True), ("layer", False)],
)
def test_an_adapter_module_gives_the_same_by_either_implementation(norm, bias):
    """Fused with the norm where that is a frozen RMSNorm, and after it where not; also the norm's own gradient."""
    results = {}
    for impl in ("torch", "triton"):
        torch.manual_seed(0)
        adapter = make_adapter(48, AdapterConfig(dim=4, groups=2, down_groups=2, bias=bias, impl=impl))
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter)
        before = (torch.nn.LayerNorm(48) if norm == "layer" else RmsNorm(48)).requires_grad_(norm != "frozen rms")
        module = NormThenAdapter(before, adapter).to(DEVICE)
        x = torch.randn(2, 7, 48, device=DEVICE, requires_grad=True)
        y = module(x)
        y.square().sum().backward()
        results[impl] = {
            "y": y.detach(),
            "x": x.grad,
            **{name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None},
        }
    assert results["torch"].keys() == results["triton"].keys()
    for name, expected in results["torch"].items():
        assert_near(results["triton"][name], expected, 1e-5, name)


@pytest.mark.parametrize("changes, named", [({"dim": 34}, "dim = 34"), ({"dropout": 0.1}, "dropout = 0.1")])
def test_an_adapter_that_the_kernel_cannot_do_is_refused(changes, named):
    with pytest.raises(InputError, match=named):
        make_adapter(68, AdapterConfig(**{"dim": 4, **changes}, impl="triton"))


@pytest.mark.parametrize(
    "states, autocast", [(torch.float16, None), (torch.float64, None), (torch.float32, torch.float16)]
)
def test_a_dtype_that_the_kernel_cannot_do_is_refused(states, autocast):
    x = torch.zeros(2, 48, dtype=states, device=DEVICE)
    with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
        with pytest.raises(InputError, match="float16" if torch.float16 in (states, autocast) else "float64"):
            runs_fused("triton", x, 4, 0.0)
        assert not runs_fused("auto", x, 4, 0.0) and not runs_fused("torch", x, 4, 0.0)


@pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_runs_on_the_device_of_its_states():
    ours = [tensor.detach().to("cuda:1").requires_grad_() for tensor in tensors(20, 48, 4, torch.float32)]
    found = fused_adapter(*ours)
    found.sum().backward()
    assert torch.cuda.current_device() == 0
    assert_near(found, truth(*ours, None, 1.0), ROUNDING[torch.float32], "y")


def test_without_cuda_it_is_refused_unless_interpreted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="no CUDA device"):
        make_adapter(48, AdapterConfig(impl="triton"))


# All dims and widths of one padded size compile to the same code; the widest bottleneck, with the norm, needs most
# registers.
WORST = ["--widths", "4096", "--dims", "32", "--norms", "1"]
MOST_SPILLED = (
    8 if triton.__version__.startswith("3.4.") else 0
)  # bytes a thread: Triton 3.4 spills two registers of the worst case on an sm_80


@pytest.mark.parametrize(
    "arguments",
    [
        [*WORST, "--archs", "sm_80"], [*WORST, "--archs", "sm_90", "sm_100", "--cases", "autocast"],
        pytest.param(["--widths", "4096", "1001", "--dims", "4", "32"], marks=pytest.mark.slow, id="every case"),
    ],
)  # fmt: skip
def test_it_compiles_ahead_of_time_without_spills(tmp_path, arguments):
    """In a process where Triton compiles instead of interpreting."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }
    out = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "tests.benchmarks.kernels", *arguments, "--compile-only", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert {row["kernel"] for row in found["compiled"]} == {
        "pack",
        "forward",
        "backward rows",
        "backward columns",
        "finish",
    }
    for row in found["compiled"]:
        assert row["spills"] <= MOST_SPILLED, row
        assert row["shared_bytes"] <= 163 * 1024, row  # what an A100 gives a block

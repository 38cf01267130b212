"""`train.deterministic`: what it switches, that a CPU's results stay what they are, and that no operation of ours needs
it on CUDA.

The last is seen on a CPU: every operation of a forward and backward, of sampling and of ranking passes a dispatch mode,
which holds it against torch's own list of those that are not deterministic on CUDA.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import kinds
from tests.support.reading import pictures
from vltrain.errors import InputError
from vltrain.evaluate.answering.decoding import Sampling, sample_tokens
from vltrain.evaluate.answering.generate import generate
from vltrain.ops.rows import place_rows, segment_sums, take_rows
from vltrain.schema import IMAGE_MODALITY_TOKEN, IMAGE_TOKEN, TEXT_MODALITY_TOKEN, Segment
from vltrain.train.determinism import set_determinism

# From the documentation of torch.use_deterministic_algorithms (torch 2.13), by aten's names without `_` in front and
# `_backward` behind kept:
# what raises on CUDA under the switch ...
RAISES = {
    "avg_pool3d_backward",
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward",
    "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward",
    "max_unpool2d",
    "max_unpool3d",
    "upsample_linear1d_backward",
    "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward",
    "upsample_trilinear3d_backward",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "reflection_pad3d_backward",
    "nll_loss_forward",
    "nll_loss2d_forward",
    "_ctc_loss_backward",
    "_embedding_bag_dense_backward",
    "put",
    "put_",
    "histc",
    "bincount",
    "median",
    "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
    "cumsum",
    "cumsum_",
    "cumprod",
    "resize_",
}
# ... and what is deterministic under the switch only.
SWITCHED = {
    "convolution",
    "convolution_backward",
    "replication_pad1d_backward",
    "replication_pad2d_backward",
    "replication_pad3d_backward",
    "index_put",
    "index_put_",
    "scatter",
    "scatter_",
    "scatter_add",
    "scatter_add_",
    "scatter_reduce",
    "scatter_reduce_",
    "index_add",
    "index_add_",
    "index_copy",
    "index_copy_",
    "max_pool3d_with_indices_backward",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention_backward",
}


def excuse(name: str, overload: str, arguments: tuple) -> str | None:
    """Why an operation of the lists is fine as it is called here; None where it is not."""
    if name in ("cumsum", "cumsum_") and not arguments[0].is_floating_point():
        return "whole numbers: their sum has no order"
    if name == "resize_" and not arguments[0].is_quantized:
        return "no quantised tensor"
    if name.startswith("convolution"):
        return "a ViT's patches: cuDNN, deterministic under the switch"
    if name.startswith("_scaled_dot_product"):
        return "torch's attention: its gradient is deterministic under the switch"
    if name.startswith("scatter") and overload.startswith("value"):
        return "of a number, not of a tensor, one entry a row"
    if name in ("index_put", "index_put_") and arguments[2].dim() == 0 and not any(arguments[3:]):
        return "the same number in every place"
    if name in ("index_put", "index_put_") and len(arguments) > 3 and arguments[3]:
        return "the gradient of an index: sorted on CUDA"
    if name in ("index_add", "index_add_") and _adds_one_each(arguments[2], arguments[3]):
        return "the gradient of a selection in which at most one addend of a row is not zero"
    return None


def _adds_one_each(index: torch.Tensor, addends: torch.Tensor) -> bool:
    """The padding of packed attention: row 0 is read where no token stands, and what is read there has a gradient of
    zero."""
    nonzero = addends.flatten(1).abs().amax(1) > 0
    return bool((torch.bincount(index[nonzero]) <= 1).all())


class Watch(TorchDispatchMode):
    """Notes every operation that torch does not call deterministic on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.excused: set[str] = set()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, overload = func.__name__.split(".")
        self.seen.add(name)
        if name in RAISES | SWITCHED:
            reason = excuse(name, overload, args)
            if reason is None:
                self.faults.append(f"{func} of {[tuple(one.shape) for one in args if isinstance(one, torch.Tensor)]}")
            else:
                self.excused.add(reason)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", kinds.NAMES)
def test_no_operation_of_a_training_step_needs_atomics(name):
    model, batch = kinds.make(name)
    with Watch() as watch:
        with torch.autocast("cpu", torch.bfloat16, enabled=name.endswith("bits16")):
            loss = kinds.loss_of(name, model.train(), batch)
        loss.backward()
    assert not watch.faults
    assert {"embedding", "embedding_dense_backward"} <= watch.seen, "neither images were taken nor segments summed"


def prompts_with_images(model) -> list[Segment]:
    shown = [("a",), ("b", "a"), (), ("a",)]
    rows = [
        [
            IMAGE_MODALITY_TOKEN if names else TEXT_MODALITY_TOKEN,
            *[IMAGE_TOKEN] * (model.visual_tokens * len(names)),
            5,
            9,
            11,
        ]
        for names in shown
    ]
    return [
        Segment(
            sample_id=f"s{number}", input_ids=np.array(row, np.int32), loss_mask=np.zeros(len(row), bool), images=names,
            instruction_ids=np.array([4, 5, 6], np.int32),
        )
        for number, (row, names) in enumerate(zip(rows, shown))
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["mmt-bottleneck", "mmt-router", "mmt-prompts", "llama-lora", "t5-lora"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_operation_of_an_evaluation_needs_atomics(name, temperature):
    model, batch = kinds.make(name)
    size = model.image_size
    sampling = Sampling(max_new_tokens=4, temperature=temperature, top_p=0.9)
    with Watch() as watch, torch.no_grad():
        prompts = prompts_with_images(model)
        picture = lambda name: np.full((3, size, size), ord(name), np.uint8)
        generate(
            model.eval(),
            prompts,
            pictures(model, picture),
            sampling=sampling,
            stop_ids=(2,),
            vocab_size=60,
            batch_size=3,
            device="cpu",
        )
        model(batch)
    assert not watch.faults


@pytest.mark.parametrize(
    "what",
    [
        lambda x: x.index_select(0, torch.tensor([0, 0, 1])),
        lambda x: x.cumsum(0),
        lambda x: x.gather(0, torch.zeros(2, 3, dtype=torch.int64)),
        lambda x: torch.zeros(4, 3).index_add(0, torch.tensor([1, 1, 2, 0, 0]), x),
        lambda x: F.interpolate(x[None], 7, mode="linear"),
        lambda x: torch.zeros(4, 3).index_copy(0, torch.tensor([1, 2]), x[:2]),
    ],
)
def test_the_watch_sees_what_is_not_deterministic(what):
    x = torch.randn(5, 3, requires_grad=True)
    with Watch() as watch:
        what(x).sum().backward()
    assert watch.faults


def test_rows_are_taken_placed_and_summed_as_torch_does():
    draw = torch.Generator().manual_seed(0)
    rows, states = (
        torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in ((4, 2, 3), (9, 3))
    )
    index, holds = torch.tensor([2, 0, 2, 2]), torch.tensor([0, 1, 1, 1, 0, 1, 1, 1, 1]).bool()
    where = holds.nonzero().squeeze(1)
    weights = torch.randn(9, 3, generator=draw, dtype=torch.float64)
    found = place_rows(states, take_rows(rows, index).flatten(0, 1)[: len(where)], holds)
    expected = states.index_copy(0, where, rows.index_select(0, index).flatten(0, 1)[: len(where)])
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad((output * weights).sum(), (states, rows)) for output in (found, expected)]
    assert all(torch.equal(one, other) for one, other in zip(*gradients))
    values, owner = torch.randn(50, generator=draw), torch.randint(4, (50,), generator=draw)
    assert torch.equal(segment_sums(values, owner, 6), torch.zeros(6).index_add(0, owner, values))
    assert segment_sums(torch.empty(0), torch.empty(0, dtype=torch.int64), 2).tolist() == [0, 0]


def test_rows_that_no_place_takes_get_a_gradient_of_zero():
    rows, states = torch.randn(2, 1, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    taken = take_rows(rows, torch.empty(0, dtype=torch.int64)).flatten(0, 1)
    place_rows(states, taken, torch.zeros(4, dtype=torch.bool)).sum().backward()
    assert torch.equal(rows.grad, torch.zeros(2, 1, 3)) and torch.equal(states.grad, torch.ones(4, 3))


def test_whole_numbers_sample_what_a_cumulative_sum_of_floats_does():
    draw = torch.Generator().manual_seed(1)
    logits, uniforms = 3 * torch.randn(500, 97, generator=draw), torch.rand(500, generator=draw, dtype=torch.float64)
    for top_p in (1.0, 0.9, 0.3):
        probabilities, tokens = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
        sums = probabilities.cumsum(-1)
        kept = sums - probabilities < top_p
        chosen = torch.searchsorted(sums, uniforms[:, None] * (probabilities * kept).sum(-1, keepdim=True), right=True)
        assert torch.equal(sample_tokens(logits, uniforms, 1.0, top_p), tokens.gather(-1, chosen).squeeze(-1))


@pytest.fixture
def put_back(monkeypatch):
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.delenv(name, raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    yield monkeypatch
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        os.environ.pop(name, None)
    torch.use_deterministic_algorithms(before)


def test_the_setting_switches_torch_cublas_and_flash_attn(put_back):
    set_determinism(True)
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory and not torch.backends.cudnn.benchmark
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["FLASH_ATTENTION_DETERMINISTIC"]) == (":4096:8", "1")
    set_determinism(False)
    assert not torch.are_deterministic_algorithms_enabled() and os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "0"


def test_a_workspace_that_is_not_deterministic_is_refused(put_back):
    put_back.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(
        InputError,
        match="CUBLAS_WORKSPACE_CONFIG: found ':0:0', but train.deterministic needs :4096:8 or :16:8; unset it",
    ):
        set_determinism(True)
    set_determinism(False)


@pytest.mark.parametrize("name", ["mmt-bottleneck", "mmt-full", "llama-full", "t5-lora"])
def test_on_a_cpu_it_changes_no_bit(name, put_back):
    results = []
    for wanted in (True, False):
        set_determinism(wanted)
        model, batch = kinds.make(name)
        loss = kinds.loss_of(name, model.train(), batch)
        loss.backward()
        results.append(
            [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]
        )
    assert len(results[0]) > 3 and all(torch.equal(one, other) for one, other in zip(*results, strict=True))

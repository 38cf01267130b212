"""What is read on the host is what was on the device when it was copied, after the collective on it and no sooner."""

import pytest
import torch

from vltrain.distributed.readback import HostCopy
from vltrain.ops.transfer import to_device


class Sum:
    """A collective of gloo's: its result is there once it was waited for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.waits = tensor, 0

    def wait(self) -> None:
        self.waits += 1
        self.tensor.mul_(2)


def test_a_collective_is_waited_for_when_it_is_read_and_once():
    tensor = torch.tensor([1.0, 3.0])
    work = Sum(tensor)
    copy = HostCopy(tensor, work)
    assert work.waits == 0
    assert copy.read().tolist() == [2.0, 6.0] == copy.read().tolist() and work.waits == 1
    assert HostCopy(torch.tensor(2.5, requires_grad=True)).read().item() == 2.5


def test_on_a_cpu_nothing_is_pinned_or_copied():
    tensor = torch.arange(3)
    assert to_device(tensor, "cpu") is tensor and not tensor.is_pinned()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_neither_waits_for_the_device():
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = to_device(torch.arange(1000), "cuda")
        copies = [HostCopy(moved * number) for number in range(4)]
        moved.zero_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [int(copy.read()[7]) for copy in copies] == [0, 7, 14, 21]

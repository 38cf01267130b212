"""DeepSpeed, wrapped: the only module that imports it, but for `cpu_adam`.

What the rest sees is small: forward, backward, step, the norm of the gradient, and the trainable state as whole
tensors, whatever the ZeRO stage and the number of ranks. Losses are already global (a sum over all ranks divided by the
step's label tokens), so DeepSpeed's own division by accumulation steps is switched off and its averaging over ranks
undone.

Off logging steps nothing of ours makes the host wait for the device (under `train.on_bad_loss: skip` each step's loss
does). DeepSpeed's own waits are its: ZeRO 1 to 3 read the gradient's norm, or whether it is finite, before the
optimizer's step (`step`, `has_overflow`, `scaled_global_norm`), ZeRO 3 waits for the stream that reduces gradients at
the end of each backward, and offloading for its copies. Stage 0 has none.

Trade-off: no fp16 with loss scaling. Trained parameters are fp32 at every stage, under autocast where `precision` is
bf16.
"""

from __future__ import annotations

import datetime
import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from vltrain.console import keeps_log, prints_are_logged
from vltrain.distributed.hardware import device
from vltrain.distributed.machine import require_one_model
from vltrain.distributed.ranks import adopt_ranks, join_process_group
from vltrain.models.backbones.packed_decoder import gather_whole
from vltrain.models.interface import VisionLanguageModel
from vltrain.ops.transfer import to_device
from vltrain.train.zero.cpu_adam import offloaded_adam
from vltrain.train.zero.ds_config import leaf_classes, offloads_optimizer, zero_stage

# DeepSpeed chooses its accelerator at import. Only then is the variable ours: found later, or by a child, it means that
# the user asks for one.
_chosen_by_user = "DS_ACCELERATOR" in os.environ
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
with prints_are_logged("DeepSpeed"):
    import deepspeed
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)  # fmt: skip

if not _chosen_by_user:
    del os.environ["DS_ACCELERATOR"]

# DeepSpeed would compile, for CPU ranks, an all-reduce over shared memory that only its inference calls. It leaves 69
# MB of memory behind for each rank that is killed, and the compiler's lock, for which later runs wait without end.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

OPTIMIZER_STATES = ("exp_avg", "exp_avg_sq")


def init_distributed(timeout_minutes: float = 30.0) -> tuple[int, int]:
    """Joins the process group that the launcher or srun describes; alone, makes one of a single process.

    Returns:
        (rank, world size)

    Raises:
        InputError: the environment contradicts itself, rank 0 cannot listen where it says, or the ranks are on GPUs of
            several models.
    """
    deepspeed_logger.setLevel(logging.INFO if keeps_log() else logging.WARNING)
    # DeepSpeed calls collectives by names that torch has begun to rename: true, and nothing a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    adopt_ranks()
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if dist.is_initialized():  # by the stage before, in the same processes
        return dist.get_rank(), dist.get_world_size()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    join_process_group(backend, timeout)
    require_one_model()
    with prints_are_logged("DeepSpeed"):
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    return dist.get_rank(), dist.get_world_size()


def shutdown_distributed() -> None:
    """Leaves the process group, so that no rank ends while another still needs it."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # DeepSpeed remembers the group, for a process that trains again.
        deepspeed.comm.comm.cdb = None
        deepspeed.utils.groups._WORLD_GROUP = None


def partitioner(ds_config: dict[str, Any]) -> Callable[[torch.nn.Module], None] | None:
    """For ZeRO-3 what partitions a module's parameters among the ranks, so that a model can be made part by part; None
    at other stages.

    A collective: all ranks call it with the same modules in the same order, in the process group of `init_distributed`.
    """
    if zero_stage(ds_config) < 3:
        return None

    def partition(module: torch.nn.Module) -> None:
        with prints_are_logged("DeepSpeed"):
            deepspeed.zero.Init(module=module, config_dict_or_path=ds_config)

    return partition


def gathered(parameter: torch.nn.Parameter) -> AbstractContextManager[Any]:
    """A context in which a parameter that ZeRO-3 partitions is gathered; afterwards it is what rank 0 made of it. A
    collective, then."""
    return (
        deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
        if hasattr(parameter, "ds_id")
        else nullcontext()
    )


class _InAutocast(torch.nn.Module):
    """What DeepSpeed wraps: the model, whose forward enters autocast by itself.

    Entered around DeepSpeed's forward, autocast would be in force on a CPU only: where the JSON has no `torch_autocast`
    section, DeepSpeed switches off an autocast that it finds, and it asks for CUDA's. Its own section would send
    gradients of linear layers in bf16.
    """

    def __init__(self, model: torch.nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.model = model
        self._autocast = autocast

    def forward(self, batch: Any, **options: Any) -> Any:
        with self._autocast():
            return self.model(batch, **options)


class Engine:
    """A model under DeepSpeed.

    Args:
        model: its trainable parameters are fp32 and already hold the values to start from; partitioned by `partitioner`
            or whole.
        groups: parameter groups, see `vltrain.train.optim.parameter_groups`.
        ds_config: resolved, see `vltrain.train.zero.ds_config.resolve_ds_config`.
        betas, eps: AdamW's.
        autocast_dtype: dtype of matrix products.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        groups: list[dict[str, Any]],
        ds_config: dict[str, Any],
        *,
        betas: tuple[float, float],
        eps: float,
        autocast_dtype: torch.dtype,
    ) -> None:
        self.stage = zero_stage(ds_config)
        self.device = device()
        self.precision = "fp32" if autocast_dtype == torch.float32 else "bf16"
        self._autocast_dtype = autocast_dtype
        # Full names, before ZeRO-3 turns parameters into shells.
        self.trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        for module in model.modules():  # DeepSpeed leaves them where they are if the parameters are partitioned already
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        gather_whole(model, leaf_classes(ds_config))
        optimizer = _build_optimizer(groups, ds_config, betas, eps)
        with prints_are_logged("DeepSpeed"):
            self._engine, *_ = deepspeed.initialize(
                model=_InAutocast(model, self.autocast), optimizer=optimizer, config=ds_config
            )
        self.model = model
        if self.stage == 3:
            for module in model.modules():
                for parameter in getattr(module, "borrowed_parameters", list)():
                    deepspeed.zero.register_external_parameter(module, parameter)
        self.world_size = dist.get_world_size()
        self._grad_norm: torch.Tensor | float = 0.0
        self._clips = ds_config.get("gradient_clipping", 0.0) > 0
        self.applied = True
        """Whether the last step was taken: ZeRO drops gradients whose norm is not finite, plain data parallelism with
        `only_finite`."""
        self.only_finite = False
        """Drop such gradients at stage 0 too, for which the host waits for the norm."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The AdamW inside ZeRO's wrapper; its groups' `lr` is what the next step uses."""
        return self._engine.basic_optimizer

    def autocast(self) -> torch.autocast:
        """The context that `forward` enters, and whoever calls parts of the model has to."""
        enabled = self._autocast_dtype != torch.float32
        return torch.autocast(
            self.device.type, dtype=self._autocast_dtype if enabled else torch.bfloat16, enabled=enabled
        )

    def forward(self, batch: Any, **options: Any) -> Any:
        """The model's output for one batch, in training mode. `options`: of the model's forward."""
        return self._engine(batch, **options)

    def backward(self, loss: torch.Tensor, *, last_micro_step: bool) -> None:
        """Adds the gradient of a global loss.

        Args:
            loss: this rank's share of a loss that is summed, not averaged, over ranks and micro-steps.
            last_micro_step: whether the step's gradients are complete after this and get reduced.
        """
        self._engine.set_gradient_accumulation_boundary(last_micro_step)
        # DeepSpeed averages gradients over ranks; the factor makes that a sum.
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self) -> None:
        """One optimizer step, after the last backward. `applied` tells whether it was taken."""
        self._step(apply=True)

    def drop_step(self) -> None:
        """Instead of `step`: the gradients are dropped; weights and optimizer states stay as they are."""
        self._step(apply=False)

    def _step(self, apply: bool) -> None:
        if self.stage == 0:
            gradients = [parameter.grad for parameter in self.trainable.values() if parameter.grad is not None]
            self._grad_norm = torch.nn.utils.get_total_norm(gradients)
            self.applied = apply and (not self.only_finite or bool(torch.isfinite(self._grad_norm)))
            if self.applied:
                self._engine.step()
            else:
                self._engine.zero_grad()
            return
        # Where nothing looks for an overflow, DeepSpeed before 0.19.8 would keep a dropped step's, and drop all that
        # follow.
        self._engine.optimizer.overflow = False
        with nullcontext() if apply else _dropping(self._engine.optimizer, self.stage):
            self._engine.step()
        self.applied = not self._engine.optimizer.overflow
        assert apply or not self.applied, "DeepSpeed took a step that it was told to drop"
        self._grad_norm = self._engine.get_global_grad_norm()
        if self.stage == 3:
            # It keeps the last step's gradient of a parameter that the next step does not reach (the ViT's, in a step
            # without images) and would use it again; the other stages take zeros.
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()

    def grad_norm(self) -> torch.Tensor | float:
        """Norm of the whole gradient of the last step, before clipping; a tensor where reading it would make the host
        wait."""
        return self._grad_norm

    def full_gradients(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor | None]]:
        """The whole fp32 gradient of trainable parameters (`names`; None: all), between the last backward and the step.
        A collective: all ranks iterate."""
        for name, parameter in self.trainable.items():
            if names is None or name in names:
                yield name, safe_get_full_grad(parameter)

    def full_weights(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole fp32 weight of the trainable parameters `names`, in the order of `full_gradients`. A collective:
        all ranks iterate."""
        for name, parameter in self.trainable.items():
            if name in names:
                weight = safe_get_full_fp32_param(parameter) if self.stage == 3 else parameter.detach()
                yield name, weight.view(getattr(parameter, "ds_shape", parameter.shape))

    @torch.no_grad()
    def keep_entries(self, name: str, kept: torch.Tensor) -> None:
        """Zeroes entries of a trainable parameter, between steps, in each copy that ZeRO keeps of it.

        Args:
            kept: bool, as many as it has entries: which ones stay.
        """
        parameter, kept = self.trainable[name], to_device(kept.flatten(), self.device)
        if self.stage == 3:
            part = self._own_part(parameter, kept)
            safe_set_local_fp32_param(parameter, safe_get_local_fp32_param(parameter) * part)
            parameter.ds_tensor.view(-1).mul_(part)
            if parameter.numel() != parameter.ds_numel:
                return  # it is whole nowhere; where ZeRO-3 keeps a small one whole, that is a third copy
        parameter.view(-1).mul_(kept)
        if self.stage in (1, 2):
            safe_set_full_fp32_param(parameter, parameter)

    def full_state(self) -> Iterator[tuple[str, torch.Tensor, dict[str, torch.Tensor]]]:
        """Every trainable parameter as (name, fp32 weight, {state: fp32 tensor}), whole and on the CPU.

        A collective: all ranks iterate to the end. One parameter is whole at a time, so memory stays small.
        """
        self._link_optimizer_states()
        for name, parameter in self.trainable.items():
            if self.stage == 0:
                weight, state = parameter.detach(), self.optimizer.state[parameter]
                states = {key: state[key] for key in OPTIMIZER_STATES}
            else:
                weight = safe_get_full_fp32_param(parameter)
                states = {key: safe_get_full_optimizer_state(parameter, key) for key in OPTIMIZER_STATES}
            shape = getattr(parameter, "ds_shape", parameter.shape)
            yield name, weight.cpu().view(shape), {key: value.cpu().view(shape) for key, value in states.items()}

    def load_optimizer_state(self, states: dict[str, dict[str, torch.Tensor]], step: int) -> None:
        """Puts AdamW's averages back, as they were after `step` steps.

        The weights must have been in the model before it was wrapped. Args:
            states: for each trainable parameter's full name its whole `exp_avg` and `exp_avg_sq`, fp32.
        """
        for tensor in self._optimizer_tensors():
            zeros = {key: torch.zeros_like(tensor, dtype=torch.float32) for key in OPTIMIZER_STATES}
            self.optimizer.state[tensor] = {"step": _step_like(self.optimizer, tensor, step), **zeros}
        self._link_optimizer_states()
        for name, parameter in self.trainable.items():
            for key in OPTIMIZER_STATES:
                if self.stage == 0:
                    self.optimizer.state[parameter][key].copy_(states[name][key])
                elif self.stage == 3:  # DeepSpeed's way to set a whole one fails where ranks cannot share it evenly
                    safe_set_local_optimizer_state(
                        parameter, self._own_part(parameter, states[name][key].to(self.device)), key
                    )
                else:
                    safe_set_full_optimizer_state(parameter, states[name][key].to(self.device), key)

    def _own_part(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        """Of a whole tensor the part that this rank has under ZeRO-3, flat; all parts are equally long, the last ones
        filled up with zeros."""
        length = parameter.ds_tensor.numel()
        part = value.flatten()[length * dist.get_rank() :][:length]
        return torch.nn.functional.pad(part, (0, length - len(part)))

    def _link_optimizer_states(self) -> None:
        """Tells ZeRO-1/2's parameters where their optimizer states are.

        DeepSpeed does that once, after the first group's first step, when the states of the other groups do not exist
        yet.
        """
        if self.stage in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _optimizer_tensors(self) -> list[torch.Tensor]:
        """The tensors that AdamW sees: the parameters at stage 0, else flat partitions of them."""
        if self.stage == 0:
            return list(self.trainable.values())
        wrapper = self._engine.optimizer
        return list(wrapper.single_partition_of_fp32_groups if self.stage < 3 else wrapper.fp32_partitioned_groups_flat)


@contextmanager
def _dropping(wrapper: Any, stage: int) -> Iterator[None]:
    """Lets ZeRO's wrapper find an overflow in its next step, on which it drops the gradients and cleans up after
    them."""
    name = "check_overflow" if stage < 3 else "_overflow_check_and_loss_scale_update"
    checks = stage < 3 and wrapper.check_grad_overflow

    def overflow(*_: Any, **__: Any) -> bool:
        wrapper.overflow = True
        return True

    setattr(wrapper, name, overflow)
    if stage < 3:
        wrapper.check_grad_overflow = True
    try:
        yield
    finally:
        delattr(wrapper, name)  # the instance's; the class's is seen again
        if stage < 3:
            wrapper.check_grad_overflow = checks


def _build_optimizer(
    groups: list[dict[str, Any]], ds_config: dict[str, Any], betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    if not offloads_optimizer(ds_config):
        return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=torch.cuda.is_available())
    return offloaded_adam(groups, betas, eps)


def _step_like(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, step: int) -> Any:
    """AdamW's step counter as its implementation keeps it: a tensor in torch's (on the parameter's device if fused), an
    int in CPUAdam."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return step
    fused = bool(optimizer.defaults.get("fused"))
    return torch.tensor(float(step), dtype=torch.float32, device=tensor.device if fused else "cpu")

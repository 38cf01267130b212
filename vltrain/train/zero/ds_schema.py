"""What DeepSpeed's JSON may say here: its keys by section, the type and range of each value, and which features are
refused.

DeepSpeed itself takes any key at the top and many wrong values, in silence. Its own models and constants are what this
is held against (`tests/train/zero/test_ds_schema.py`), since a recipe is checked where deepspeed is not imported. What
would change the numbers that are computed (quantised or 16-bit communication, curricula, compression), or do what the
recipe does already, may only be switched off.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vltrain.config.ranges import Range
from vltrain.errors import InputError

AUTO = "auto"
_MOST = 2**53


@dataclass(frozen=True)
class Value:
    """A value of the JSON. `auto`: may be left to the recipe or the model; `only`: what it must be, and `why`."""

    kind: type | tuple[type, ...]
    allowed: Range | tuple[Any, ...] | None = None
    auto: bool = False
    only: Any = None
    why: str = ""


@dataclass(frozen=True)
class Off:
    """A section of DeepSpeed's that may be there only switched off. `why` it is refused."""

    why: str


FLAG = Value(bool)
COUNT, SIZE, NUMBER = Value(int, Range(0, _MOST)), Value(int, Range(1, _MOST)), Value((int, float), Range(0, 1e9))
_BATCH = Value(int, Range(1, 2**40), auto=True)
_PRECISION = "precision belongs to the recipe (train.precision)"
_CHANGES = "it changes what is computed, and was not proven here"
_OWN = "vltrain does that itself"


def _off(value: Any, why: str = _CHANGES) -> Value:
    return Value(type(value) if not isinstance(value, float) else (int, float), only=value, why=why)


_DEVICE = Value(str, ("none", "cpu"))
_NVME = "it has no effect: offload goes to the CPU's memory only"
_OFFLOAD_PARAM: dict[str, Any] = {
    "device": _DEVICE,
    "pin_memory": FLAG,
    "buffer_count": _off(5, _NVME),
    "buffer_size": _off(100_000_000, _NVME),
    "max_in_cpu": _off(1_000_000_000, _NVME),
    "nvme_path": Value(str, (), why=_NVME),
}
_OFFLOAD_OPTIMIZER: dict[str, Any] = {
    "device": _DEVICE,
    "pin_memory": FLAG,
    "buffer_count": _off(4, _NVME),
    "fast_init": _off(False, _NVME),
    "nvme_path": Value(str, (), why=_NVME),
    "pipeline_read": _off(False),
    "pipeline_write": _off(False),
    "ratio": _off(1.0),
    "super_offload": _off(False),
    "cpuadam_cores_perc": _off(0.8, "it has no effect without super_offload"),
}
ZERO: dict[str, Any] = {
    "stage": Value(int, Range(0, 3)),
    "contiguous_gradients": FLAG,
    "reduce_scatter": FLAG,
    "use_multi_rank_bucket_allreduce": FLAG,
    "allgather_partitions": _off(True, "it has no effect: DeepSpeed gathers in any case"),
    "overlap_comm": FLAG,
    "round_robin_gradients": FLAG,
    "ignore_unused_parameters": FLAG,
    "load_from_fp32_weights": _off(True),
    "log_trace_cache_warnings": FLAG,
    "enable_sanity_checks": FLAG,
    "reduce_bucket_size": Value(int, Range(1, _MOST), auto=True),
    "allgather_bucket_size": Value(int, Range(2, _MOST), auto=True),
    "sub_group_size": SIZE,
    "stage3_prefetch_bucket_size": COUNT,
    "stage3_param_persistence_threshold": COUNT,
    "stage3_model_persistence_threshold": Value(int, Range(0, 2**63 - 1)),
    "stage3_max_live_parameters": COUNT,
    "stage3_max_reuse_distance": COUNT,
    "stage3_gather_16bit_weights_on_model_save": _off(
        False, "it has no effect: checkpoints are vltrain's own, whole and in fp32"
    ),
    "stage3_module_granularity_threshold": _off(
        0, "it makes modules leaves by their size, with which DeepSpeed 0.19 crashed when it was tried"
    ),
    "stage3_use_all_reduce_for_fetch_params": FLAG,
    "stage3_allgather_sequential": FLAG,
    "offload_param": _OFFLOAD_PARAM,
    "offload_optimizer": _OFFLOAD_OPTIMIZER,
    "memory_efficient_linear": FLAG,
    "zero_hpz_partition_size": _off(1, "weights in 16 bits would be kept twice, which was not proven here"),
    "zero_quantized_weights": _off(False),
    "zero_quantized_nontrainable_weights": _off(False),
    "zero_quantized_gradients": _off(False),
    "zenflow": Off(_CHANGES),
    "compute_grad_norm": _off(True, "clipping and the log need the gradient's norm"),
    "elastic_checkpoint": _off(False, "checkpoints are vltrain's own"),
    "pipeline_loading_checkpoint": _off(False, "checkpoints are vltrain's own"),
    "legacy_stage1": _off(False),
    "override_module_apply": _off(True),
    "parameter_alignment": _off(False),
    "save_muon_momentum_buffer_in_memory": _off(False),
    "leaf_module": {"classes": Value(list, auto=True)},
    "mics_shard_size": _off(-1),
    "mics_hierarchical_params_gather": _off(False),
    **{
        old: Off(f"it is an older name; take {new}")
        for old, new in (
            ("cpu_offload", "offload_optimizer"),
            ("cpu_offload_param", "offload_param"),
            ("cpu_offload_use_pin_memory", "offload_optimizer.pin_memory"),
            ("stage3_gather_fp16_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save"),
        )
    },
}
# Keys of `zero_optimization` that DeepSpeed reads at some stages alone: these stages, and its default, which may be
# said at any stage.
OF_STAGES: dict[str, tuple[tuple[int, ...], Any]] = {
    **dict.fromkeys(("contiguous_gradients", "reduce_scatter"), ((1, 2, 3), True)),
    "overlap_comm": ((1, 2, 3), False),
    "reduce_bucket_size": ((1, 2, 3), 500_000_000),
    "allgather_bucket_size": ((1, 2), 500_000_000),
    **dict.fromkeys(("use_multi_rank_bucket_allreduce", "ignore_unused_parameters"), ((1, 2), True)),
    "round_robin_gradients": ((1, 2), False),
    "stage3_prefetch_bucket_size": ((3,), 50_000_000),
    "stage3_param_persistence_threshold": ((3,), 100_000),
    "stage3_model_persistence_threshold": ((3,), 2**63 - 1),
    "sub_group_size": ((3,), 1_000_000_000),
    **dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), ((3,), 1_000_000_000)),
    **dict.fromkeys(
        (
            "stage3_use_all_reduce_for_fetch_params",
            "stage3_allgather_sequential",
            "log_trace_cache_warnings",
            "enable_sanity_checks",
        ),
        ((3,), False),
    ),
}
_FP16 = (
    "auto_cast",
    "loss_scale",
    "initial_scale_power",
    "loss_scale_window",
    "hysteresis",
    "consecutive_hysteresis",
    "min_loss_scale",
    "fp16_master_weights_and_grads",
)
_BF16 = ("immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads", "bf16_optimizer_states")
_ANY = Value((bool, int, float, str, list), auto=True)  # of a section that is switched off


def _switched_off(*names: str) -> dict[str, Any]:
    return {"enabled": Value(bool, auto=True), **dict.fromkeys(names, _ANY)}


SCHEMA: dict[str, Any] = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "gradient_clipping": Value((int, float), Range(0, 1e9), auto=True),
    "steps_per_print": Value(int, Range(1, 2**53)),
    "prescale_gradients": FLAG,
    "gradient_predivide_factor": NUMBER,
    "wall_clock_breakdown": FLAG,
    "memory_breakdown": FLAG,
    "dump_state": FLAG,
    "disable_allgather": _off(False),
    "disable_python_gc": FLAG,
    "zero_optimization": ZERO,
    "optimizer": {"type": Value(str, auto=True), "params": None, "legacy_fusion": _off(False)},
    "scheduler": {"type": Value(str, auto=True), "params": None},
    "bf16": _switched_off(*_BF16),
    "bfloat16": _switched_off(*_BF16),
    "fp16": _switched_off(*_FP16),
    "torch_autocast": _switched_off("dtype", "lower_precision_safe_modules"),
    "zero_allow_untested_optimizer": FLAG,
    "zero_force_ds_cpu_optimizer": FLAG,
    "log_level": Value(str),
    "communication_data_type": _off("fp32", "gradients are summed in fp32, whatever the products are in"),
    "seq_parallel_communication_data_type": _off("fp32"),
    "gradient_allreduce_op": _off("mean"),
    "sparse_gradients": _off(False),
    "managed_gradient_accumulation": _off(True),
    "data_types": {"grad_accum_dtype": _off("fp32", "gradients are summed in fp32")},
    "flops_profiler": {
        "enabled": FLAG,
        "recompute_fwd_factor": NUMBER,
        "profile_step": COUNT,
        "module_depth": Value(int, Range(-1, 1e6)),
        "top_modules": SIZE,
        "detailed": FLAG,
        "output_file": Value(str),
    },
    "comms_logger": {"enabled": FLAG, "verbose": FLAG, "prof_all": FLAG, "debug": FLAG, "prof_ops": Value(list)},
    "timers": {"throughput": {"enabled": FLAG, "synchronized": FLAG}},
    "amp": Off(_PRECISION),
    "activation_checkpointing": Off("it has no effect; set train.activation_checkpointing"),
    "compile": Off("it has no effect; set train.compile"),
    "aio": Off("it has no effect: offload goes to the CPU's memory only"),
    "checkpoint": Off("checkpoints are vltrain's own"),
    "nebula": Off("checkpoints are vltrain's own"),
    "datastates_ckpt": Off("checkpoints are vltrain's own"),
    "dataloader_drop_last": _off(False, "the recipe assigns data to ranks"),
    "vocabulary_size": Off("it has no effect"),
    **dict.fromkeys(
        ("tensorboard", "wandb", "csv_monitor", "comet"),
        Off("its figures would be of the loss before it is normalised; vltrain writes TensorBoard"),
    ),
    **dict.fromkeys(
        (
            "curriculum_learning",
            "data_efficiency",
            "elasticity",
            "compression_training",
            "progressive_layer_drop",
            "sparse_attention",
            "eigenvalue",
            "quantize_training",
            "weight_quantization",
            "hybrid_engine",
            "autotuning",
            "pipeline",
            "tensor_parallel",
            "expert_parallel",
            "use_data_before_expert_parallelism",
            "sequence_parallel_size",
        ),
        Off(_CHANGES),
    ),
}


def check_ds_json(raw: Mapping[str, Any]) -> None:
    """Raises InputError for an unknown key at any depth, a value of a wrong type or out of its range, one without
    effect at the stage, and a feature that is refused."""
    _check_section(raw, SCHEMA, "")
    _check_stage(raw.get("zero_optimization", {}))


def _check_stage(zero: Mapping[str, Any]) -> None:
    """Buckets beside `"stage": 0` are a section that is switched off; without `stage`, which means 0 too, that may not
    be what was meant."""
    stage = zero.get("stage", 0)
    checked = {
        name: known for name, known in OF_STAGES.items() if stage != 0 or "stage" not in zero or known[0] != (1, 2, 3)
    }
    for name, (stages, default) in {
        **checked,
        "offload_param": ((3,), "none"),
        "offload_optimizer": ((1, 2, 3), "none"),
    }.items():
        found = zero.get(name, default)
        value = found.get("device", default) if isinstance(found, Mapping) else found
        if stage not in stages and value not in (AUTO, default):
            key = f"{name}.device" if isinstance(found, Mapping) else name
            message = (
                f"DeepSpeed's 'zero_optimization.{key}' is {_json(value)}, which has no effect: it is of stage "
                f"{' or '.join(map(str, stages))}"
            )
            raise InputError(f"{message}, and zero_optimization.stage is {stage}; leave it out, or take another stage")


def _check_section(found: Any, schema: Mapping[str, Any], prefix: str) -> None:
    if not isinstance(found, dict):
        raise InputError(f"DeepSpeed's '{prefix.rstrip('.')}' is {found!r:.80}, expected an object")
    for name, value in found.items():
        key = f"{prefix}{name}"
        if name not in schema:
            raise InputError(f"DeepSpeed's '{key}' is not a key of its JSON{_hint(name, prefix, schema)}")
        known = schema[name]
        if known is None:
            if not isinstance(value, dict):
                raise InputError(f"DeepSpeed's '{key}' is {value!r:.80}, expected an object")
        elif isinstance(known, dict):
            _check_section(value, known, f"{key}.")
        elif isinstance(known, Off):
            if not _is_off(value):
                raise InputError(f"DeepSpeed's '{key}' is {value!r:.80}, which is refused: {known.why}; leave it out")
        else:
            _check_value(key, value, known)


def _is_off(value: Any) -> bool:
    """Whether a section says that it is switched off."""
    if isinstance(value, dict):
        return not value or value.get("enabled") is False
    return value is None or value is False


def _check_value(key: str, value: Any, known: Value) -> None:
    if value == AUTO and known.auto:
        return
    if value == AUTO and known.only is None and str not in _kinds(known):
        raise InputError(
            f"DeepSpeed's '{key}' says \"auto\", but neither the recipe nor the model fills it; give a value or "
            "remove it"
        )
    if int in _kinds(known) and isinstance(value, float) and value.is_integer():
        value = int(value)  # 2e8, as DeepSpeed's own examples write it
    fits = type(value) in _kinds(known)
    if known.only is not None:
        if not fits or value != known.only:
            raise InputError(
                f"DeepSpeed's '{key}' is {value!r:.80}, expected {_json(known.only)}: {known.why}; leave it out"
            )
        return
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}
    if not fits:
        raise InputError(
            f"DeepSpeed's '{key}' is {value!r:.80}, expected "
            f"{words[_kinds(known)[-1]]}{' or auto' if known.auto else ''}"
        )
    if isinstance(known.allowed, tuple) and value not in known.allowed:
        expected = " or ".join(map(_json, known.allowed)) or f"nothing: {known.why}"
        raise InputError(f"DeepSpeed's '{key}' is {value!r:.80}, expected {expected}")
    if isinstance(known.allowed, Range):
        known.allowed.require(f"DeepSpeed's '{key}'", value)


def _kinds(known: Value) -> tuple[type, ...]:
    return known.kind if isinstance(known.kind, tuple) else (known.kind,)


def _json(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def all_keys(schema: Mapping[str, Any] = SCHEMA, prefix: str = "") -> Iterator[str]:
    """Every known key, dotted."""
    for name, known in schema.items():
        yield f"{prefix}{name}"
        if isinstance(known, dict):
            yield from all_keys(known, f"{prefix}{name}.")


def _hint(name: str, prefix: str, schema: Mapping[str, Any]) -> str:
    """The same word elsewhere, or the nearest key of the section or of them all."""
    elsewhere = [key for key in all_keys() if key.rpartition(".")[2] == name]
    near = difflib.get_close_matches(name, schema, n=1, cutoff=0.6)
    anywhere = difflib.get_close_matches(f"{prefix}{name}", list(all_keys()), n=1, cutoff=0.6)
    found = [f"{prefix}{word}" for word in near] or elsewhere or anywhere
    return (
        f"; did you mean {' or '.join(f'{key!r}' for key in found)}?"
        if found
        else f"; known here: {', '.join(sorted(schema))}"
    )

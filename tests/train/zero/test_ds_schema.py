"""The keys of DeepSpeed's JSON that are known here, against DeepSpeed's own models and constants."""

import json
from pathlib import Path

import pytest
from deepspeed.runtime import constants
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from vltrain.config.schema import Config
from vltrain.errors import InputError
from vltrain.train.zero.ds_config import load_ds_json, resolve_ds_config
from vltrain.train.zero.ds_schema import OF_STAGES, SCHEMA, ZERO, Off, Value, all_keys, check_ds_json

SHIPPED = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))
MODELS = {
    "zero_optimization": (DeepSpeedZeroConfig, ZERO),
    "zero_optimization.offload_optimizer": (DeepSpeedZeroOffloadOptimizerConfig, ZERO["offload_optimizer"]),
    "zero_optimization.offload_param": (DeepSpeedZeroOffloadParamConfig, ZERO["offload_param"]),
}


@pytest.mark.parametrize("section", MODELS)
def test_every_field_of_deepspeeds_is_known(section):
    model, known = MODELS[section]
    theirs = {field.alias or name for name, field in model.model_fields.items()}
    assert theirs <= known.keys(), theirs - known.keys()


def test_sections_of_deepspeeds_are_known():
    """The constants that name a key of the top level, as far as they can be told from those of sections."""
    names = (
        "TRAIN_BATCH_SIZE",
        "OPTIMIZER",
        "SCHEDULER",
        "STEPS_PER_PRINT",
        "TRAIN_MICRO_BATCH_SIZE_PER_GPU",
        "GRADIENT_ACCUMULATION_STEPS",
        "TORCH_AUTOCAST",
        "GRADIENT_CLIPPING",
        "COMMUNICATION_DATA_TYPE",
        "PRESCALE_GRADIENTS",
        "GRADIENT_PREDIVIDE_FACTOR",
        "DISABLE_ALLGATHER",
        "DUMP_STATE",
        "VOCABULARY_SIZE",
        "WALL_CLOCK_BREAKDOWN",
        "MEMORY_BREAKDOWN",
        "CHECKPOINT",
        "DATA_TYPES",
        "DATALOADER_DROP_LAST",
        "USE_DATA_BEFORE_EXPERT_PARALLEL",
        "ZERO_ALLOW_UNTESTED_OPTIMIZER",
        "ZERO_FORCE_DS_CPU_OPTIMIZER",
        "SPARSE_GRADIENTS",
    )
    found = {value for name in names if isinstance(value := getattr(constants, name, None), str)}
    assert len(found) > 15 and found <= SCHEMA.keys(), found - SCHEMA.keys()


@pytest.mark.parametrize("key", [key for key in ZERO if isinstance(ZERO[key], Value) and ZERO[key].only is None])
def test_what_is_taken_deepspeed_takes(key):
    known = ZERO[key]
    value = known.allowed.low if known.allowed is not None else False
    if key == "stage":
        value = 2
    assert getattr(DeepSpeedZeroConfig(**{key: value}), key.removeprefix("stage3_"), value) == value
    stage = value if key == "stage" else OF_STAGES.get(key, ((2,),))[0][-1]
    check_ds_json({"zero_optimization": {key: value, "stage": stage}})


@pytest.mark.parametrize("key", OF_STAGES)
def test_defaults_that_may_be_said_at_any_stage_are_deepspeeds(key):
    stages, default = OF_STAGES[key]
    assert (
        DeepSpeedZeroConfig(stage=stages[0]).model_dump()[
            key if key in DeepSpeedZeroConfig.model_fields else key.removeprefix("stage3_")
        ]
        == default
    )
    assert stages == (1, 2, 3) or check_ds_json({"zero_optimization": {"stage": 0, key: default}}) is None


def test_a_feature_may_be_switched_off():
    off = {name: {"enabled": False} for name, known in SCHEMA.items() if isinstance(known, Off)}
    check_ds_json({**off, "zero_optimization": {"zero_quantized_gradients": False, "mics_shard_size": -1}})


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_value_anywhere_is_taken_or_refused(data):
    """A known key with a value of any type, in a shipped file."""
    raw = json.loads(data.draw(st.sampled_from(SHIPPED)).read_text())
    *outer, last = data.draw(st.sampled_from(sorted(all_keys()))).split(".")
    section = raw
    for part in outer:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            return
    section[last] = data.draw(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(max_size=5)
        | st.just("auto")
        | st.lists(st.integers(), max_size=2)
    )
    try:
        assert isinstance(resolve_ds_config(raw, Config(), 2, 1000), dict)
    except InputError as error:
        assert "\n" not in str(error)


def test_a_file_of_transformers_documentation_passes(tmp_path):
    """ZeRO-2 as it is written for other trainers, its precision left to the recipe."""
    text = {
        "fp16": {
            "enabled": "auto",
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 16,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "type": "auto",
            "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
        },
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "allgather_partitions": True,
            "allgather_bucket_size": 2e8,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 2e8,
            "contiguous_gradients": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    (tmp_path / "ds.json").write_text(json.dumps(text))
    resolve_ds_config(load_ds_json(tmp_path / "ds.json"), Config(), 2, 1000)

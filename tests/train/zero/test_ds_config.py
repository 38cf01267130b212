"""DeepSpeed's JSON against the recipe: every shipped file resolves, every contradiction is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from vltrain.config.model.mmt import MmtConfig
from vltrain.config.schema import Config, OptimConfig, TrainConfig
from vltrain.errors import InputError
from vltrain.train.zero.ds_config import LARGEST_BUCKETS, fill_in, leaf_classes, load_ds_json, resolve_ds_config

SHIPPED = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))
CONFIG = Config(train=TrainConfig(packs_per_step=6), optim=OptimConfig(lr=2e-3, clip=1.0))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_resolve_to_numbers(path):
    resolved = resolve_ds_config(load_ds_json(path), CONFIG, world_size=4, num_trained=4_559_872)
    assert "auto" not in json.dumps(resolved)
    assert (
        resolved["gradient_accumulation_steps"] == 2
    )  # 6 packs on 4 ranks: two micro-steps, two of the eight places are fillers
    assert resolved["train_batch_size"] == 8
    assert resolved["gradient_clipping"] == 1.0


def test_the_five_named_files_exist():
    assert {path.stem for path in SHIPPED} >= {"zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"}


def test_the_users_dict_is_left_alone():
    raw = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "zero_optimization": {"stage": 2}}
    before = json.dumps(raw)
    resolve_ds_config(raw, CONFIG, world_size=1)
    assert json.dumps(raw) == before


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"train_batch_size": 7}, ["train_batch_size", "7", "6"]),
        ({"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps", "train.packs_per_step"]),
        ({"train_micro_batch_size_per_gpu": 2}, ["train_micro_batch_size_per_gpu", "data.pack_length"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping", "optim.clip"]),
        ({"optimizer": {"type": "Lion"}}, ["Lion", "AdamW"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, ["optim.lr", "0.002"]),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, ["torch_adam", "no effect"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}, ["scheduler", "no effect"]),
        ({"bf16": {"enabled": True}}, ["bf16", "train.precision"]),
        ({"fp16": {"enabled": True}}, ["fp16", "train.precision"]),
        ({"prescale_gradients": True}, ["prescale_gradients"]),
        ({"zero_optimization": {"stage": 4}}, ["stage", "4"]),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer", "stage"]),
        (
            {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto"}},
            ["zero_optimization.stage3_prefetch_bucket_size", "auto"],
        ),
        (
            {"reduce_bucket_size": "auto"},
            ["'reduce_bucket_size'", "did you mean 'zero_optimization.reduce_bucket_size'"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_contradictions_are_refused_by_name(section, named):
    with pytest.raises(InputError) as caught:
        resolve_ds_config(section, CONFIG, world_size=2)
    for word in named:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("num_trained", "reduce", "allgather"),
    [
        (4_559_872, 4_559_872, 4_559_872),
        (7, 8, 8),
        (0, 2, 2),
        (186_000_001, 50_000_000, 186_000_002),
        (7_000_000_000, 50_000_000, 200_000_000),
    ],
)
def test_buckets_follow_what_is_trained(num_trained: int, reduce: int, allgather: int) -> None:
    """In whole pairs, and never larger than for a model that is tuned whole."""
    for raw in (load_ds_json(None), *map(load_ds_json, SHIPPED)):
        before = json.dumps(raw)
        zero = resolve_ds_config(raw, CONFIG, world_size=2, num_trained=num_trained)["zero_optimization"]
        assert zero["reduce_bucket_size"] == reduce and zero.get("allgather_bucket_size", allgather) == allgather
        assert fill_in(raw, num_trained)["zero_optimization"] == {
            **raw["zero_optimization"],
            **{key: zero[key] for key in (*LARGEST_BUCKETS, "leaf_module") if key in zero},
        }
        assert json.dumps(raw) == before


def test_buckets_with_numbers_stay_and_without_a_model_stay_open() -> None:
    zero = {"stage": 2, "reduce_bucket_size": 500, "allgather_bucket_size": "auto"}
    assert resolve_ds_config({"zero_optimization": zero}, CONFIG, 2, 1000)["zero_optimization"] == {
        **zero,
        "allgather_bucket_size": 1000,
    }
    assert resolve_ds_config({"zero_optimization": zero}, CONFIG, 2)["zero_optimization"] == zero
    assert fill_in({}, 1000) == {}


BLOCKS = {"LlamaDecoderLayer"}


@pytest.mark.parametrize(
    ("said", "leaves"),
    [({}, ["LlamaDecoderLayer"]), ({"leaf_module": {"classes": "auto"}}, ["LlamaDecoderLayer"]),
     ({"leaf_module": {"classes": []}}, [])],
)  # fmt: skip
def test_zero3_gathers_blocks_whole_unless_told_otherwise(said: dict[str, Any], leaves: list[str]) -> None:
    raw = {"zero_optimization": {"stage": 3, **said}}
    assert leaf_classes(resolve_ds_config(raw, CONFIG, 2, 1000, BLOCKS)) == leaves
    assert "leaf_module" not in resolve_ds_config(raw, CONFIG, 2)["zero_optimization"], "no model, so no blocks yet"
    assert "leaf_module" not in resolve_ds_config(load_ds_json(None), CONFIG, 2, 1000, BLOCKS)["zero_optimization"]


def test_leaves_are_blocks_of_the_llm_at_zero3_alone() -> None:
    leaves = {"leaf_module": {"classes": ["CLIPEncoderLayer"]}}
    with pytest.raises(InputError, match="found 'CLIPEncoderLayer', expected LlamaDecoderLayer"):
        resolve_ds_config({"zero_optimization": {"stage": 3, **leaves}}, CONFIG, 2, 1000, BLOCKS)
    with pytest.raises(InputError, match="leaf_module"):
        resolve_ds_config({"zero_optimization": {"stage": 2, **leaves}}, CONFIG, 2)


def test_equal_numbers_are_accepted():
    raw = {
        "train_batch_size": 6,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "betas": [0.9, 0.95]}},
    }
    assert resolve_ds_config(raw, CONFIG, world_size=2)["train_batch_size"] == 6


@pytest.mark.parametrize(("text", "named"), [("{", "not JSON"), ("[1]", "list"), ('{"a": 1, "a": 2}', "a second time")])
def test_broken_files(tmp_path, text, named):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(InputError, match=named):
        load_ds_json(path)


def test_missing_file_names_itself(tmp_path):
    with pytest.raises(InputError, match="nowhere.json"):
        load_ds_json(tmp_path / "nowhere.json")


@pytest.mark.parametrize("bits", [4, 8])
def test_zero3_does_not_take_packed_weights(bits):
    packed = Config(model=MmtConfig(bits=bits))
    with pytest.raises(InputError, match=f"stage' is 3 and model.bits is {bits}: .*take stage 2"):
        resolve_ds_config({"zero_optimization": {"stage": 3}}, packed, world_size=2)
    resolve_ds_config({"zero_optimization": {"stage": 2}}, packed, world_size=2)
    resolve_ds_config({"zero_optimization": {"stage": 3}}, Config(model=MmtConfig(bits=16)), world_size=2)

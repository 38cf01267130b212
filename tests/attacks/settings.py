"""Numbers that no recipe, table, command line or option of a source may hold, and DeepSpeed's JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from torch import nn, zeros

from tests.attacks.attack import Shown, attack, refused, refuses, right
from tests.attacks.inputs import pack_words, prepare_words, sample, write_jsonl
from vltrain.config.keys import known_keys
from vltrain.config.recipe import read_table
from vltrain.config.schema import OptimConfig
from vltrain.train.determinism import step_seed
from vltrain.train.optim import parameter_groups
from vltrain.train.zero.ds_schema import check_ds_json

ZERO = "0 taken for 'not set', numbers without a range"
NO_NUMBER = "infinity, NaN and true are no numbers"


def plan(*words: str) -> list[str]:
    """A command line that reads settings; what is wrong with them is told before anything is built."""
    return ["plan", "quickstart", *words]


def is_numeric(annotation: Any) -> bool:
    """Whether a setting of that type can be a number that the type alone does not list."""
    return annotation in (int, float) or (
        get_origin(annotation) is not Literal and any(map(is_numeric, get_args(annotation)))
    )


def recipe(folder: Path, text: str) -> list[str]:
    (folder / "r.yaml").write_text(text)
    return ["plan", str(folder / "r.yaml")]


@attack(ZERO)
def vision_lr_zero(folder: Path) -> Shown:
    """A learning rate of 0 for the ViT, to freeze it, which was read as "not set"."""
    return refused(
        plan("--model.vision.train", "true", "--optim.vision_lr", "0"),
        "optim.vision_lr: found 0.0",
        "(0, 10]",
        "model.vision.train",
    )


@attack(ZERO)
def llm_lr_negative(folder: Path) -> Shown:
    """A negative learning rate for the LLM, which climbs."""
    return refused(
        plan("--model.llm.train", "true", "--optim.llm_lr", "-1e-4"), "optim.llm_lr: found -0.0001", "or null"
    )


@attack(ZERO)
def own_rates_are_used(folder: Path) -> Shown:
    """Rates of its own for each network, the smallest that a number can be among them."""
    made = {name: nn.Parameter(zeros(2, 2)) for name in ("vision.w", "llm.w", "neck.w")}
    groups = parameter_groups(
        made.items(), OptimConfig(lr=1e-3, vision_lr=5e-324, llm_lr=1.0), lambda name: name.partition(".")[0]
    )
    rates = {next(name for name in made if made[name] is group["params"][0]): group["lr"] for group in groups}
    assert rates == {"vision.w": 5e-324, "llm.w": 1.0, "neck.w": 1e-3}
    return right("each network has the rate that was said")


@attack(ZERO)
def every_number_has_a_range(folder: Path) -> Shown:
    """Each numeric key of a recipe, set to what no setting can be."""
    for key, known in known_keys().items():
        if is_numeric(known.annotation):
            assert known.range is not None, f"{key} has no range"
            for value in (known.range.low - 1, known.range.high * 4, float("inf"), float("nan"), True):
                values = (value, value) if isinstance(known.default, tuple) else value
                refuses(lambda: known.range.require(key, values), f"{key}: found")
            assert known.range.holds(known.default), key
    return right(
        f"{sum(known.range is not None for known in known_keys().values())} numbers have a range, their defaults in it"
    )


@attack(ZERO)
def betas_of_one(folder: Path) -> Shown:
    """A second beta of 1, with which AdamW divides by zero."""
    return refused(plan("--optim.betas", "[0.9, 1.0]"), "optim.betas: found [0.9, 1.0]", "[0, 1)")


@attack(ZERO)
def eps_of_zero(folder: Path) -> Shown:
    """An epsilon that is zero in fp32: 0 / 0 where a gradient is zero."""
    return refused(recipe(folder, "optim: {eps: 1e-60}"), "r.yaml: optim.eps: found 1e-60")


@attack(ZERO)
def negative_decay(folder: Path) -> Shown:
    """A negative weight decay, which lets weights grow."""
    return refused(recipe(folder, "optim: {weight_decay: -0.02}"), "r.yaml: optim.weight_decay: found -0.02")


@attack(ZERO)
def negative_seed(folder: Path) -> Shown:
    """A negative seed, which numpy refuses once data is drawn."""
    return refused(plan("--train.seed", "-1"), "train.seed: found -1")


@attack(ZERO)
def seed_of_twenty_digits(folder: Path) -> Shown:
    """A seed that no generator takes."""
    return refused(recipe(folder, f"model: {{seed: {10**20}}}"), "model.seed: found 100000000000000000000")


@attack(ZERO)
def seed_that_is_a_date(folder: Path) -> Shown:
    """Seeds of more than 24 bits, which overflowed torch's generator at the first step."""
    seeds = [0, 7, 2**24 - 1, 20260101, 20260102, 2**63 - 1]
    made = [step_seed(seed, 10**6, 511) for seed in seeds]
    assert len(set(made)) == len(seeds) and all(0 <= one < 2**64 for one in made)
    assert step_seed(7, 3, 1) == (7 << 40) + (3 << 16) + 1
    return right("every seed of a recipe fits into torch's 64 bits; small ones as before")


@attack(ZERO)
def temperature_of_almost_zero(folder: Path) -> Shown:
    """A temperature by which logits overflow."""
    return refused(plan("--eval.temperature", "1e-320"), "eval.temperature", "0 or a number in [0.001, 1000]")


@attack(ZERO)
def workers_by_mistake(folder: Path) -> Shown:
    """A million processes a rank."""
    return refused(plan("--data.workers", "1000000"), "data.workers: found 1000000", "[0, 1024]")


@attack(ZERO)
def images_none_at_all(folder: Path) -> Shown:
    """0 images a pack, where null means no bound."""
    return refused(plan("--data.max_images", "0"), "data.max_images: found 0")


@attack(ZERO)
def rank_of_a_billion(folder: Path) -> Shown:
    """A rank that no machine holds."""
    return refused(
        recipe(folder, "model: {llm: {peft: {kind: lora, rank: 1000000000}}}"), "model.llm.peft.rank: found 1000000000"
    )


@attack(ZERO)
def neck_of_width_zero(folder: Path) -> Shown:
    """A hidden width of 0: an image would reach nothing."""
    return refused(plan("--model.neck.dim", "0"), "model.neck.dim: found 0")


@attack(ZERO)
def evaluated_samples_zero(folder: Path) -> Shown:
    """No questions at all, where null means all of them."""
    return refused(plan("--eval.max_samples", "0"), "eval.max_samples: found 0")


@attack(ZERO)
def a_tables_questions(folder: Path) -> Shown:
    """A table's own section has numbers, too."""
    text = "output: runs/x\nablation: {max_samples: -3}\nrows: {a: {train: {seed: 1}}}\n"
    (folder / "t.yaml").write_text(text)
    return refuses(lambda: read_table(folder / "t.yaml"), "t.yaml: ablation.max_samples: found -3")


@attack(ZERO)
def pack_workers_negative(folder: Path) -> Shown:
    """Command lines of the data programs: a negative number of processes."""
    samples = write_jsonl(folder / "s.jsonl", [sample()])
    return refused(
        [*pack_words(samples, folder / "packs"), "--workers", "-2"], "--workers", "found -2", untouched=folder
    )


@attack(ZERO)
def pack_seed_negative(folder: Path) -> Shown:
    """Command lines of the data programs: a negative seed."""
    samples = write_jsonl(folder / "s.jsonl", [sample()])
    return refused(pack_words(samples, folder / "packs", "--seed", "-1"), "--seed", "found -1", untouched=folder)


@attack(ZERO)
def option_of_a_source(folder: Path) -> Shown:
    """An option of a source that is out of its range."""
    return refused(
        prepare_words("shapes", None, folder / "out", "image_size=1000000"),
        "'image_size': found 1000000",
        untouched=folder,
    )


@attack(NO_NUMBER)
def infinite_in_a_free_mapping(folder: Path) -> Shown:
    """Infinity in `model.llm.config`, whose keys are transformers'."""
    text = "model: {llm: {source: null, tokenizer: t, config: {hidden_size: 32, rms_norm_eps: .inf}}}"
    return refused(recipe(folder, text), "r.yaml: model.llm.config: found", "finite numbers")


@attack(NO_NUMBER)
def nan_deep_in_options(folder: Path) -> Shown:
    """NaN in a list in a mapping of a source's options."""
    return refused(plan("--data.options", "{a: [{b: .nan}]}"), "data.options", "finite numbers")


@attack(NO_NUMBER)
def nan_on_the_command_line(folder: Path) -> Shown:
    """NaN for a key inside a mapping."""
    return refused(plan("--model.llm.config.rms_norm_eps", ".nan"), "model.llm.config", "finite numbers")


@attack(NO_NUMBER)
def true_as_a_number(folder: Path) -> Shown:
    """true, which Python takes for 1."""
    return refused(recipe(folder, "optim: {lr: true}"), "r.yaml: optim.lr: found True")


@attack(NO_NUMBER)
def half_an_image(folder: Path) -> Shown:
    """An option of a source that was cut to a whole number, or read from true."""
    from data_prep.sources.options import resolve_options

    refuses(lambda: resolve_options("shapes", {"n": True}, {"n": 2}), "option 'n': found True")
    return refuses(lambda: resolve_options("shapes", {"n": 2.7}, {"n": 2}), "option 'n': found 2.7, expected int")


@attack(NO_NUMBER)
def infinite_fraction(folder: Path) -> Shown:
    """A fraction that is not one, as an option of a source."""
    given = write_jsonl(folder / "c.json", ["[]"])
    return refused(
        prepare_words("llava_json", given, folder / "out", "val_fraction=nan"),
        "'val_fraction': found nan",
        untouched=folder,
    )


DS_KEYS = "a key or value of DeepSpeed's JSON that is none"
DS_FEATURES = "a feature of DeepSpeed's that changes what is computed"


def ds(folder: Path, content: Any) -> list[str]:
    """A plan with that DeepSpeed JSON."""
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return plan("--ds", str(path))


def zero(**values: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2, **values}}


@attack(DS_KEYS)
def ds_section_misspelt(folder: Path) -> Shown:
    """The whole section under a wrong name: DeepSpeed would run without ZeRO."""
    return refused(
        ds(folder, {"zero_optimisation": {"stage": 3}}),
        "'zero_optimisation' is not a key",
        "did you mean 'zero_optimization'",
    )


@attack(DS_KEYS)
def ds_key_misspelt_inside(folder: Path) -> Shown:
    """A misspelt key two levels down."""
    return refuses(
        lambda: check_ds_json(zero(offload_optimizer={"devcie": "cpu"})),
        "offload_optimizer.devcie' is not a key",
        "offload_optimizer.device'",
    )


@attack(DS_KEYS)
def ds_key_in_another_section(folder: Path) -> Shown:
    """A key that belongs a level deeper."""
    return refuses(lambda: check_ds_json({"overlap_comm": True}), "did you mean 'zero_optimization.overlap_comm'")


@attack(DS_KEYS)
def ds_key_of_python(folder: Path) -> Shown:
    """A field's name in DeepSpeed's code, which its JSON has under another."""
    return refuses(
        lambda: check_ds_json(zero(prefetch_bucket_size=1)),
        "did you mean 'zero_optimization.stage3_prefetch_bucket_size'",
    )


@attack(DS_KEYS)
def ds_wrong_types(folder: Path) -> Shown:
    """Texts, true and halves where there are numbers, numbers where there are switches."""
    for values in (
        zero(stage="2"),
        zero(stage=True),
        zero(reduce_bucket_size="5e8"),
        zero(reduce_bucket_size=1.5),
        zero(overlap_comm=1),
        zero(overlap_comm="true"),
        {"train_batch_size": "4"},
        {"steps_per_print": 0},
        {"gradient_clipping": "1"},
        zero(offload_optimizer="cpu"),
        zero(stage=4),
        {"fp16": True},
    ):
        refuses(lambda: check_ds_json(values), "DeepSpeed's '")
    return right("each refused by key, found and expected")


@attack(DS_KEYS)
def ds_bad_values(folder: Path) -> Shown:
    """Buckets of nothing, a device that is none, an auto that nobody fills."""
    refuses(lambda: check_ds_json(zero(reduce_bucket_size=0)), "reduce_bucket_size': found 0")
    refuses(lambda: check_ds_json(zero(offload_optimizer={"device": "nvme"})), "offload_optimizer.device' is 'nvme'")
    return refuses(lambda: check_ds_json(zero(sub_group_size="auto")), 'sub_group_size\' says "auto"')


@attack(DS_KEYS)
def ds_that_is_no_json(folder: Path) -> Shown:
    """NaN, and a key twice."""
    refused(ds(folder, '{"gradient_clipping": NaN}'), "ds.json", "NaN")
    return refused(ds(folder, '{"zero_optimization": {"stage": 1, "stage": 3}}'), "ds.json", "stage")


@attack(DS_FEATURES)
def ds_sums_in_fp16(folder: Path) -> Shown:
    """Gradients that are summed in 16 bits."""
    for kind in ("fp16", "bf16"):
        refuses(
            lambda: check_ds_json({"communication_data_type": kind}),
            f"communication_data_type' is '{kind}'",
            "expected 'fp32'",
        )
    return refuses(
        lambda: check_ds_json({"data_types": {"grad_accum_dtype": "bf16"}}), "data_types.grad_accum_dtype' is 'bf16'"
    )


@attack(DS_FEATURES)
def ds_quantised(folder: Path) -> Shown:
    """ZeRO++: quantised gradients and weights, weights kept twice."""
    for name in ("zero_quantized_gradients", "zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        refuses(lambda: check_ds_json(zero(stage=3, **{name: True})), f"{name}' is True, expected false")
    return refuses(
        lambda: check_ds_json(zero(stage=3, zero_hpz_partition_size=8)), "zero_hpz_partition_size' is 8, expected 1"
    )


@attack(DS_FEATURES)
def ds_other_trainings(folder: Path) -> Shown:
    """Curricula, elasticity, compression, dropped layers, sparse attention, tuning of its own: each a section of its
    own."""
    names = (
        "curriculum_learning",
        "data_efficiency",
        "elasticity",
        "compression_training",
        "progressive_layer_drop",
        "sparse_attention",
        "eigenvalue",
        "autotuning",
        "hybrid_engine",
        "pipeline",
        "amp",
        "quantize_training",
        "checkpoint",
        "activation_checkpointing",
        "tensorboard",
    )
    for name in names:
        refuses(lambda: check_ds_json({name: {"enabled": True}}), f"DeepSpeed's '{name}'", "refused", "leave it out")
        check_ds_json({name: {"enabled": False}})
    return right(f"{len(names)} sections, each refused, unless switched off")


@attack(DS_FEATURES)
def ds_other_optimizers(folder: Path) -> Shown:
    """A 1-bit optimizer."""
    return refused(
        ds(folder, {"optimizer": {"type": "OneBitAdam", "params": {"lr": "auto", "freeze_step": 10}}}),
        "OneBitAdam",
        "AdamW",
    )


@attack(DS_FEATURES)
def ds_gradients_scaled_twice(folder: Path) -> Shown:
    """Gradients that are divided by DeepSpeed beside our own division."""
    refused(ds(folder, {"gradient_predivide_factor": 2.0}), "gradient_predivide_factor", "2.0")
    return refuses(lambda: check_ds_json({"sparse_gradients": True}), "sparse_gradients' is True")


@attack(DS_FEATURES)
def ds_norm_left_out(folder: Path) -> Shown:
    """Switches by which DeepSpeed leaves out what the log and clipping need."""
    refuses(lambda: check_ds_json({"disable_allgather": True}), "disable_allgather' is True")
    return refuses(lambda: check_ds_json(zero(compute_grad_norm=False)), "compute_grad_norm' is False, expected true")


DS_IDLE = "a key of DeepSpeed's JSON without effect"


@attack(DS_IDLE)
def ds_knobs_of_another_stage(folder: Path) -> Shown:
    """Knobs of ZeRO-3 beside stage 2, and of stage 2 beside 3: taken, and nothing read them."""
    for key, value in (
        ("stage3_max_live_parameters", 1e8),
        ("stage3_param_persistence_threshold", 0),
        ("sub_group_size", 10**6),
        ("offload_param", {"device": "cpu"}),
    ):
        refuses(
            lambda: check_ds_json(zero(**{key: value})), f"zero_optimization.{key}", "has no effect: it is of stage 3"
        )
    refuses(
        lambda: check_ds_json(zero(stage=3, round_robin_gradients=True)),
        "round_robin_gradients' is true",
        "stage 1 or 2",
    )
    return refused(
        ds(folder, zero(stage3_prefetch_bucket_size=0)), "stage3_prefetch_bucket_size", "zero_optimization.stage is 2"
    )


@attack(DS_IDLE)
def ds_without_a_stage(folder: Path) -> Shown:
    """A section of buckets and offload whose stage was forgotten: DeepSpeed runs without ZeRO."""
    refuses(
        lambda: check_ds_json({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
        "offload_optimizer.device' is 'cpu'",
        "stage is 0",
    )
    return refused(
        ds(folder, {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 10**6}}),
        "no effect",
        "stage is 0",
    )


@attack(DS_IDLE)
def ds_knobs_of_disks(folder: Path) -> Shown:
    """Buffers of NVMe beside offload to memory, and gathering for a file that vltrain never writes."""
    for key, value in (("buffer_count", 8), ("fast_init", True), ("cpuadam_cores_perc", 0.5)):
        refuses(
            lambda: check_ds_json(zero(offload_optimizer={"device": "cpu", key: value})),
            f"offload_optimizer.{key}",
            "no effect",
        )
    refuses(
        lambda: check_ds_json(zero(stage=3, offload_param={"device": "cpu", "max_in_cpu": 1})),
        "max_in_cpu' is 1",
        "no effect",
    )
    return refused(
        ds(folder, zero(stage=3, stage3_gather_16bit_weights_on_model_save=True)),
        "stage3_gather_16bit_weights_on_model_save",
        "no effect",
    )

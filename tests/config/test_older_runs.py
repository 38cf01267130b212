"""A run of an older version keeps meaning what it meant, whatever settings are added."""

import pytest

from vltrain.config.command_line import load_settings
from vltrain.config.keys import check_type, known_keys
from vltrain.config.older_runs import ADDED, complete, value_before
from vltrain.config.recipe import build_config, dump_config, read_recipe
from vltrain.config.schema import Config
from vltrain.errors import InputError
from vltrain.inference.run import recipe_of

FIRST = {"mmt", "instructblip"}  # architectures; runs of a later one name all of its settings
FIRST_KEYS = """
model.architecture model.instructblip.source model.instructblip.config model.instructblip.tokenizer
model.instructblip.qformer_tokenizer model.instructblip.qformer_tokens model.instructblip.adapters
model.instructblip.attention model.instructblip.kernels model.instructblip.dropout model.instructblip.vision
model.instructblip.qformer.mode model.instructblip.qformer.targets model.instructblip.qformer.rank
model.instructblip.qformer.alpha model.instructblip.qformer.dropout model.instructblip.llm.mode
model.instructblip.llm.targets model.instructblip.llm.rank model.instructblip.llm.alpha model.instructblip.llm.dropout
model.instructblip.adalora.init_rank model.instructblip.adalora.target_rank model.instructblip.adalora.tinit
model.instructblip.adalora.tfinal model.instructblip.adalora.delta_t model.instructblip.adalora.beta1
model.instructblip.adalora.beta2 model.instructblip.adalora.orth_reg_weight model.vision.source model.vision.kind
model.vision.config model.vision.tap_every model.vision.train model.llm.source model.llm.config model.llm.tokenizer
model.llm.attention model.llm.kernels model.llm.peft.kind model.llm.peft.rank model.llm.peft.alpha
model.llm.peft.dropout model.llm.peft.targets model.llm.peft.adapter_len model.llm.peft.adapter_layers model.llm.train
model.adapter.kind model.adapter.dim model.adapter.groups model.adapter.down_groups model.adapter.dropout
model.adapter.rank model.adapter.scale model.adapter.temperature model.adapter.vision model.adapter.llm
model.adapter.impl model.neck.kind model.neck.dim model.tune model.bits model.seed data.source data.input data.options
data.root data.train_split data.eval_split data.test_split data.train_packs data.template data.pack_length
data.max_images data.over_long data.workers data.max_image_pixels optim.lr optim.vision_lr optim.llm_lr optim.schedule
optim.min_lr_ratio optim.betas optim.eps optim.weight_decay optim.warmup_epochs optim.clip train.epochs
train.max_steps train.packs_per_step train.precision train.activation_checkpointing train.compile train.deterministic
train.seed train.log_every_steps train.save_every_steps train.keep_checkpoints train.on_bad_loss train.spike_factor
train.hang_timeout_minutes train.async_save train.eval_every_steps train.eval_every_epochs train.keep_best
train.early_stopping_patience train.time_limit_minutes eval.scorer eval.method eval.normalise_length eval.batch_size
eval.max_new_tokens eval.temperature eval.top_p eval.max_samples eval.tensorboard_samples output
""".split()


def test_every_added_setting_says_what_was_done_before_it():
    """Fails when a setting is added to `vltrain.config.schema`: enter it in `vltrain.config.older_runs.ADDED`, with the
    value that changes nothing."""
    lately = {key for key, one in known_keys().items() if not one.architectures or FIRST & set(one.architectures)}
    assert sorted(lately - set(FIRST_KEYS)) == sorted(ADDED)
    for key, value in ADDED.items():
        assert check_type(value, known_keys()[key].annotation)[0], key


@pytest.fixture
def added_lately(monkeypatch):
    """As if these two, whose defaults are 16 and 0.02, had been added after the run was made, which did without
    them."""
    monkeypatch.setitem(ADDED, "model.adapter.dim", 4)
    monkeypatch.setitem(ADDED, "optim.weight_decay", 0.0)


def old_run(folder):
    kept = {
        key: value for key, value in _flat(Config()).items() if key not in ("model.adapter.dim", "optim.weight_decay")
    }
    text = dump_config(build_config({**kept, "model.adapter.dim": 4}))
    lines = [line for line in text.splitlines() if line.strip() not in ("dim: 4", "weight_decay: 0.02")]
    (folder / "config.yaml").write_text("\n".join(lines) + "\n")
    assert not {"model.adapter.dim", "optim.weight_decay"} & read_recipe(folder / "config.yaml").keys()
    return folder


def _flat(config):
    return {key: known.default for key, known in known_keys().items()}


def test_a_key_that_an_old_recipe_lacks_has_the_old_value(added_lately, tmp_path):
    run = old_run(tmp_path)
    assert recipe_of(run).model.adapter.dim == 4 and recipe_of(run).optim.weight_decay == 0.0
    loaded = load_settings(
        ["RUN", "--optim.lr", "0.5"],
        program="x",
        positionals=("run",),
        default_recipe=run / "config.yaml",
        default_is_checked=True,
    )
    assert (
        loaded.config.model.adapter.dim == 4
        and loaded.config.optim.weight_decay == 0.0
        and loaded.config.optim.lr == 0.5
    )
    assert build_config({}).model.adapter.dim == 16, "a recipe of today has today's default"


def test_what_an_old_recipe_says_wins(added_lately):
    assert complete({"model.adapter.dim": 8})["model.adapter.dim"] == 8
    assert (
        value_before("optim.weight_decay") == 0.0
        and value_before("optim.lr") == Config().optim.lr
        and value_before("questions") is None
    )


def test_a_key_of_a_newer_version_is_refused_by_name(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_config(Config()) + "tomorrow: 1\n")
    with pytest.raises(InputError, match="tomorrow"):
        recipe_of(tmp_path)


def test_a_default_of_before_in_a_stored_recipe_is_nobodys_wish(tmp_path):
    stored = dump_config(build_config({"eval.max_new_tokens": 8}))
    assert (
        load_settings(
            ["--recipe", str(_file(tmp_path / "old.yaml", stored)), "--eval.method", "rank"], program="x"
        ).config.eval.max_new_tokens
        == 8
    )
    asked = _file(tmp_path / "asked.yaml", stored.replace("max_new_tokens: 8", "max_new_tokens: 9"))
    with pytest.raises(InputError, match="eval.max_new_tokens: has no effect"):
        load_settings(["--recipe", str(asked), "--eval.method", "rank"], program="x")


def _file(path, text):
    path.write_text(text)
    return path

"""Every shipped recipe is read strictly, written back whole, and agrees with every shipped DeepSpeed file."""

from pathlib import Path

import pytest

from data_prep.sources import SOURCES
from vltrain.data.conversation import TEMPLATES
from vltrain.evaluate.report import SCORERS
from vltrain.models.adapters import ADAPTERS
from vltrain.settings import load_settings
from vltrain.train.ds_config import load_ds_json, resolve_ds_config

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_what_exists(path):
    config = load_settings(["--recipe", str(path)], program="test").config
    assert config.model.adapter.kind in ADAPTERS and config.data.template in TEMPLATES
    assert config.data.source in SOURCES and config.eval.scorer in SCORERS
    for ds in (ROOT / "ds_configs").glob("*.json"):
        assert resolve_ds_config(load_ds_json(ds), config, 8)["train_micro_batch_size_per_gpu"] == 1


def test_the_named_recipes_are_there():
    assert {path.stem for path in RECIPES} >= {"quickstart", "smollm2_easyvqa", "llama2_7b_diht_scienceqa"}

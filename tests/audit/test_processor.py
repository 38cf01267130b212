"""A processor that stands beside a config belongs to it, or the audit says so."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from tests.support.processors import config_of, make_processor
from vltrain.audit.checks.processor import WHAT, check_processor, has_processor
from vltrain.audit.recipe import question_of, require_audited
from vltrain.audit.stored import stored_report
from vltrain.config.model.mmt import AdapterConfig
from vltrain.config.model.stock import LowRankConfig, NetworkConfig, StockConfig, StockSection
from vltrain.data.stock.processor import stock_processor
from vltrain.errors import InputError


def check(name: str, folder: Path, **images: object):
    source = make_processor(name, folder, **images)
    values = config_of(name)
    (folder / "config.json").write_text(json.dumps(values))
    return check_processor(CONFIG_MAPPING[values["model_type"]].from_dict(values), source)


@pytest.mark.parametrize(
    "name",
    ["llava", "qwen3_vl", *(pytest.param(one, marks=pytest.mark.slow) for one in ("smolvlm", "gemma3", "internvl"))],
)
def test_it_writes_as_many_placeholders_as_the_model_makes_vectors(name, tmp_path):
    found = check(name, tmp_path)
    assert found.passed, found.where
    assert has_processor(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "images"), [("llava", {"crop_size": {"height": 64, "width": 64}}), ("qwen3_vl", {"merge_size": 1})]
)
def test_one_for_other_sizes_is_told(name, images, tmp_path):
    found = check(name, tmp_path, **images)
    assert found.passed is False and found.where


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "smolvlm"])
def test_a_recipe_of_stock(name, tmp_path, monkeypatch):
    """As a run audits its model before anything is prepared, tuned as its recipe says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_processor(name, tmp_path / "processor")
    section = StockSection(
        config=config_of(name),
        processor=str(tmp_path / "processor"),
        llm=NetworkConfig(peft=LowRankConfig(kind="dora", rank=64)),
    )
    model = StockConfig(stock=section, adapter=AdapterConfig(dim=64, vision="both", llm="none"))
    question = question_of(model)
    require_audited(model)
    report = stored_report(question.identity)
    assert report.passed
    titles = {one.what for one in report.findings}
    assert {"gradient packed = alone", WHAT} <= titles


def test_a_folder_without_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert not has_processor(str(tmp_path))


def without_images(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|image_pad|>", ""))


def torn(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for message in messages %}")


def without(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


@pytest.mark.parametrize(
    ("harm", "options", "told"),
    [
        (without_images, {}, "drops 1 image"),
        (torn, {}, "a picture and a question can't be packed: the tokenizer's chat template refuses"),
        (without, {}, "^model.stock.processor: .*no processor is there"),
        (lambda _: None, {"max_pixels": "many"}, "^model.stock.processor_options: found .*'many'"),
        (lambda _: None, {"max_pixelz": 4}, "^model.stock.processor_options.max_pixelz.*did you mean 'max_pixels'"),
    ],
)
def test_a_processor_that_cannot_be_used_is_told_before_anything_is_prepared(
    harm, options, told, tmp_path, monkeypatch
):
    """And that it was fine before, and is in the cache, says nothing of how it is now."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_processor("qwen3_vl", tmp_path / "processor")
    section = StockSection(config=config_of("qwen3_vl"), processor=str(tmp_path / "processor"))
    before = question_of(StockConfig(stock=section)).identity
    harm(tmp_path / "processor")
    stock_processor.cache_clear()
    changed = StockConfig(stock=replace(section, processor_options=options))
    with pytest.raises(InputError, match=told):
        require_audited(changed)
    with contextlib.suppress(InputError):
        assert question_of(changed).identity != before

"""What a run is made of: a changed file is named wherever the run's weights are used, and a moved folder changes
nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.blip import blip_config, make_tokenizers
from tests.support.finished_run import finished_run
from tests.train.checkpoints.test_checkpoint import Net, state_of
from vltrain.config.recipe import build_config
from vltrain.errors import InputError
from vltrain.files.locate import locate
from vltrain.inference.run import weights_used
from vltrain.receipts.manifest import checksum
from vltrain.train.checkpoints.checkpoint import open_checkpoint, save_checkpoint
from vltrain.train.run.identity import (
    MADE_OF,
    agreed_over_nodes,
    differences,
    require_same_model,
    require_same_run,
    run_id,
    tell_unknown_files,
)
from vltrain.train.run.made_of import made_of


@pytest.fixture
def places(tmp_path):
    """Folders of their own for ViT and LLM, with its tokenizer."""
    return {name: Path(shutil.copytree(locate(f"asset://tiny_{name}"), tmp_path / name)) for name in ("vit", "llama")}


def config_of(places, **changes):
    return build_config(
        {
            "model.vision.source": str(places["vit"]),
            "model.vision.tap_every": 1,
            "model.llm.source": str(places["llama"]),
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
    )


def identity_of(config):
    return json.loads(json.dumps({"model": config.model.identity(), MADE_OF: made_of(config)}))


def other_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_setting(folder, name, change):
    settings = json.loads((folder / name).read_text())
    settings.update(change)
    (folder / name).write_text(json.dumps(settings))


CHANGES = {
    "llm": (lambda places: other_weights(places["llama"]), "model.llm.source: .*llama: model.safetensors has changed"),
    "vit": (lambda places: other_weights(places["vit"]), "model.vision.source: .*vit: model.safetensors has changed"),
    "sizes": (
        lambda places: other_setting(places["llama"], "config.json", {"rms_norm_eps": 1e-3}),
        "config.json has changed",
    ),
    "tokenizer": (
        lambda places: (places["llama"] / "added_tokens.json").write_text("{}"),
        "model.llm.tokenizer: added_tokens.json is new",
    ),
    "more": (
        lambda places: (places["llama"] / "chat_template.jinja").write_text("{{ messages }}"),
        "chat_template.jinja is new",
    ),
    "pictures": (
        lambda places: (places["vit"] / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}'),
        "preprocessor_config.json",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_named_with_its_setting(places, change):
    config = config_of(places)
    before = identity_of(config)
    spoil, told = CHANGES[change]
    spoil(places)
    with pytest.raises(InputError, match=f"another model: .*{told}"):
        require_same_model(before, config, made_of(config), "RUN")
    require_same_model({}, config, made_of(config), "a run that is older than that")


def test_moved_folders_are_the_same_and_what_is_not_read_does_not_count(places, tmp_path):
    before = identity_of(config_of(places))
    moved = {name: place.rename(tmp_path / f"{name}-elsewhere") for name, place in places.items()}
    (moved["llama"] / "README.md").write_text("moved")
    config = config_of(moved)
    assert list(differences(before, identity_of(config))) == []
    apart = Path(shutil.copytree(moved["llama"], tmp_path / "tokenizer-apart"))
    assert list(differences(before, identity_of(config_of(moved, model__llm__tokenizer=str(apart))))) == []
    other = identity_of(config_of(moved, model__adapter__dim=8))
    assert list(differences(before, other)) == ["model.adapter.dim was 16, is 8"]
    require_same_model(before, config_of(moved, model__adapter__dim=8), made_of(config), "RUN", {"model.adapter.dim"})


def test_a_state_dict_may_be_called_otherwise_and_metas_shards_are_named(places, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "models"))
    from tests.models.test_clip_state import random_vit
    from tests.models.test_clip_state import state_of as vit_state
    from tests.models.test_meta_llama import meta_weights, write_meta

    weights = meta_weights(4)
    write_meta(tmp_path / "meta", weights, 2, 4)
    torch.save(vit_state(random_vit()), tmp_path / "vit.ckpt")
    config = config_of(
        {"vit": tmp_path / "vit.ckpt", "llama": tmp_path / "meta"},
        model__vision__kind="clip",
        model__llm__tokenizer=str(places["llama"]),
    )
    before = identity_of(config)
    assert before[MADE_OF]["model.llm.source"].keys() == {"params.json", "consolidated.00.pth", "consolidated.01.pth"}
    (tmp_path / "vit.ckpt").rename(tmp_path / "other.ckpt")
    shutil.rmtree(tmp_path / "meta")
    weights["norm.weight"] += 1e-3
    write_meta(tmp_path / "meta", weights, 2, 4)
    renamed = {"vit": tmp_path / "other.ckpt", "llama": tmp_path / "meta"}
    told = list(
        differences(
            before,
            identity_of(config_of(renamed, model__vision__kind="clip", model__llm__tokenizer=str(places["llama"]))),
        )
    )
    assert [text.split(": ")[2].split(" has changed")[0] for text in told] == [
        "consolidated.00.pth",
        "consolidated.01.pth",
    ]
    torch.save(vit_state(random_vit()), tmp_path / "other.ckpt")
    told = list(
        differences(
            before,
            identity_of(config_of(renamed, model__vision__kind="clip", model__llm__tokenizer=str(places["llama"]))),
        )
    )
    assert told[0].startswith("model.vision.source") and "has changed" in told[0]


def test_a_sharded_folder_names_the_shard(places, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(places["llama"], folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, inside in halves.items():
        save_file({name: tensors[name] for name in inside}, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, inside in halves.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = config_of({**places, "llama": folder})
    before = identity_of(config)
    assert before[MADE_OF]["model.llm.source"].keys() == {"config.json", *halves}
    tensors[names[1]] = tensors[names[1]] * 2
    save_file(
        {name: tensors[name] for name in halves["model-2.safetensors"]},
        folder / "model-2.safetensors",
        metadata={"format": "pt"},
    )
    (told,) = differences(before, identity_of(config))
    assert "model-2.safetensors has changed" in told


def test_an_instructblips_base_tokenizers_and_adapters(tmp_path):
    tokenizers = make_tokenizers(tmp_path / "tokenizers")
    config = blip_config("llama", tokenizers)
    assert made_of(config).keys() == {"model.instructblip.tokenizer", "model.instructblip.qformer_tokenizer"}
    before = identity_of(config)
    other_setting(Path(tokenizers["bert"]), "tokenizer.json", {"version": "2.0"})
    (told,) = differences(before, identity_of(config))
    assert "model.instructblip.qformer_tokenizer" in told and "tokenizer.json has changed" in told


@pytest.mark.parametrize(
    ("third", "told"),
    [
        ("a", None),
        ("b", "rank 2's node has other files than rank 0's: model.llm.source: model.safetensors has changed"),
        (None, None),
    ],
)
def test_nodes_must_have_the_same_files(monkeypatch, third, told):
    """Ranks 0 and 2 are the first of their nodes; rank 1 has looked at nothing."""
    found = [{"model.llm.source": {"model.safetensors": digest}} if digest else None for digest in ("a", None, third)]
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: len(found))
    monkeypatch.setattr(
        "torch.distributed.all_gather_object", lambda gathered, own: gathered.__setitem__(slice(None), found)
    )
    if told is None:
        assert agreed_over_nodes(None) == found[0]
        return
    with pytest.raises(InputError, match=told):
        agreed_over_nodes(None)


def checkpoint_of(folder, belongs_to, **run_state):
    return open_checkpoint(
        save_checkpoint(
            state_of(Net()), folder, step=1, belongs_to=belongs_to, keep=2, is_writer=True, run_state=run_state
        )
    )


def test_a_run_from_before_digests_goes_on_and_says_what_it_cannot_tell(places, tmp_path, caplog):
    now = identity_of(config_of(places))
    old = {"model": now["model"]}
    found = checkpoint_of(tmp_path / "old", old)
    require_same_run(found, now)
    tell_unknown_files(now, "RUN")
    assert caplog.text == ""
    tell_unknown_files(found.belongs_to, "RUN")
    assert "changes since cannot be detected" in caplog.text
    assert run_id(now, found) == checksum(old) and run_id(now, None) == checksum(now)
    assert run_id(now, checkpoint_of(tmp_path / "next", now, run=checksum(old))) == checksum(old)
    elsewhere = identity_of(config_of({**places, "vit": places["vit"].rename(tmp_path / "moved")}))
    with pytest.raises(InputError, match="model.vision.source was .*--train.init_from"):
        require_same_run(found, elsewhere)
    moved = config_of({**places, "vit": tmp_path / "moved"})
    require_same_model(old, moved, made_of(moved), "RUN")


@pytest.mark.parametrize(
    "belongs_to",
    [
        {"model": 5},
        {"model": {"llm": []}, MADE_OF: {"model.llm.source": 3}},
        {MADE_OF: []},
        {"model": {}, MADE_OF: {"x": {"y": 1}}},
    ],
)
def test_an_identity_that_is_none_is_a_difference(places, tmp_path, belongs_to):
    with pytest.raises(InputError, match="belongs to another run"):
        require_same_run(checkpoint_of(tmp_path / "c", belongs_to), identity_of(config_of(places)))


def test_what_was_edited_in_a_runs_recipe_is_told(tmp_path, caplog):
    places = finished_run(tmp_path)
    checkpoint = open_checkpoint(places.checkpoint())
    weights_used(places.run, places.config(), checkpoint, None)
    assert caplog.text == ""
    stored = places.run / "config.yaml"
    text = (
        stored.read_text()
        .replace("template: mmt", "template: chat")
        .replace("  init_from: null\n", "")
        .replace("max_image_pixels: 50000000", "max_image_pixels: 4")
    )
    stored.write_text(text)
    weights_used(places.run, places.config(), checkpoint, None)
    told = [record.message.partition("wrote it: ")[2] for record in caplog.records]
    assert told == ["data.template was 'mmt', is 'chat'", "data.max_image_pixels was 50000000, is 4"]

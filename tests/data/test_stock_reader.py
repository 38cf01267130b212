"""How stock models' samples and images are read, against the whole processors of transformers on real pictures."""

import dataclasses
import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.processors import KINDS, config_of, make_processor
from vltrain.data.images import open_rgb, sizes_below
from vltrain.data.loader import StepLoader, batch_of
from vltrain.data.plan import PackCost, Plan
from vltrain.data.shards import PackedDataset
from vltrain.data.stock import layouts as layouts_module
from vltrain.data.stock.encoder import StockEncoder
from vltrain.data.stock.processor import stock_processor
from vltrain.data.stock.reader import StockReader
from vltrain.data.stock.source import StockSource
from vltrain.errors import InputError
from vltrain.schema import Sample, Turn

SIZES = {"wide": (40, 100), "square": (64, 64), "tall": (150, 30), "small": (9, 12)}
LIMIT = 10**6


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processors")
    return {name: make_processor(name, folder / name) for name in KINDS}


def picture(name: str) -> np.ndarray:
    height, width = SIZES[name]
    return np.random.default_rng(sum(map(ord, name))).integers(0, 256, (height, width, 3), dtype=np.uint8)


def sample_of(*names: str, asked: str = "what is this?", answer: str = "red", more: tuple[str, str] | None = None):
    turns = [Turn(role="user", text="<image>\n" * len(names) + asked), Turn(role="assistant", text=answer)]
    if more is not None:
        turns += [Turn(role="user", text=more[0]), Turn(role="assistant", text=more[1])]
    return Sample(id="-".join(names) or "text", images=names, turns=tuple(turns))


def processors_own(source, sample: Sample) -> dict:
    """What `apply_chat_template` of the whole processor gives for the sample up to its last answer, with pictures."""
    inner = stock_processor(source).inner
    if inner.chat_template is None:  # PaliGemma's: images in front of a plain prompt
        text = "<image>" * len(sample.images) + sample.turns[0].text.replace("<image>\n", "")
        shown = [Image.fromarray(picture(name)) for name in sample.images]
        return dict(inner(text=[text], images=[shown], return_tensors="pt"))
    shown, messages = iter(sample.images), []
    for turn in sample.turns[:-1]:
        pictures = [Image.fromarray(picture(next(shown))) for _ in range(turn.text.count("<image>"))]
        parts = [{"type": "image", "image": one} for one in pictures]
        parts.append({"type": "text", "text": turn.text.replace("<image>\n", "")})
        messages.append({"role": turn.role, "content": parts})
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    base = next(kind for kind in type(inner).__mro__ if kind.__name__ == "ProcessorMixin")
    return dict(base.apply_chat_template(inner, messages, **settings))


@pytest.mark.parametrize("name", KINDS)
def test_prompts_and_tensors_are_the_processors_own(name, sources):
    source = sources[name]
    encoder, reader = StockEncoder(source), StockReader(source, LIMIT)
    groups = [("wide",), ("tall",), ("square", "wide"), ()] if name != "paligemma" else [("wide",), ("tall",)]
    for names in groups:
        sample = sample_of(*names)
        prompt, whole = (make(sample, SIZES.__getitem__) for make in (encoder.prompt, encoder.sample))
        own = processors_own(source, sample)
        assert prompt.input_ids.tolist() == own["input_ids"][0].tolist(), names
        length = len(prompt.input_ids)
        assert whole.input_ids[:length].tolist() == prompt.input_ids.tolist() and not whole.loss_mask[:length].any()
        predicted = whole.input_ids[whole.loss_mask].tolist()
        assert encoder.tokenizer.decode(predicted).strip() == "red" and predicted[-1] in encoder.stop_ids
        assert np.array_equal(whole.position_ids[:, :length], prompt.position_ids)
        found = reader.stack([picture(one) for one in names], [min(len(names), 2)] * len(names))
        assert found.tokens.tolist() == whole.image_tokens.tolist() and len(found) == len(names)
        assert int((whole.input_ids == encoder.processor.image_token_id).sum()) == int(found.tokens.sum())
        for key, tensor in found.tensors.items():
            if key in own:
                assert torch.equal(tensor, own[key]), (names, key)
        assert not names or "pixel_values" in found.tensors


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_positions_are_those_of_the_models_forward(name, sources):
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    config = config_of(name)
    config = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    segment = StockEncoder(sources[name]).sample(sample_of("wide", "tall"), SIZES.__getitem__)
    own = processors_own(sources[name], sample_of("wide", "tall"))
    length = own["input_ids"].shape[1]
    expected, _ = model.model.get_rope_index(
        own["input_ids"], mm_token_type_ids=own["mm_token_type_ids"], image_grid_thw=own["image_grid_thw"]
    )
    assert segment.position_ids[0].tolist() == list(range(len(segment.input_ids)))
    assert segment.position_ids[1:, :length].tolist() == expected[:, 0].tolist()


def test_blocks_are_images_or_everything_in_front_of_the_answer(sources):
    encoder = StockEncoder(sources["gemma3"])
    segment = encoder.sample(sample_of("wide", "tall"), SIZES.__getitem__)
    shown = segment.input_ids == encoder.processor.image_token_id
    assert (segment.blocks[~shown] == -1).all() and segment.blocks[shown].tolist() == [0] * 4 + [1] * 4
    encoder = StockEncoder(sources["paligemma"])
    segment = encoder.sample(sample_of("wide"), SIZES.__getitem__)
    assert (segment.blocks == np.where(segment.loss_mask, -1, 0)).all()
    assert segment.position_ids.tolist() == [list(range(1, len(segment.input_ids) + 1))]
    assert (encoder.prompt(sample_of("wide"), SIZES.__getitem__).blocks == 0).all()
    assert len(StockEncoder(sources["llava"]).sample(sample_of("wide"), SIZES.__getitem__).blocks) == 0


@pytest.mark.parametrize("name", ["qwen3_vl", "llava", "smolvlm"])
def test_loss_lies_on_all_answers_and_spelled_tokens_stay_text(name, sources):
    encoder = StockEncoder(sources[name])
    special = KINDS[name].tokens[1]
    sample = sample_of("wide", asked=f"say {special} or <\\image>", answer=f"no {special}", more=("why?", "so"))
    segment = encoder.sample(sample, SIZES.__getitem__, askable=True)
    ids = segment.input_ids.tolist()
    bounds = np.flatnonzero(np.diff(np.concatenate([[0], segment.loss_mask.astype(int), [0]])))
    answers = [ids[first:last] for first, last in zip(bounds[::2], bounds[1::2])]
    said = [encoder.tokenizer.decode(answer).strip() for answer in answers]
    assert said == [f"no {special}", "so"], "the spelled token reads back, so it is letters"
    assert all(answer[-1] in encoder.stop_ids for answer in answers)
    assert ids.count(encoder.processor.image_token_id) == int(segment.image_tokens.sum())
    candidate = encoder.candidate(sample, "maybe", False, SIZES.__getitem__)
    assert encoder.tokenizer.decode(candidate.input_ids[candidate.loss_mask].tolist()).strip() == "maybe"


def test_an_image_that_stands_alone_is_another_than_one_of_several_where_the_family_says_so(sources):
    source = sources["llava_onevision"]
    encoder, reader = StockEncoder(source), StockReader(source, LIMIT)
    assert encoder.counts_matter and not StockEncoder(sources["smolvlm"]).counts_matter
    segments = [
        encoder.sample(sample, SIZES.__getitem__)
        for sample in (sample_of("wide", "tall"), sample_of("wide"), sample_of("square"))
    ]
    batch = batch_of(segments, {name: picture(name) for name in SIZES}, reader)
    per_run = batch.pixels.tokens[batch.image_slots].tolist()
    assert per_run == [count for segment in segments for count in segment.image_tokens.tolist()]
    assert len(batch.image_slots) == 4 and len(set(batch.image_slots.tolist())) == 4, "`wide` is there twice"
    lone = batch_of(
        [segments[1], encoder.sample(sample_of("tall", "tall"), SIZES.__getitem__)],
        {name: picture(name) for name in SIZES},
        reader,
    )
    assert lone.pixels.tokens[lone.image_slots].tolist()[1:] == [17, 17]


def test_what_an_image_becomes_is_kept_on_disk(sources, monkeypatch):
    processor = stock_processor(sources["qwen3_vl"])
    first = layouts_module.Layouts(processor)
    made = first.of((40, 100), 1)
    with first._file.open("ab") as file:
        file.write(b'[33, 33, 1, [["torn')
    monkeypatch.setattr(layouts_module.Layouts, "_made", lambda *_: pytest.fail("made again"))
    second = layouts_module.Layouts(processor)
    second.__dict__["counts_matter"] = False
    assert second.of((40, 100), 1) == made


def test_encoder_and_reader_travel_to_other_processes(sources):
    for one in (StockEncoder(sources["llava"]), StockReader(sources["llava"], LIMIT)):
        assert pickle.loads(pickle.dumps(one)) == one


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_size_from_the_header_is_that_of_the_upright_picture(kind, tmp_path):
    for orientation in range(1, 9):
        image, exif = Image.fromarray(picture("wide")), Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / f"{orientation}", kind, exif=exif)
        upright = open_rgb((tmp_path / f"{orientation}").read_bytes(), LIMIT, "x")
        assert sizes_below(tmp_path, LIMIT)(f"{orientation}") == (upright.height, upright.width), orientation


def test_a_png_with_its_orientation_behind_the_pixels_is_turned(tmp_path):
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture("wide")).save(stream, "PNG")
    plain, chunk = stream.getvalue(), b"eXIf" + exif.tobytes()[6:]
    import zlib

    behind = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    (tmp_path / "a").write_bytes(plain[:-12] + behind + plain[-12:])
    upright = open_rgb((tmp_path / "a").read_bytes(), LIMIT, "x")
    assert sizes_below(tmp_path, LIMIT)("a") == (upright.height, upright.width) == (100, 40)
    (tmp_path / "b").write_bytes(plain)
    assert sizes_below(tmp_path, LIMIT)("b") == (40, 100)


def write_samples(folder, samples) -> None:
    folder.mkdir()
    for name in SIZES:
        Image.fromarray(picture(name)).save(folder / name, "PNG")
    (folder / "train.jsonl").write_text("".join(json.dumps(sample.to_json()) + "\n" for sample in samples))


@pytest.mark.parametrize("name", ["qwen3_vl", "llava_onevision", "gemma3"])
def test_packs_hold_what_each_sample_is_alone(name, sources, tmp_path):
    from data_prep.pack import PackSettings, merge_parts, pack, pack_part
    from data_prep.parts import Share
    from vltrain.config.model.base import ProcessorPlaces

    samples = [
        dataclasses.replace(sample_of(*names, asked=f"{number}?"), id=str(number))
        for number, names in enumerate([("wide",), ("square", "wide"), (), ("tall",), ("wide",), ("small", "tall")])
    ]
    write_samples(tmp_path / "samples", samples)
    source, reader = sources[name], StockReader(sources[name], LIMIT)
    places = ProcessorPlaces(key="k", source=source.processor, model=None, config=json.loads(source.config), options={})
    settings = PackSettings(
        tokenizer=source.processor, template="processor", visual_tokens=0, pack_length=400, processor=places
    )
    file = tmp_path / "samples" / "train.jsonl"
    pack(file, tmp_path / "packs", settings, workers=1)
    for number in (1, 2):
        pack_part(file, tmp_path / "again", settings, Share(part=number, parts=2), workers=1)
    merge_parts(file, tmp_path / "again", settings, Share(part=None, parts=2), workers=1)
    dataset = PackedDataset(tmp_path / "packs")
    assert dataset.manifest.format_version == 3
    assert PackedDataset(tmp_path / "again").manifest.files == dataset.manifest.files
    rows = [dataset.row(number).image_tokens.astype(int) for number in range(len(dataset))]
    sums, squares = dataset.image_tokens(np.arange(len(dataset)))
    assert sums.tolist() == [row.sum() for row in rows] and squares.tolist() == [(row**2).sum() for row in rows]
    encoder, size_of = StockEncoder(source), sizes_below(tmp_path / "samples", LIMIT)
    alone = {sample.id: encoder.sample(sample, size_of) for sample in samples}
    plan = Plan(dataset.index, world_size=1, seed=1, epochs=1.0, packs_per_step=1, cost=PackCost())
    seen = []
    for loaded in StepLoader(dataset, plan, 0, reader, 0):
        [batch] = loaded.batches
        ends = batch.segment_lengths.cumsum(0).tolist()
        runs = iter(batch.image_slots.tolist())
        for first, last, sample_id in zip([0, *ends], ends, batch.sample_ids):
            segment = alone[sample_id]
            seen.append(sample_id)
            assert batch.input_ids[first:last].tolist() == segment.input_ids.tolist()
            if len(segment.position_ids):
                assert batch.position_ids[..., first:last].tolist() == segment.position_ids.tolist()
            else:
                assert batch.position_ids[first:last].tolist() == list(range(last - first))
            if len(segment.blocks):
                assert batch.blocks[first:last].tolist() == segment.blocks.tolist()
            assert [int(batch.pixels.tokens[next(runs)]) for _ in segment.images] == segment.image_tokens.tolist()
    assert sorted(seen) == sorted(alone)


def refusal(make) -> str:
    with pytest.raises(InputError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed_folder(sources, name, tmp_path, **files):
    """A copy of a processor's folder with other files; None: without."""
    import shutil

    folder = tmp_path / "changed"
    shutil.copytree(sources[name].processor, folder)
    for file, text in files.items():
        path = folder / file.replace("__", ".")
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
    return dataclasses.replace(sources[name], processor=str(folder))


def test_processors_that_cannot_be_trained_with_are_refused_in_one_line(sources, tmp_path):
    sample = sample_of("wide")

    def encoded(source):
        return lambda: StockEncoder(source).sample(sample, SIZES.__getitem__)

    told = refusal(encoded(changed_folder(sources, "qwen3_vl", tmp_path / "1", chat_template__jinja=None)))
    assert "no chat template" in told
    text = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}<|im_end|>{% endfor %}{% endfor %}"
    told = refusal(encoded(changed_folder(sources, "qwen3_vl", tmp_path / "2", chat_template__jinja=text)))
    assert "drops 1 image(s)" in told and "sample 'wide'" in told
    told = refusal(encoded(changed_folder(sources, "qwen3_vl", tmp_path / "3", preprocessor_config__json=None)))
    assert "no processor is there" in told
    own_code = json.dumps({"processor_class": "Mine", "auto_map": {"AutoProcessor": "mine.Mine"}})
    told = refusal(encoded(changed_folder(sources, "qwen3_vl", tmp_path / "4", preprocessor_config__json=own_code)))
    assert "runs code of its own" in told
    told = refusal(encoded(dataclasses.replace(sources["qwen3_vl"], options='{"max_pixel": 4}')))
    assert "max_pixel" in told and "max_pixels" in told
    config = json.loads(sources["qwen3_vl"].config) | {"image_token_id": 5}
    told = refusal(encoded(dataclasses.replace(sources["qwen3_vl"], config=json.dumps(config))))
    assert "do not belong together" in told
    told = refusal(lambda: StockEncoder(sources["qwen3_vl"]).sample(sample, lambda name: (2, 1000)))
    assert "1000 x 2 pixels" in told


@pytest.mark.parametrize("name", ["smolvlm", "internvl", "llava_onevision", "qwen3_vl"])
def test_what_would_be_a_videos_place_is_refused(name, sources):
    token = stock_processor(sources[name]).inner.video_token
    for asked in (f"what is {token} here?", f"{token}\nwhat happens?"):
        with pytest.raises(InputError, match=r"sample 'wide': a turn holds .* puts a video; videos are not read"):
            StockEncoder(sources[name]).sample(sample_of("wide", asked=asked), SIZES.__getitem__)
    other = "<video>" if name == "qwen3_vl" else "<|video_pad|>"  # another family's, a word here
    StockEncoder(sources[name]).sample(sample_of("wide", asked=f"what is {other}?"), SIZES.__getitem__)


def test_what_is_no_picture_or_too_narrow_is_refused_by_its_header(sources, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(100))
    Image.new("RGB", (2100, 10)).save(tmp_path / "wide.png")
    for name, told in (("a.mp4", r"a\.mp4"), ("wide.png", "sample 'x': an image of 2100 x 10 pixels: .* 200, got 210")):
        sample = Sample(id="x", images=(name,), turns=sample_of("wide").turns)
        with pytest.raises(InputError, match=told) as refused:
            StockEncoder(sources["qwen3_vl"]).sample(sample, sizes_below(tmp_path, LIMIT))
        print(refused.value)
    record = {"id": "x", "turns": [{"role": "user", "text": "a?"}, {"role": "assistant", "text": "b"}]}
    with pytest.raises(InputError, match="the key 'videos'; videos are not read"):
        Sample.from_json({**record, "videos": ["a.mp4"]}, "line 1")


def test_pictures_that_take_other_tokens_than_were_packed_end_the_run_in_one_line(sources):
    encoder = StockEncoder(sources["qwen3_vl"])
    segment = encoder.sample(sample_of("wide"), SIZES.__getitem__)
    told = refusal(lambda: batch_of([segment], {"wide": picture("tall")}, StockReader(sources["qwen3_vl"], LIMIT)))
    assert "[12]" in told and "pack the samples again" in told


def test_options_of_the_image_processor_change_tokens_and_fingerprint(sources):
    fewer = dataclasses.replace(sources["qwen3_vl"], options='{"size": {"shortest_edge": 256, "longest_edge": 1024}}')
    one, other = (StockEncoder(source) for source in (sources["qwen3_vl"], fewer))
    tokens = [int(encoder.sample(sample_of("wide"), SIZES.__getitem__).image_tokens[0]) for encoder in (one, other)]
    assert tokens[1] < tokens[0] and one.fingerprint != other.fingerprint


def test_a_processor_in_a_relative_folder_is_that_of_the_folder_the_process_is_in(tmp_path, monkeypatch):
    for place, edge in (("one", 32), ("other", 48)):
        make_processor("llava", tmp_path / place / "processor", crop_size={"height": edge, "width": edge})
    edges = []
    for place in ("one", "other"):
        monkeypatch.chdir(tmp_path / place)
        source = StockSource("model.stock.processor", "processor", None, json.dumps(config_of("llava")), "{}")
        edges.append(stock_processor(source).inner.image_processor.crop_size["height"])
    assert edges == [32, 48]

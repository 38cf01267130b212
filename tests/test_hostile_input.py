"""Whatever a file says, it is taken or refused by an InputError: data sets, samples, recipes, DeepSpeed's JSON,
answers, manifests, receipts.

Fuzzed with hypothesis: valid files of which something is replaced by any JSON, texts of any characters, files of any
bytes; and bombs by hand. The cases are the same each time; VLTRAIN_FUZZ=50 draws fifty times as many, new ones with
every run.
"""

import copy
import io
import json
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.sources import SOURCES
from tests.support.vocabularies import make_sentencepiece, make_transformers
from tests.train.checkpoints.test_checkpoint import Net, save
from vltrain.config.recipe import build_config, dump_config, read_recipe
from vltrain.config.schema import Config
from vltrain.data.images import decode_image, read_image
from vltrain.data.shards import read_manifest
from vltrain.data.text.conversation import TEMPLATES, encode_prompt, encode_sample
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.errors import InputError
from vltrain.evaluate.predictions import read_predictions, score_predictions
from vltrain.evaluate.samples import read_samples
from vltrain.files.digest import sha256_of
from vltrain.files.strict_json import read_records
from vltrain.receipts.manifest import dumps
from vltrain.receipts.receipt import RECEIPT, read_receipt
from vltrain.schema import Sample
from vltrain.train.checkpoints.checkpoint import open_checkpoint
from vltrain.train.zero.ds_config import load_ds_json, resolve_ds_config

TIMES = int(os.environ.get("VLTRAIN_FUZZ", "1"))
MANY, FEW = (
    settings(
        max_examples=number * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    for number in (150, 60)
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["", " ", "<image>", "\ud800", "\0", "../x", "/etc/passwd", "1e999", 10**300])
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
DEEP = "[" * 100_000 + "]" * 100_000


def places(value, here=()):
    """Paths to everything inside a JSON value."""
    yield here
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*here, key))


def replaced(data, value):
    """A copy in which something is replaced by anything, left out, or put in twice."""
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(places(value))))
        if not path:
            return data.draw(ANYTHING)
        value = copy.deepcopy(value)
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        what = data.draw(st.sampled_from(["replace", "replace", "drop", "twice"]))
        if what == "drop":
            del parent[path[-1]]
        elif what == "twice" and isinstance(parent, list):
            parent.append(parent[path[-1]])
        else:
            parent[path[-1]] = data.draw(ANYTHING)
    return value


def taken_or_refused(action) -> None:
    try:
        action()
    except InputError as error:
        assert str(error).strip()


TALK = {
    "id": "1",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}],
}
MESSAGES = {
    "id": 3,
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "q"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ],
}
PROBLEM = {
    "question": "q?",
    "choices": ["a", "b"],
    "answer": 1,
    "hint": "",
    "image": None,
    "task": "closed choice",
    "grade": "grade2",
    "subject": "natural science",
    "topic": "t",
    "category": "c",
    "skill": "s",
    "lecture": "l",
    "solution": "s",
    "split": "train",
}
ICON = {
    "question": "How many?",
    "choices": ["one", "two"],
    "answer": 1,
    "ques_type": "choose_txt",
    "grade": "g",
    "label": "A",
}
VIZ = {
    "image": "a.jpg",
    "question": "what?",
    "answers": [{"answer": "red", "answer_confidence": "yes"}] * 2,
    "answer_type": "other",
    "answerable": 1,
}
FLICKR = {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a dog"}]}]}
# source -> {file below its input: content}; the input is the folder, but for a source of one file.
FILES = {
    "llava_json": {"chats.json": [TALK, {**TALK, "id": "2", "image": ["a.png"]}, MESSAGES]},
    "scienceqa": {
        "problems.json": {"1": PROBLEM, "2": PROBLEM},
        "pid_splits.json": {"train": ["1"], "val": ["2"], "test": []},
    },
    "scienceqa_image": {
        "problems.json": {"1": PROBLEM, "2": PROBLEM},
        "pid_splits.json": {"train": ["1"], "val": ["2"], "test": []},
    },
    "iconqa": {
        "iconqa/choose_txt/7/data.json": ICON,
        "problems.json": {"7": ICON, "8": ICON},
        "pid2skills.json": {"7": ["counting"], "8": []},
        "pid_splits.json": {"train": ["7"], "val": ["8"], "test": []},
        "iconqa/choose_txt/8/none": "",
    },
    "vizwiz": {"train.json": [VIZ], "val.json": [VIZ]},
    "flickr30k": {"dataset_flickr30k.json": FLICKR, "images/none": ""},
}


@pytest.mark.parametrize("source", FILES)
@FEW
@given(data=st.data())
def test_sources_of_data(source, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    target = data.draw(st.sampled_from([name for name in FILES[source] if name.endswith(".json")]))
    for name, content in FILES[source].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(replaced(data, content) if name == target else content))
    taken_or_refused(lambda: list(SOURCES[source](folder / "chats.json" if source == "llava_json" else folder, {})))


@pytest.mark.parametrize("source", FILES)
@pytest.mark.parametrize(
    "bomb",
    [DEEP, '{"a":' * 50_000, "1" * 10_000, "\x00", "", "\ufeff[]", "NaN"],
    ids=["lists", "objects", "digits", "zero", "empty", "bom", "nan"],
)
def test_bombs_in_sources(source, bomb, tmp_path):
    for target in (name for name in FILES[source] if name.endswith(".json")):
        for name, content in FILES[source].items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(bomb if name == target else json.dumps(content))
        taken_or_refused(
            lambda: list(SOURCES[source](tmp_path / "chats.json" if source == "llava_json" else tmp_path, {}))
        )


ANSWERS = {  # to problems 1 and 2, in the formats that are known
    "a.json": {"1": "x", "2": "The answer is A."},
    "b.json": {"outputs": {"1": "x", "2": "y"}, "acc": 1.0},
    "c.json": {"results": {"1": {"prediction": "a"}, "2": {"prediction": "b"}}},
    "d.json": {"preds": ["The answer is (B).", "x"], "labels": ["The answer is (B).", "The answer is (B)."]},
    "e.json": [{"question_id": 1, "answer": "B"}, {"question_id": "2", "answer": "x"}],
    "f.jsonl": {"question_id": 1, "text": "(B)"},
    "g.jsonl": {"pid": "1", "prediction": "a"},
    "h.jsonl": {"id": "1", "prediction": "x"},
}


@pytest.mark.parametrize("name", ANSWERS)
@FEW
@given(data=st.data())
def test_files_of_answers(name, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    questions = {"problems.json": {"1": PROBLEM, "2": PROBLEM}, "pid_splits.json": {"test": ["1", "2"]}}
    spoiled = data.draw(st.sampled_from([name, name, *questions]))
    for other, content in {**questions, name: ANSWERS[name]}.items():
        (folder / other).write_text(json.dumps(replaced(data, content) if other == spoiled else content))
    letters, missing = data.draw(st.tuples(st.booleans(), st.booleans()))
    taken_or_refused(lambda: score_predictions(folder / name, folder, "test", letters=letters, allow_missing=missing))


SAMPLE = {
    "id": "1",
    "images": ["a.png"],
    "turns": [{"role": "user", "text": "<image>\nq"}, {"role": "assistant", "text": "a"}],
    "metadata": {"answer": "a"},
}


@MANY
@given(data=st.data())
def test_prepared_samples(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("samples") / "x.jsonl"
    system = {**SAMPLE, "turns": [{"role": "system", "text": "s"}, *SAMPLE["turns"]]}
    path.write_text(json.dumps(replaced(data, data.draw(st.sampled_from([SAMPLE, system])))))
    taken_or_refused(lambda: read_samples(path))


@MANY
@given(content=st.binary(max_size=200))
def test_samples_of_any_bytes(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("samples") / "x.jsonl"
    path.write_bytes(content)
    taken_or_refused(lambda: read_samples(path))


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "a/../../b.png", "a\0.png", " "])
def test_image_paths_that_lead_away_are_refused_before_anything_is_opened(name):
    with pytest.raises(InputError, match="image path.*(leads out|no path)"):
        Sample.from_json({**SAMPLE, "images": [name]}, "x.jsonl, line 1")


def test_an_image_that_would_never_end_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "device.png"):
        with pytest.raises(InputError, match="not a regular file"):
            read_image(tmp_path / name, 10**6, name, inside=tmp_path)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return [load_tokenizer(make_sentencepiece(folder / "spm")), load_tokenizer(make_transformers(folder / "bpe"))]


@MANY
@given(data=st.data())
def test_conversation_templates(data, tokenizers):
    turns = [
        {
            "role": role,
            "text": data.draw(st.text(max_size=20) | st.sampled_from(["<image>", "<|im_end|>", "</s>", "{{ 7 }}"])),
        }
        for role in ("user", "assistant")
    ]
    images = ["a.png"] * turns[0]["text"].count("<image>")

    def encode():
        sample = Sample.from_json({"id": "1", "turns": turns, "images": images}, "here")
        for tokenizer in tokenizers:
            for template in TEMPLATES:
                if template == "chat" and tokenizer.chat_template is None:
                    continue
                whole, prompt = (
                    function(sample, tokenizer, template, 2) for function in (encode_sample, encode_prompt)
                )
                assert whole.input_ids[: len(prompt.input_ids)].tolist() == prompt.input_ids.tolist()

    taken_or_refused(encode)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content.__class__.__mro__[1].__subclasses__() }}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[99].content }}",
        "{{",
        "{{ raise_exception('no') }}",
        "{{ ''.join(messages) }}",
        "{{ 'x'.foo() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_chat_templates_that_fail_or_try_to_run_code(template, tmp_path):
    tokenizer = load_tokenizer(make_transformers(tmp_path / "bpe", chat_template=template))
    sample = Sample.from_json(
        {"id": "1", "turns": [{"role": "user", "text": "q"}, {"role": "assistant", "text": "a"}]}, "here"
    )
    with pytest.raises(InputError):
        encode_sample(sample, tokenizer, "chat", 2)


@MANY
@given(data=st.data())
def test_recipes(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text(
        yaml.safe_dump(replaced(data, yaml.safe_load(dump_config(Config()))), allow_unicode=True), errors="replace"
    )
    taken_or_refused(lambda: build_config(read_recipe(path)))


@MANY
@given(text=st.text(max_size=60) | st.text(st.sampled_from("{}[]:,-&*!|>'\"\n #a1?%@`"), max_size=40))
def test_recipes_of_any_text(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text(text)
    taken_or_refused(lambda: read_recipe(path))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "a: " * 5000,
        "{a: " * 5000,
        "a: &a [*a]",
        "- " * 5000,
        "a: !!python/object/apply:os.system ['true']",
        "? " * 3000,
        "1" * 20000,
    ],
)
def test_yaml_bombs(text, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError):
        read_recipe(tmp_path / "r.yaml")


@MANY
@given(data=st.data())
def test_deepspeeds_json(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("ds") / "ds.json"
    path.write_text(
        json.dumps(
            replaced(data, json.loads((Path(__file__).parents[1] / "ds_configs" / "zero2_offload.json").read_text()))
        )
    )
    taken_or_refused(lambda: resolve_ds_config(load_ds_json(path), Config(), 2))


def read_manifest_of(path):
    path.rename(path.with_name("manifest.json"))
    read_manifest(path.parent)


@pytest.mark.parametrize("content", [DEEP.encode(), b"\xff", b"1" * 10_000, b"{", b""])
@pytest.mark.parametrize(
    "reader",
    [
        load_ds_json,
        read_predictions,
        lambda path: read_samples(path),
        lambda path: list(read_records(path)),
        read_manifest_of,
    ],
)
def test_bombs_in_json(reader, content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError):
        reader(tmp_path / "x.json")


@MANY
@given(data=st.data())
def test_manifests_and_receipts(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifest")
    content = data.draw(st.binary(max_size=80) | ANYTHING.map(lambda value: json.dumps(value).encode()))
    for name in ("manifest.json", "checkpoint.json", RECEIPT):
        (folder / name).write_bytes(content + data.draw(st.sampled_from([b"", b"\n", b"\n{}\n"])))
    for reader in (read_manifest, open_checkpoint, lambda folder: read_receipt(folder / RECEIPT)):
        taken_or_refused(lambda: reader(folder))


def test_a_pickle_in_a_checkpoint_is_never_run(tmp_path):
    """Not even where its size and checksum are in the manifest: only safetensors are read."""
    path = save(Net(), tmp_path, 1)
    ran = tmp_path / "ran"
    bomb = b"cos\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR."
    manifest = json.loads((path / "checkpoint.json").read_text())
    manifest.pop("sha256")
    (path / "weights-00001.safetensors").write_bytes(bomb)
    manifest["files"]["weights-00001.safetensors"] = {
        "bytes": len(bomb),
        "sha256": sha256_of(path / "weights-00001.safetensors"),
    }
    (path / "checkpoint.json").write_text(dumps(manifest))
    with pytest.raises(InputError):
        dict(open_checkpoint(path).weights())
    assert not ran.exists()


def png_with_text(compressed: bytes, chunk: bytes = b"zTXt") -> bytes:
    """A picture of one pixel with a chunk of text in front of it."""
    stream = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, "PNG")
    plain = stream.getvalue()
    body = chunk + b"key\0\0" + compressed
    text = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    end_of_header = 8 + 25
    return plain[:end_of_header] + text + plain[end_of_header:]


@pytest.mark.parametrize("num_bytes", [1 << 16, 1 << 28])
def test_metadata_of_images_does_not_grow_without_bounds(num_bytes):
    """256 MiB of zeros are 256 KiB in a PNG's compressed text: refused, or left out, in either case without unpacking
    them."""
    data = png_with_text(zlib.compress(bytes(num_bytes), 9))
    tracemalloc.start()
    taken_or_refused(lambda: decode_image(data, 8, 1000, "x.png"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20

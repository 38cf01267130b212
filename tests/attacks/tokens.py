"""Attacks on tokenizers: state and files that a folder carries, gaps in ids, and what a vocabulary cannot spell."""

import json
import shutil
from pathlib import Path

from tests.attacks.attack import Shown, attack, refused, refuses, right, told
from tests.attacks.inputs import pack_words, sample, write_json, write_jsonl
from tests.support.vocabularies import CHATML, make_bert, make_metaspace, make_transformers, make_unigram
from vltrain.data.shards import read_manifest
from vltrain.data.text.conversation import encode_sample, stop_ids
from vltrain.data.text.instruction import InstructionSource, InstructionTokenizer
from vltrain.data.text.tokenizer import Tokenizer, load_tokenizer
from vltrain.evaluate.questions import unspellable
from vltrain.files.locate import locate
from vltrain.schema import Sample, Turn

STATE, FILES, SIZES, LOST = (
    "saved state of a tokenizer",
    "half of a tokenizer's files",
    "gaps in a vocabulary's ids",
    "text that a vocabulary loses",
)
TRUNCATION = {"direction": "Right", "max_length": 6, "strategy": "LongestFirst", "stride": 2}
PADDING = {
    "strategy": {"Fixed": 40},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<s>",
}
LONG = "which colour is the square? " * 8


def fast(folder: Path, changes: dict | None = None, settings: dict | None = None, **made) -> str:
    """A folder with tokenizer.json and tokenizer_config.json, of which keys are replaced."""
    place = Path(make_transformers(folder, **made))
    for name, changed in (("tokenizer.json", changes), ("tokenizer_config.json", settings)):
        if changed:
            write_json(place / name, {**json.loads((place / name).read_text()), **changed})
    return str(place)


def spread(folder: Path, **files: object) -> Path:
    """A folder with a sentencepiece model and small files beside it; `__` in their names stands for the full stop."""
    folder.mkdir()
    shutil.copy(locate("asset://tiny_llama/tokenizer.model"), folder)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def pair(question: str = "red?", answer: str = "yes") -> Sample:
    return Sample(id="s", turns=(Turn(role="user", text=question), Turn(role="assistant", text=answer)))


def same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    given = pair(LONG, "green " * 9)
    return (
        encode_sample(given, one, "mmt", 4).input_ids.tolist()
        == encode_sample(given, other, "mmt", 4).input_ids.tolist()
    )


@attack(STATE)
def truncation(folder: Path) -> Shown:
    """tokenizer.json says to cut texts to 6 tokens."""
    assert same_ids(
        load_tokenizer(fast(folder / "cut", {"truncation": TRUNCATION})), load_tokenizer(fast(folder / "plain"))
    )
    return right("texts are tokenised whole")


@attack(STATE)
def padding(folder: Path) -> Shown:
    """tokenizer.json says to fill texts up to 40 tokens."""
    padded, plain = (
        load_tokenizer(fast(folder / "padded", {"padding": PADDING})),
        load_tokenizer(fast(folder / "plain")),
    )
    assert same_ids(padded, plain) and padded.fingerprint == plain.fingerprint
    return right("nothing is filled up, and shards of both are the same")


@attack(STATE)
def dropout_of_merges(folder: Path) -> Shown:
    """A BPE that leaves out half of its merges, others each time."""
    place = Path(fast(folder / "t"))
    saved = json.loads((place / "tokenizer.json").read_text())
    saved["model"]["dropout"] = 0.5
    write_json(place / "tokenizer.json", saved)
    samples = write_jsonl(folder / "s.jsonl", [sample(number, question=LONG) for number in range(3)])
    assert same_ids(load_tokenizer(str(place)), load_tokenizer(fast(folder / "plain")))
    words = [
        str(place) if word == "asset://tiny_llama" else word
        for word in pack_words(samples, folder / "packs", pack_length=256)
    ]
    return told(words, "a dropout of 0.5 of its merges (random tokens)", "left out")


@attack(STATE)
def sampled_pieces(folder: Path) -> Shown:
    """tokenizer_config.json lets sentencepiece draw pieces at random."""
    drawn = {
        "tokenizer_class": "LlamaTokenizer",
        "sp_model_kwargs": {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1},
    }
    return refuses(
        lambda: load_tokenizer(str(spread(folder / "t", tokenizer_config__json=drawn))),
        "sp_model_kwargs.enable_sampling",
    )


@attack(STATE)
def truncation_of_the_qformers(folder: Path) -> Shown:
    """The Q-Former's tokenizer.json says to cut and to fill up."""
    place = make_bert(folder / "bert")
    whole = InstructionTokenizer(InstructionSource(source=place, max_tokens=64)).encode(LONG)
    saved = json.loads((Path(place) / "tokenizer.json").read_text())
    write_json(
        Path(place) / "tokenizer.json",
        {**saved, "truncation": TRUNCATION, "padding": {**PADDING, "pad_token": "[PAD]"}},
    )
    assert (
        InstructionTokenizer(InstructionSource(source=place, max_tokens=64)).encode(LONG) == whole
        and len(whole[0]) > 20
    )
    return right("prompts are read whole, up to qformer_tokens")


@attack(STATE)
def clean_up_of_spaces(folder: Path) -> Shown:
    """tokenizer_config.json tidies decoded text, so that `yes .` comes back as `yes.`."""
    tokenizer = load_tokenizer(
        fast(
            folder / "t",
            settings={"clean_up_tokenization_spaces": True, "split_special_tokens": True, "model_max_length": 4},
        )
    )
    assert tokenizer.decode(tokenizer.encode("yes . it 's")) == "yes . it 's" and tokenizer.encode_markup(
        "<|im_end|>"
    ) == [3]
    return right("decoded text is what was encoded")


@attack(SIZES)
def gap_below_the_rows(folder: Path) -> Shown:
    """The end token's id is 700 in a vocabulary of 318 tokens, and the LLM has 768 rows."""
    tokenizer = load_tokenizer(gap_in_ids(folder, 700))
    assert (
        tokenizer.vocab_size == 701
        and stop_ids(tokenizer, "mmt") == (700,)
        and tokenizer.decode([*tokenizer.encode("red"), 500]) == "red"
    )
    return right("701 rows are looked at, so that answers can end")


@attack(SIZES)
def gap_beyond_the_rows(folder: Path) -> Shown:
    """The end token's id is 900, and the LLM has 768 rows: asked by plan."""
    return refused(
        ["plan", "quickstart", "--model.llm.tokenizer", gap_in_ids(folder, 900)],
        "the tokenizer has 901 tokens (ids up to 900) but the LLM embeds 768",
    )


@attack(SIZES)
def gap_when_training(folder: Path) -> Shown:
    """The same before training, which must leave nothing behind but its folder."""
    words = [
        "--model.llm.tokenizer",
        gap_in_ids(folder, 768),
        "--data.root",
        folder / "root",
        "--output",
        folder / "run",
    ]
    return refused(
        ["train", "--ds", "ds_configs/zero1.json", *words], "the tokenizer has 769 tokens", "the LLM embeds 768"
    )


@attack(SIZES)
def gap_in_the_qformers(folder: Path) -> Shown:
    """A token of the Q-Former's tokenizer lies beyond the Q-Former's table."""
    place = make_bert(folder / "bert")
    saved = json.loads((Path(place) / "tokenizer.json").read_text())
    saved["model"]["vocab"]["far"] = 5000
    write_json(Path(place) / "tokenizer.json", saved)
    words = ["plan", "qformer_shapes", "--model.instructblip.qformer_tokenizer", place]
    return refused(words, "the Q-Former's tokenizer has 5001 tokens but the Q-Former embeds 190")


def gap_in_ids(folder: Path, number: int) -> str:
    """A tokenizer's folder whose end token has that id."""
    place = Path(fast(folder / "gap"))
    saved = json.loads((place / "tokenizer.json").read_text())
    next(token for token in saved["added_tokens"] if token["content"] == "</s>")["id"] = number
    saved["model"]["vocab"]["</s>"] = number
    write_json(place / "tokenizer.json", saved)
    return str(place)


@attack(FILES)
def added_tokens(folder: Path) -> Shown:
    """Added tokens, end token and chat template stand beside a tokenizer.model: each combination, beside
    transformers."""
    from transformers import AutoTokenizer

    llama, added = {"tokenizer_class": "LlamaTokenizer"}, {"<|im_start|>": 768, "<|im_end|>": 769}
    combinations = [
        {
            "added_tokens__json": added,
            "tokenizer_config__json": {**llama, "eos_token": "<|im_end|>", "chat_template": CHATML},
        },
        {
            "added_tokens__json": added,
            "special_tokens_map__json": {"eos_token": {"content": "<|im_end|>"}},
            "chat_template__jinja": CHATML,
        },
        {"added_tokens__json": added},
        {"tokenizer_config__json": {**llama, "eos_token": "<unk>"}},
        {
            "tokenizer_config__json": {
                **llama,
                "added_tokens_decoder": {"768": _token("<|im_end|>")},
                "eos_token": "<|im_end|>",
            }
        },
        {"tokenizer_config__json": {**llama, "extra_special_tokens": ["<|im_end|>"]}, "chat_template__jinja": CHATML},
        {
            "tokenizer_config__json": {
                **llama,
                "chat_template": [{"name": "default", "template": CHATML}, {"name": "rag", "template": "x"}],
            }
        },
    ]
    for number, files in enumerate(combinations):
        place = str(spread(folder / f"{number}", **files))
        ours, theirs = load_tokenizer(place), AutoTokenizer.from_pretrained(place)
        template = theirs.chat_template["default"] if isinstance(theirs.chat_template, dict) else theirs.chat_template
        assert (ours.eos_id, ours.bos_id, ours.vocab_size, ours.chat_template) == (
            theirs.eos_token_id,
            theirs.bos_token_id,
            len(theirs),
            template,
        ), files
        text = "Question: is it red?\nAnswer: yes<|im_end|>"
        assert ours.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], (
            files
        )
    return right(f"{len(combinations)} combinations are read as transformers reads them")


@attack(FILES)
def ids_that_no_loader_gives(folder: Path) -> Shown:
    """added_tokens.json leaves a gap that the loader closes, so that the token would be another row."""
    place = spread(
        folder / "t",
        added_tokens__json={"<|im_end|>": 769},
        tokenizer_config__json={"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>"},
    )
    return refuses(lambda: load_tokenizer(str(place)), "added_tokens.json", "'<|im_end|>' is 769", "it is 768")


@attack(FILES)
def two_end_tokens(folder: Path) -> Shown:
    """special_tokens_map.json ends answers with another token than tokenizer_config.json."""
    place = fast(folder / "t")
    write_json(Path(place) / "special_tokens_map.json", {"eos_token": "<|im_end|>"})
    return refuses(lambda: load_tokenizer(place), "the eos token is")


@attack(FILES)
def two_chat_templates(folder: Path) -> Shown:
    """chat_template.jinja and tokenizer_config.json hold different chat templates."""
    place = fast(folder / "t", settings={"chat_template": "{{ messages }}"})
    return refuses(
        lambda: load_tokenizer(place), "tokenizer_config.json and chat_template.jinja", "different chat templates"
    )


@attack(FILES)
def chat_template_of_a_processor(folder: Path) -> Shown:
    """The chat template is in chat_template.json alone, as processors save it."""
    place = spread(
        folder / "t",
        chat_template__json={"chat_template": CHATML},
        added_tokens__json={"<|im_start|>": 768, "<|im_end|>": 769},
    )
    assert load_tokenizer(str(place)).chat_template == CHATML
    return right("it is read")


@attack(FILES)
def settings_without_a_vocabulary(folder: Path) -> Shown:
    """Only tokenizer_config.json was fetched: transformers makes a tokenizer of three special tokens of it."""
    write_json(folder / "t" / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"})
    return refuses(lambda: load_tokenizer(str(folder / "t")), "no vocabulary is there", "files are missing")


@attack(FILES)
def qformers_settings_without_a_vocabulary(folder: Path) -> Shown:
    """Only the tokenizer_config.json of the Q-Former's tokenizer was fetched."""
    write_json(folder / "t" / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})
    return refuses(
        lambda: InstructionTokenizer(InstructionSource(source=str(folder / "t"), max_tokens=8)), str(folder / "t")
    )


@attack(FILES)
def one_file_named_of_several(folder: Path) -> Shown:
    """The recipe names tokenizer.model, but its folder adds tokens to it."""
    place = spread(folder / "t", added_tokens__json={"<|im_end|>": 768})
    return refuses(lambda: load_tokenizer(str(place / "tokenizer.model")), "added_tokens.json", "name the folder")


@attack(FILES)
def stale_model_beside_tokenizer_json(folder: Path) -> Shown:
    """tokenizer.model, spiece.model or vocab.json is of another vocabulary than the tokenizer.json beside it."""
    place = Path(make_metaspace(folder / "t", CHATML))
    shutil.copy(locate("asset://tiny_llama/tokenizer.model"), place)
    refuses(lambda: load_tokenizer(str(place)), "tokenizer.model: the token", "as transformers reads the folder it is")
    (place / "tokenizer.model").rename(place / "spiece.model")
    refuses(lambda: load_tokenizer(str(place)), "spiece.model: the token")
    (place / "spiece.model").unlink()
    write_json(place / "vocab.json", {"<s>": 7})
    return refuses(lambda: load_tokenizer(str(place)), "vocab.json: the token '<s>' is 7")


@attack(FILES)
def another_end_by_the_generation_config(folder: Path) -> Shown:
    """generation_config.json ends answers with two more tokens, one of them not marked as special."""
    place = Path(fast(folder / "t"))
    saved = json.loads((place / "tokenizer.json").read_text())
    saved["added_tokens"].append({**_token("<end_of_turn>"), "special": False, "id": 318})
    write_json(place / "tokenizer.json", saved)
    write_json(place / "generation_config.json", {"eos_token_id": [3, 318]})
    tokenizer = load_tokenizer(str(place))
    assert stop_ids(tokenizer, "mmt") == (1, 3, 318) and not {3, 318} & set(
        tokenizer.encode("a<end_of_turn>b<|im_end|>")
    )
    return right("generation stops at all three, and text that spells one stays text")


@attack(FILES)
def end_token_that_no_vocabulary_holds(folder: Path) -> Shown:
    """tokenizer_config.json ends answers with a token that is nowhere: transformers makes up a new row for it."""
    place = fast(folder / "t", settings={"eos_token": "<|eot|>"})
    refuses(
        lambda: load_tokenizer(
            str(
                spread(
                    folder / "m", tokenizer_config__json={"tokenizer_class": "LlamaTokenizer", "eos_token": "<|eot|>"}
                )
            )
        ),
        "'<|eot|>'",
    )
    return refuses(lambda: load_tokenizer(place), "names the eos token '<|eot|>'", "no file of the vocabulary holds")


@attack(FILES)
def foreign_generation_config(folder: Path) -> Shown:
    """generation_config.json is of a model with a larger vocabulary."""
    place = fast(folder / "t")
    write_json(Path(place) / "generation_config.json", {"eos_token_id": 128009})
    return refuses(lambda: load_tokenizer(place), "generation_config.json", "128009", "beyond the vocabulary")


def _token(content: str) -> dict:
    return {
        "content": content,
        "special": True,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
    }


@attack(LOST)
def unknown_characters(folder: Path) -> Shown:
    """A vocabulary without braces and line ends, as T5's: H{2}O."""
    samples = write_jsonl(
        folder / "s.jsonl",
        [
            sample(1, question="which formula?", answer="(a) H{2}O"),
            sample(2, question="1\n2?"),
            sample(3, question="{ yes?"),
        ],
    )
    words = [
        make_unigram(folder / "t") if word == "asset://tiny_llama" else word
        for word in pack_words(samples, folder / "packs")
    ]
    shown = told(words, "3 of 3 samples contain text that the vocabulary cannot encode", "'{' in 2", "'}' in 1")
    lost = read_manifest(folder / "packs").lost
    assert (
        lost is not None
        and (lost["unknown"], lost["altered"], lost["parts"]["\n"]) == (3, 1, 1)
        and lost["examples"][0][0] == "1"
    )
    return shown


@attack(LOST)
def dropped_characters(folder: Path) -> Shown:
    """A BPE without an unknown token leaves out what it cannot spell."""
    samples = write_jsonl(
        folder / "s.jsonl", [sample(number, question="Which colour is it?", answer="It is ☃") for number in range(2)]
    )
    words = [
        make_metaspace(folder / "t", None, unk=None) if word == "asset://tiny_llama" else word
        for word in pack_words(samples, folder / "packs")
    ]
    return told(words, "2 of 2 samples", "'☃' in 2")


@attack(LOST)
def answers_in_lower_case(folder: Path) -> Shown:
    """A vocabulary that lowers case: what is learned is not what stands there."""
    samples = write_jsonl(folder / "s.jsonl", [sample(1, answer="YES"), sample(2, answer="no")])
    place = make_unigram(folder / "t", lowercase=True)
    words = [place if word == "asset://tiny_llama" else word for word in pack_words(samples, folder / "packs")]
    return told(words, "the answers of 1 of 2 samples decode differently from their tokens", "'YES' as 'yes'")


@attack(LOST)
def references_that_cannot_be_said(folder: Path) -> Shown:
    """Evaluation by a vocabulary that cannot spell a reference; lower case alone is none of the scorer's business."""
    tokenizer = load_tokenizer(make_unigram(folder / "t", lowercase=True))
    samples = [pair(answer="(a) H{2}O"), pair(answer="YES"), pair(answer="yes")]
    assert [lost[1] for lost in unspellable(samples, tokenizer, "exact", "x")] == ["(a) H{2}O"]
    return right("one reference of three is told to be out of reach")


@attack(LOST)
def nothing_is_lost(folder: Path) -> Shown:
    """A vocabulary of bytes spells everything: nothing may be told, and the manifest stays as it was."""
    samples = write_jsonl(folder / "s.jsonl", [sample(1, question="你好 🙂 {", answer="é\n☃")])
    shown = told(pack_words(samples, folder / "packs"), "1 packs, 1 samples")
    assert "lost" not in json.loads((folder / "packs" / "manifest.json").read_text())
    return shown

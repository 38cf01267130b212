"""Tiny tokenizers, made on the spot: a LLaMA-style sentencepiece model, and a byte-level BPE with a chat template."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data_prep.tokenizer import train_tokenizer

TEXT = "Image: N/A red? yes no blue circle\nQuestion: which colour is the square?\nAnswer: green\n"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


def make_sentencepiece(folder: Path, text: str = TEXT, vocab_size: int = 300) -> str:
    """Returns the folder, which has a `tokenizer.model`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = folder.parent / f"{folder.name}.txt"
    source.write_text(text * 30)
    train_tokenizer([source], vocab_size, folder)
    return str(folder)


def make_transformers(
    folder: Path, text: str = TEXT, chat_template: str | None = CHATML, eos: str | None = "</s>", named: bool = True
) -> str:
    """Returns the folder, which has a `tokenizer.json`. `named`: its settings name the chat's special tokens too."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text] * 30, trainer)
    names = {
        "bos_token": "<s>",
        "additional_special_tokens": list(SPECIAL[2:]) if named else [],
        **({"eos_token": eos} if eos else {}),
    }
    outer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    outer.chat_template = chat_template
    outer.save_pretrained(folder)
    return str(folder)


def make_metaspace(
    folder: Path,
    chat_template: str | None,
    unk: str | None = "<unk>",
    text: str = "[INST] Image: N/A\nWhich colour is it? [/INST] It is red yes no blue",
) -> str:
    """A BPE with word marks, as LLaMA's: a piece of text by itself begins with one. Returns the folder."""
    bpe = Tokenizer(models.BPE(unk_token=unk))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split("\n", "isolated")]
    )
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    special = [*([unk] if unk else []), *SPECIAL]
    bpe.train_from_iterator(
        [text + " <|user|> <|assistant|> user assistant system"] * 50,
        trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False),
    )
    outer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", **({"unk_token": unk} if unk else {})
    )
    outer.chat_template = chat_template
    outer.save_pretrained(folder)
    return str(folder)


def make_unigram(folder: Path, lowercase: bool = False) -> str:
    """A Unigram without byte fallback, as T5's: no braces and no line end. Returns the folder."""
    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), *([normalizers.Lowercase()] if lowercase else [])])
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=70, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    unigram.train_from_iterator(["which formula? (a) HO2 (b) CH4 yes no 1 2 3 YES QES Image: N/A"] * 50, trainer)
    PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return str(folder)


def make_bert(folder: Path) -> str:
    """A WordPiece with [CLS] and [SEP], as a Q-Former's, of fewer than 190 tokens. Returns the folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"which colour is the square ?".split()]
    bert = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    bert.normalizer, bert.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    bert.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    PreTrainedTokenizerFast(tokenizer_object=bert, **named).save_pretrained(folder)
    return str(folder)

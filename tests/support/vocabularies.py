"""Tiny tokenizers, made on the spot: a LLaMA-style sentencepiece model, and a byte-level BPE with a chat template."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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


def make_transformers(folder: Path, text: str = TEXT, chat_template: str | None = CHATML, eos: str | None = "</s>", named: bool = True) -> str:
    """Returns the folder, which has a `tokenizer.json`. `named`: its settings name the chat's special tokens too."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([text] * 30, trainer)
    names = {"bos_token": "<s>", "additional_special_tokens": list(SPECIAL[2:]) if named else [], **({"eos_token": eos} if eos else {})}
    outer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    outer.chat_template = chat_template
    outer.save_pretrained(folder)
    return str(folder)

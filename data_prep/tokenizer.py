"""Trains a small LLaMA-style tokenizer: `python -m data_prep.tokenizer --text FILES --vocab-size N --output DIR`.

Byte-pair merges with byte fallback (any text can be written), digits split one by one, text kept as it is (identity
normalisation), unk 0, bos 1, eos 2: the settings of LLaMA's own `tokenizer.model`. For miniature models; a pretrained
model keeps its own.
"""

from __future__ import annotations

import io
from pathlib import Path

import sentencepiece

from data_prep.command_line import CommandLine, whole
from vltrain.config.ranges import MOST_SIZE
from vltrain.data.folder import new_folder
from vltrain.errors import InputError, exits_cleanly
from vltrain.files.strict_json import read_text


def train_tokenizer(text: list[Path], vocab_size: int, output: Path) -> None:
    """Trains on the lines of the files `text` and writes `output/tokenizer.model`.

    Raises:
        InputError: a text file that cannot be read or is empty, a vocabulary larger than the text supports, an existing
            output.
    """
    lines: list[str] = []
    for path in text:
        lines += [line.removesuffix("\r") for line in read_text(path, "a text to learn from").split("\n")]
    if not any(line.strip() for line in lines):
        raise InputError(f"no text in {', '.join(map(str, text))}; a tokenizer needs some to learn from")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=1.0,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(
            f"--vocab-size {vocab_size}: sentencepiece refuses ({str(error).splitlines()[-1].strip()})"
        ) from None
    with new_folder(output) as folder:
        (folder / "tokenizer.model").write_bytes(model.getvalue())


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine("tokenizer", "Train a small LLaMA-style tokenizer.", arguments)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 text files, a sentence per line")
    parser.add_argument(
        "--vocab-size",
        type=whole(1, MOST_SIZE),
        required=True,
        help="pieces, the 256 bytes and 3 control tokens included",
    )
    parser.add_argument("--output", type=Path, required=True, help="new folder, gets tokenizer.model")
    options = parser.read()
    train_tokenizer(options.text, options.vocab_size, options.output)
    print(f"wrote {options.output / 'tokenizer.model'} ({options.vocab_size} pieces)")


if __name__ == "__main__":
    raise SystemExit(main())

"""Shows what is in packed shards: `python -m data_prep.peek FOLDER [--row N]`.

Prints one pack segment by segment as the model sees it. What carries loss stands between `>>` and `<<`; images and
modality tokens are named.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from data_prep.command_line import CommandLine, whole
from vltrain.config.ranges import MOST_STEPS
from vltrain.data.shards import STOCK_FORMAT, PackedDataset
from vltrain.data.text.conversation import find_template, fingerprint
from vltrain.data.text.tokenizer import Tokenizer, TransformersTokenizer, load_tokenizer
from vltrain.errors import InputError, exits_cleanly
from vltrain.files.locate import locate
from vltrain.schema import IMAGE_MODALITY_TOKEN, IMAGE_TOKEN, TEXT_MODALITY_TOKEN

MODALITY = {TEXT_MODALITY_TOKEN: "[u_text]", IMAGE_MODALITY_TOKEN: "[u_image]"}


def describe(dataset: PackedDataset, number: int, tokenizer: Tokenizer) -> str:
    """The text that shows pack `number`. Raises InputError if there is no such pack."""
    if not 0 <= number < len(dataset):
        raise InputError(f"{dataset.folder}: --row {number}: it has packs 0 to {len(dataset) - 1}")
    row = dataset.row(number)
    slots = iter(row.image_slots.tolist())
    lines = [
        f"pack {number}: {len(row.input_ids)} of {dataset.manifest.pack_length} tokens, "
        f"{int(row.loss_mask.sum())} with loss, "
        f"{len(row.sample_ids)} samples, {len(row.image_ids)} images"
    ]
    start = 0
    for length, name in zip(row.segment_lengths.tolist(), row.sample_ids, strict=True):
        tokens, losses = row.input_ids[start : start + length].tolist(), row.loss_mask[start : start + length].tolist()
        shown = (
            _stock_segment(tokens, losses, tokenizer)
            if dataset.manifest.format_version == STOCK_FORMAT
            else _segment(tokens, losses, row.image_ids.tolist(), slots, dataset, tokenizer)
        )
        lines.append(f"--- {name} ({length} tokens, at {start})\n{shown}")
        start += length
    return "\n".join(lines)


def _stock_segment(tokens: list[int], losses: list[bool], tokenizer: Tokenizer) -> str:
    """As `_segment`, of a stock model, whose special tokens are shown as they are, runs of one as one."""
    names, text = tokenizer.special_names(), ""
    for (has_loss, number), run in itertools.groupby(
        zip(tokens, losses, strict=True), key=lambda one: (one[1], one[0] if one[0] in names else -1)
    ):
        ids = [token for token, _ in run]
        words = tokenizer.decode(ids) if number < 0 else names[number] + (f" x {len(ids)} " if len(ids) > 1 else "")
        text += f">>{words}<<" if has_loss else words
    return text.replace("<<>>", "")


def _segment(
    tokens: list[int],
    losses: list[bool],
    image_ids: list[int],
    slots: Iterator[int],
    dataset: PackedDataset,
    tokenizer: Tokenizer,
) -> str:
    visual_tokens = dataset.manifest.visual_tokens
    text, place = "", 0
    while place < len(tokens):
        token, has_loss = tokens[place], losses[place]
        if token == IMAGE_TOKEN:
            text += f"[image {image_ids[next(slots)]}: {visual_tokens} tokens]"
            place += visual_tokens
            continue
        if token in MODALITY:
            text, place = text + MODALITY[token], place + 1
            continue
        end = place
        while end < len(tokens) and tokens[end] >= 0 and losses[end] == has_loss:
            end += 1
        words = _words(tokens[place:end], tokenizer)
        text, place = text + (f">>{words}<<" if has_loss else words), end
    return text


def _words(ids: list[int], tokenizer: Tokenizer) -> str:
    marks = {tokenizer.bos_id: "[BOS]", tokenizer.eos_id: "[EOS]"}
    text = ""
    run: list[int] = []
    for one in [*ids, None]:
        if one is None or one in marks:
            text += (tokenizer.decode(run) if run else "") + marks.get(one, "")
            run = []
        else:
            run.append(one)
    return text


def _tokenizer_of(dataset: PackedDataset) -> Tokenizer:
    """The tokenizer that the packs name. Raises InputError if another one is there by now, whose words would be
    shown."""
    manifest = dataset.manifest
    if manifest.format_version == STOCK_FORMAT:
        print("packed with a processor, whose settings are not named here: whether it still is that is not compared")
        return TransformersTokenizer(locate(manifest.tokenizer))
    tokenizer = load_tokenizer(manifest.tokenizer)
    if find_template(manifest.template).instruction:
        print(
            "packed with a Q-Former's tokenizer too, which is not named here: whether the LLM's is still the "
            "one that they were packed with is not compared"
        )
    elif fingerprint(tokenizer, manifest.template) != manifest.tokenizer_fingerprint:
        raise InputError(
            f"{dataset.folder}: was packed with another tokenizer than {manifest.tokenizer} is now; restore "
            "that, or pack the samples again"
        )
    return tokenizer


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(
        "peek", "Show a pack as the model sees it.", arguments, ("data/easyvqa/packed/train-FINGERPRINT --row 3",)
    )
    parser.add_argument("folder", type=Path, help="packed shards")
    parser.add_argument("--row", type=whole(0, MOST_STEPS), default=0, help="which pack")
    options = parser.read()
    dataset = PackedDataset(options.folder, verify=False)
    print(describe(dataset, options.row, _tokenizer_of(dataset)))


if __name__ == "__main__":
    raise SystemExit(main())

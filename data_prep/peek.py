"""Shows what is in packed shards: `python -m data_prep.peek FOLDER [--row N] [--html FILE]`.

Prints one pack segment by segment as the model sees it. What carries loss stands between `>>` and `<<`; images and
modality tokens are named. `--html` draws the same as a page that opens in any browser and loads nothing: tokens
coloured by label, with ids and positions, and the images.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from data_prep.command_line import CommandLine, whole
from vltrain.config.ranges import MOST_STEPS
from vltrain.config.schema import DataConfig
from vltrain.data.folder import refuse_existing_file
from vltrain.data.remote.address import place_of
from vltrain.data.shards import STOCK_FORMAT, PackedDataset
from vltrain.data.stream.mixed import open_packed
from vltrain.data.text.conversation import find_template, fingerprint
from vltrain.data.text.tokenizer import Tokenizer, TransformersTokenizer, load_tokenizer
from vltrain.errors import InputError, exits_cleanly
from vltrain.files.atomic import write_whole
from vltrain.files.locate import locate
from vltrain.html.markup import page, tag
from vltrain.html.packs import DrawnPack, PackPage, legend
from vltrain.html.pieces import Piece, segments_of
from vltrain.schema import PackedRow


def describe(dataset: PackedDataset, number: int, tokenizer: Tokenizer) -> str:
    """The text that shows pack `number`. Raises InputError if there is no such pack."""
    row = _row(dataset, number)
    lines = [f"pack {number}: {_summary(dataset, row)}"]
    start = 0
    segments = segments_of(row, dataset.manifest, tokenizer)
    for length, name, pieces in zip(row.segment_lengths.tolist(), row.sample_ids, segments, strict=True):
        images = [None if piece.image is None else int(row.image_ids[piece.image]) for piece in pieces]
        lines.append(f"--- {name} ({length} tokens, at {start})\n{_written(pieces, images)}")
        start += length
    return "\n".join(lines)


def _row(dataset: PackedDataset, number: int) -> PackedRow:
    if not 0 <= number < len(dataset):
        raise InputError(f"{dataset.place}: --row {number}: it has packs 0 to {len(dataset) - 1}")
    return dataset.row(number)


def _summary(dataset: PackedDataset, row: PackedRow) -> str:
    return (
        f"{len(row.input_ids)} of {dataset.manifest.pack_length} tokens, {int(row.loss_mask.sum())} with loss, "
        f"{len(row.sample_ids)} samples, {len(row.image_ids)} images"
    )


def _written(pieces: list[Piece], images: list[int | None]) -> str:
    """A segment as one text. `images`: the number of each piece's image."""
    text = ""
    for has_loss, run in itertools.groupby(zip(pieces, images, strict=True), key=lambda one: one[0].has_loss):
        words = "".join(_word(piece, image) for piece, image in run)
        text += f">>{words}<<" if has_loss else words
    return text


def _word(piece: Piece, image: int | None) -> str:
    if piece.kind == "image":
        return f"[image {image}: {piece.count} tokens]"
    return piece.text + (f" x {piece.count} " if piece.count > 1 else "")


def draw(dataset: PackedDataset, number: int, tokenizer: Tokenizer) -> str:
    """The HTML document that shows pack `number`. Raises InputError if there is no such pack."""
    row = _row(dataset, number)
    pack = PackPage(dataset, tokenizer, DataConfig().max_image_pixels).pack(number)
    return page(
        f"Pack {number}",
        tag("p", f"{dataset.place}: {_summary(dataset, row)}; template {dataset.manifest.template}.", Class="note"),
        legend(by_loss=False),
        pack.strip(lambda segment: f"#s{segment}"),
        *(_draw_segment(pack, segment, name) for segment, name in enumerate(row.sample_ids)),
    )


def _draw_segment(pack: DrawnPack, segment: int, name: str) -> str:
    head = tag("header", tag("h3", name), tag("p", f"segment {segment}: {pack.span(segment)}", Class="note"))
    texts = tag("div", pack.tokens(segment), Class="texts")
    return tag(
        "section", head, tag("div", pack.images(segment), texts, Class="columns"), Class="card", id=f"s{segment}"
    )


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
            f"{dataset.place}: was packed with another tokenizer than {manifest.tokenizer} is now; restore "
            "that, or pack the samples again"
        )
    return tokenizer


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(
        "peek",
        "Show a pack as the model sees it.",
        arguments,
        ("data/easyvqa/packed/train-FINGERPRINT --row 3", "data/easyvqa/packed/train-FINGERPRINT --html pack.html"),
    )
    parser.add_argument("folder", type=place_of, help="packed shards, a path or an address (s3://...)")
    parser.add_argument("--row", type=whole(0, MOST_STEPS), default=0, help="which pack")
    parser.add_argument("--html", type=Path, metavar="FILE", help="draw it as a page, into this new file")
    options = parser.read()
    dataset = open_packed(options.folder, verify=False)
    if options.html is None:
        print(describe(dataset, options.row, _tokenizer_of(dataset)))
        return
    refuse_existing_file(options.html)
    write_whole(options.html, draw(dataset, options.row, _tokenizer_of(dataset)))
    print(f"{options.html}: pack {options.row} of {dataset.place}")


if __name__ == "__main__":
    raise SystemExit(main())

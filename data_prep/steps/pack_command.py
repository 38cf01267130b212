"""The command line of `data_prep.pack`."""

from __future__ import annotations

from argparse import Namespace

from data_prep.command_line import CommandLine, add_quiet_option, folder_here, whole
from data_prep.parts import add_share_options
from data_prep.tokens import PackSettings
from vltrain.config.model.base import ProcessorPlaces
from vltrain.config.ranges import MOST_PIXELS, MOST_SEED, MOST_SIZE, MOST_TOKENS, MOST_WORKERS
from vltrain.config.schema import DataConfig
from vltrain.data.text.conversation import PROCESSOR, TEMPLATES
from vltrain.data.text.instruction import InstructionSource
from vltrain.errors import InputError

MAX_IMAGE_PIXELS = DataConfig().max_image_pixels


def pack_options(arguments: list[str] | None, examples: tuple[str, ...]) -> CommandLine:
    parser = CommandLine("pack", "Tokenise and pack samples.", arguments, examples)
    parser.add_argument(
        "--samples",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSONL file that data_prep.prepare wrote; or several as SET=FILE, packed together, a sample as SET/ID",
    )
    parser.add_argument("--tokenizer", help="folder, file, hub name, asset:// or package://")
    parser.add_argument("--template", default="mmt", help=f"one of {', '.join(TEMPLATES)}")
    parser.add_argument("--visual-tokens", type=whole(1, MOST_SIZE), help="tokens that an image takes in the model")
    parser.add_argument(
        "--processor",
        help="for a stock model, in the place of the three above: folder or hub name of its processor and config.json",
    )
    parser.add_argument(
        "--qformer-tokenizer", help="for an InstructBLIP: the tokenizer by which its Q-Former reads prompts"
    )
    parser.add_argument(
        "--qformer-tokens",
        type=whole(3, MOST_SIZE),
        default=128,
        help="tokens of a prompt that the Q-Former reads at most",
    )
    parser.add_argument("--pack-length", type=whole(8, MOST_TOKENS), required=True, help="tokens that a pack holds")
    parser.add_argument("--output", type=folder_here, required=True, help="new folder")
    parser.add_argument(
        "--max-images", type=whole(1, MOST_SIZE), help="images that a pack may hold (default: no bound)"
    )
    parser.add_argument("--seed", type=whole(0, MOST_SEED), default=0, help="of the assignment to packs")
    parser.add_argument(
        "--fraction", type=float, default=1.0, help="share of the samples, drawn by a hash of their ids"
    )
    parser.add_argument("--fraction-seed", type=whole(0, MOST_SEED), default=0, help="which samples that draws")
    parser.add_argument("--workers", type=whole(1, MOST_WORKERS), help="processes (default: all cores)")
    parser.add_argument(
        "--over-long", default="error", help="error (default) or drop: what to do with samples longer than a pack"
    )
    parser.add_argument(
        "--max-image-pixels", type=whole(1, MOST_PIXELS), default=MAX_IMAGE_PIXELS, help="larger images are refused"
    )
    add_share_options(parser)
    add_quiet_option(parser)
    parser.add_argument("--rebuild", action="store_true", help="replace existing packs, once the new ones are complete")
    return parser


def settings_of(given: Namespace) -> PackSettings:
    read_with, place = given.qformer_tokenizer, given.processor
    if place is None and None in (given.tokenizer, given.visual_tokens):
        raise InputError(
            "--tokenizer, --visual-tokens: found neither both nor a --processor; expected both, or of a stock model "
            "its --processor"
        )
    if place is not None and (given.tokenizer, given.visual_tokens, given.template) != (None, None, "mmt"):
        raise InputError("--processor: it brings tokenizer, template and visual tokens; leave those out")
    return PackSettings(
        tokenizer=place or given.tokenizer,
        template=PROCESSOR if place else given.template,
        visual_tokens=given.visual_tokens or 0,
        pack_length=given.pack_length,
        max_images=given.max_images,
        seed=given.seed,
        fraction=given.fraction,
        fraction_seed=given.fraction_seed,
        over_long=given.over_long,
        max_image_pixels=given.max_image_pixels,
        instruction=InstructionSource(source=read_with, max_tokens=given.qformer_tokens) if read_with else None,
        processor=ProcessorPlaces(key="--processor", source=place, model=place, config={}, options={})
        if place
        else None,
    )

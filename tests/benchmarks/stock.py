"""Useful tokens a second of a stock vision-language model: our trainer beside TRL's SFTTrainer, on the same network,
processor, pictures and optimizer.

    python -m tests.benchmarks.stock [--precision fp32 bf16] [--edge 512] [--pack-length 2048] [--json OUT] [--quick]

A random model of SmolVLM-256M's shape, LoRA of rank 8 on its LLM. Questions have ScienceQA's lengths, and half of them
a photograph of one of many sizes, a JPEG. TRL's trainer for vision-language models pads each batch to its longest
sample and collates as it trains; batches are of as many samples as a pack of ours holds on average. Useful tokens are
those of samples: prompt, image and answer, no padding. Ours runs twice: encoding images in every step as TRL does, and
with `train.keep_image_features`; what computing these takes is measured and shared out over the epochs of our recipes
(`--epochs`), a step being charged by its tokens. Beside them: the bytes of tensors alive at the peak of forward and
backward, and our losses beside a plain loop over single samples by transformers' own forward and loss. Wants, in an
environment of its own: pip install torch torchvision num2words -e '.[bench]'.
"""

from __future__ import annotations

import io
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import ProcessorMixin

from data_prep.pack import pack
from data_prep.tokens import PackSettings
from tests.benchmarks.measure import alternate, command, median_ratio, report, settled, tell
from tests.benchmarks.ours import DTYPES, OurSteps, our_trainer
from tests.benchmarks.peers import Held, training_arguments
from tests.benchmarks.samples import SCIENCEQA_IMAGE_SHARE, SCIENCEQA_LABEL_SHARE, scienceqa_lengths
from tests.benchmarks.train import DS, timed
from tests.support.photos import COLOURS, picture
from tests.support.processors import config_of, make_processor
from vltrain.batch import Batch
from vltrain.config.recipe import build_config
from vltrain.config.schema import Config
from vltrain.data.images import open_rgb
from vltrain.data.kept.store import KeptImages
from vltrain.data.loader import assemble, collate
from vltrain.data.reading import image_reader
from vltrain.data.shards import PackedDataset
from vltrain.data.stock.processor import stock_processor
from vltrain.data.stock.source import StockSource
from vltrain.distributed.hardware import device
from vltrain.memory.live import LiveMemory
from vltrain.models.build import build_model
from vltrain.models.stock.published import MODELS
from vltrain.schema import IGNORE_INDEX, Sample, Turn
from vltrain.train.kept_features import FeatureMaker
from vltrain.train.zero.engine import init_distributed, shutdown_distributed

NUM_SAMPLES = 240
COMPARED = 3  # samples at least, with the plain loop
TILE_TOKENS = 64  # of an image of 512 x 512 pixels
SIZES = ((640, 480), (480, 640), (1024, 768), (800, 200), (320, 320), (1280, 720), (250, 400))  # of photographs
WANTED = 1.8
EPOCHS = 4  # of our recipes of stock models
OURS, KEPT = "ours, images encoded in every step", "ours, image features kept"
TRL = "TRL, padded to the longest"


@dataclass(frozen=True, kw_only=True)
class Photos:
    """Samples, and the JPEGs that they name."""

    samples: list[Sample]
    files: dict[str, bytes]


def make_photos(count: int, longest: int | None = None) -> Photos:
    """Samples of random letters, each a token of the processor's, with ScienceQA's lengths; an image's tokens count."""
    draw = random.Random(0)
    samples, files = [], {}
    for number, length in enumerate(scienceqa_lengths(count).tolist()):
        names: tuple[str, ...] = ()
        if draw.random() < SCIENCEQA_IMAGE_SHARE:
            names = (f"{number}.jpg",)
            stream = io.BytesIO()
            picture(draw.choice(list(COLOURS)), "circle", draw.choice(SIZES), draw).save(stream, "JPEG", quality=85)
            files[names[0]] = stream.getvalue()
        letters = max(8, min(length, longest or length) - (TILE_TOKENS if names else 0))
        answer = max(2, round(SCIENCEQA_LABEL_SHARE * letters))
        asked, said = ("".join(draw.choices("abcdefghijklmno", k=one)) for one in (letters - answer, answer))
        turns = (Turn(role="user", text="<image>\n" * len(names) + asked), Turn(role="assistant", text=said))
        samples.append(Sample(id=str(number), turns=turns, images=names))
    return Photos(samples=samples, files=files)


def stock_config(folder: Path, edge: int, pack_length: int, quick: bool, precision: str) -> Config:
    """The recipe: SmolVLM-256M's sizes and processor (`edge`: of its `size`), or those of the tests' tiny one."""
    place = folder / "processor"
    sizes = {} if quick else {"size": {"longest_edge": edge}, "max_image_size": {"longest_edge": 512}}
    make_processor("smolvlm", place, **sizes)
    config = config_of("smolvlm")
    if not quick:
        own = {"processor_class": "SmolVLMProcessor", "image_seq_len": TILE_TOKENS}
        (place / "processor_config.json").write_text(json.dumps(own))
        config = {**MODELS["smolvlm-256m"].config, "image_token_id": config["image_token_id"]}
    return build_config(
        {
            "model.architecture": "stock",
            "model.stock.config": config,
            "model.stock.processor": str(place),
            "model.stock.llm.peft.kind": "lora",
            "model.adapter.vision": "none",
            "model.adapter.llm": "none",
            "data.root": str(folder / "data"),
            "data.template": "processor",
            "data.pack_length": pack_length,
            "data.workers": 0 if quick else 1,
            "train.epochs": 1e6,
            "train.packs_per_step": 1,
            "train.save_every_steps": 10**9,
            "train.precision": precision,
            "optim.clip": 1.0,
            "output": str(folder / "run"),
        }
    )


def write_packs(photos: Photos, config: Config, folder: Path) -> PackedDataset:
    """As `vltrain pack` does."""
    raw = folder / "samples"
    (raw / "images").mkdir(parents=True)
    lines = []
    for sample in photos.samples:
        turns = [{"role": turn.role, "text": turn.text} for turn in sample.turns]
        images = [f"images/{name}" for name in sample.images]
        lines.append(json.dumps({"id": sample.id, "turns": turns, "images": images}))
    (raw / "train.jsonl").write_text("\n".join(lines) + "\n")
    for name, data in photos.files.items():
        (raw / "images" / name).write_bytes(data)
    settings = PackSettings(
        tokenizer=config.model.tokenizers.source,
        template="processor",
        visual_tokens=0,
        pack_length=config.data.pack_length,
        processor=config.model.processor,
    )
    pack(raw / "train.jsonl", folder / "packs", settings, workers=1)
    return PackedDataset(folder / "packs", verify=False)


def peer_network(config: Config, dtype: torch.dtype) -> Any:
    """The very network, updates and all, with transformers' own head and attention."""
    network: Any = build_model(config.model, dtype=dtype).network
    ours = network.get_output_embeddings()
    head = nn.Linear(ours.in_features, ours.out_features, bias=False, device="meta")
    head.weight = ours.weight
    network.set_output_embeddings(head)
    network.set_attn_implementation("sdpa")
    return network


def trl_trainer(network: Any, photos: Photos, config: Config, dtype: torch.dtype, batch: int, folder: Path) -> Any:
    """TRL's SFTTrainer for vision-language models: the loss of answers alone, as ours."""
    from datasets import Dataset, Sequence
    from datasets import Image as Picture
    from trl import SFTConfig, SFTTrainer

    rows = []
    for sample in photos.samples:
        prompt, answer = as_text(sample, processor_of(config))
        images = [{"bytes": photos.files[name], "path": None} for name in sample.images]
        rows.append({"images": images, "prompt": prompt, "completion": answer})
    workers = config.data.workers
    arguments = {
        **training_arguments(config, dtype, batch, folder),
        "max_length": None,
        "completion_only_loss": True,
        "ddp_find_unused_parameters": False,
        "dataloader_num_workers": workers,
        "dataloader_prefetch_factor": 2 if workers else None,
    }
    return SFTTrainer(
        model=network,
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_list(rows).cast_column("images", Sequence(Picture())),
        processing_class=processor_of(config),
    )


def processor_of(config: Config) -> Any:
    """transformers' object."""
    places = config.model.processor
    assert places is not None, "a stock model's"
    return stock_processor(StockSource.of(places)).inner


def as_text(sample: Sample, processor: Any) -> tuple[str, str]:
    """(prompt, answer) as the processor's chat template writes them."""
    asked, said = (turn.text.removeprefix("<image>\n") for turn in sample.turns)
    question = [*({"type": "image"} for _ in sample.images), {"type": "text", "text": asked}]
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": [{"type": "text", "text": said}]}]
    prompt = ProcessorMixin.apply_chat_template(processor, talk[:1], add_generation_prompt=True)
    whole = ProcessorMixin.apply_chat_template(processor, talk)
    assert isinstance(prompt, str) and isinstance(whole, str) and whole.startswith(prompt)
    return prompt, whole.removeprefix(prompt)


def batch_of_pack(dataset: PackedDataset, number: int, config: Config, model: Any) -> Batch:
    """A pack as the loader makes a batch of it."""
    reader, row = image_reader(config, model), dataset.row(number)
    return collate(row, [reader.decode(dataset.image(image), "") for image in row.image_ids.tolist()], reader)


def loss_difference(model: Any, network: Any, photos: Photos, config: Config, dataset: PackedDataset) -> float:
    """The largest relative difference of a sample's loss in our packs to that of a plain loop: transformers' forward of
    it alone, its own logits and loss."""
    pictures = {sample.id: [photos.files[name] for name in sample.images] for sample in photos.samples}
    worst, compared = 0.0, 0
    for number in range(len(dataset)):
        row = dataset.row(number)
        with torch.no_grad():
            ours = model(batch_of_pack(dataset, number, config, model)).segment_losses.tolist()
        ends = row.segment_lengths.cumsum().tolist()
        for place, (name, end) in enumerate(zip(row.sample_ids, ends, strict=True)):
            own = slice(end - int(row.segment_lengths[place]), end)
            ids, mask = torch.from_numpy(row.input_ids[own].astype("int64")), torch.from_numpy(row.loss_mask[own])
            images = [open_rgb(data, 10**8, name) for data in pictures[name.rpartition("/")[2]]]
            made = processor_of(config).image_processor([images], return_tensors="pt") if images else {}
            pixels = {key: made[key] for key in ("pixel_values", "pixel_attention_mask") if key in made}
            labels = ids.masked_fill(~mask, IGNORE_INDEX)[None]
            with torch.no_grad():
                plain = float(network(input_ids=ids[None], labels=labels, use_cache=False, **pixels).loss)
            worst = max(worst, abs(ours[place] / int(mask.sum()) / plain - 1))
            compared += 1
        if compared >= COMPARED:
            break
    return worst


def peak_mib(network: nn.Module, given: Iterable[Any], step: Callable[[], Tensor]) -> float:
    """Of tensors alive in forward and backward, beside weights and what goes in; in fp32 as it is, else by autocast."""
    tensors = [one for one in tree_leaves(list(given)) if isinstance(one, Tensor)]
    with LiveMemory(ignored=[*network.parameters(), *network.buffers(), *tensors]) as live:
        step().backward()
    network.zero_grad(set_to_none=True)
    return live.peak_bytes / 2**20


def keeping_steps(config: Config, dataset: PackedDataset, dtype: torch.dtype, folder: Path) -> tuple[OurSteps, float]:
    """Our steps with kept features, and the seconds that making them took, checks and writing included."""
    train = replace(config.train, keep_image_features=True)
    keeping = replace(config, train=train, output=str(folder / "keeping"))
    took: list[float] = []
    make = FeatureMaker.kept

    def timed_make(maker: FeatureMaker) -> KeptImages:
        start = time.perf_counter()
        found = make(maker)
        took.append(time.perf_counter() - start)
        return found

    with patch.object(FeatureMaker, "kept", timed_make):
        steps = OurSteps(our_trainer(keeping, dataset, dtype, ds=DS))
    return steps, took[0]


def kept_pack(steps: OurSteps, dataset: PackedDataset) -> Batch:
    """The first pack as the loader makes a batch of it, with features."""
    loader = steps.trainer.loader
    assert loader.kept is not None
    row = dataset.row(0)
    return assemble(row, loader.kept.of_row(row, blank=False, where=""))


def spread(ours: list[float], theirs: list[float]) -> str:
    """Of the ratios of the rounds."""
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def measure(
    precision: str, runs: int, edge: int, pack_length: int, quick: bool, epochs: int
) -> tuple[list[dict[str, Any]], float]:
    """The table in one precision, and the largest relative difference of losses."""
    dtype = DTYPES[precision]
    cast = torch.autocast(device().type, dtype=dtype, enabled=dtype != torch.float32)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        photos = make_photos(12 if quick else NUM_SAMPLES, 120 if quick else None)
        config = stock_config(folder, edge, pack_length, quick, precision)
        dataset = write_packs(photos, config, folder)
        batch = max(2, round(len(photos.samples) / len(dataset)))
        tell(f"{precision}: {len(photos.samples)} samples in {len(dataset)} packs; TRL's batches are of {batch}")
        network = peer_network(config, dtype).to(device())
        trainer = trl_trainer(network, photos, config, dtype, batch, folder / "trl")
        ours = OurSteps(our_trainer(config, dataset, dtype, ds=DS))
        kept, made_seconds = keeping_steps(config, dataset, dtype, folder)
        tell(f"features of {dataset.manifest.num_images} images: {made_seconds:.1f} s, over {epochs} epochs")
        model = ours.trainer.engine.model
        difference = loss_difference(model, network, photos, config, dataset) if dtype == torch.float32 else math.nan
        pack_of_features = kept_pack(kept, dataset)
        pack_, padded = batch_of_pack(dataset, 0, config, model), next(iter(trainer.get_train_dataloader()))
        with cast:
            peaks = {
                OURS: peak_mib(model, vars(pack_).values(), lambda: model(pack_).loss_sum),
                KEPT: peak_mib(model, vars(pack_of_features).values(), lambda: model(pack_of_features).loss_sum),
                TRL: peak_mib(network, padded.values(), lambda: network(**padded, use_cache=False).loss),
            }
        held = Held(trainer, network)
        steps = {OURS: timed(ours.step), KEPT: timed(kept.step), TRL: timed(held.step)}
        results = alternate(steps, runs, 1)
        held.stop()
        for one in (ours, kept):
            one.trainer.monitor.close()
        charged = made_seconds / epochs / dataset.manifest.num_tokens  # seconds a token
    speeds = {name: [tokens / seconds for tokens, seconds in found] for name, found in results.items()}
    speeds[KEPT] = [1 / (1 / one + charged) for one in speeds[KEPT]]
    rows = [
        {
            "precision": precision,
            "trainer": name,
            "useful tokens/s": statistics.median(speeds[name]),
            "faster than TRL by": median_ratio(speeds[name], speeds[TRL]),
            "least and most": spread(speeds[name], speeds[TRL]),
            "peak MiB beside weights": peaks[name],
            "wanted": "" if name == TRL else WANTED,
        }
        for name in speeds
    ]
    return rows, difference


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=["fp32"])
    parser.add_argument("--edge", type=int, default=512, help="pixels of an image's longer edge, in tiles of 512")
    parser.add_argument("--pack-length", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="over which computing kept features is shared out")
    given = settled(parser.parse_args())
    if find_spec("trl") is None:
        raise SystemExit("the package trl is not installed: bash launch/setup_env.sh --with bench")
    init_distributed()
    rows: list[dict[str, Any]] = []
    differences = {}
    for precision in given.precision:
        found, differences[precision] = measure(
            precision, given.runs, given.edge, given.pack_length, given.quick, given.epochs
        )
        rows += found
    shutdown_distributed()
    told = {name: value for name, value in differences.items() if not math.isnan(value)}
    report({"speed": rows, "largest relative difference of a sample's loss to a plain loop's": told}, given)


if __name__ == "__main__":
    main()

"""One evaluation: a split's questions answered by all ranks, scored, written and shown by rank 0.

    samples.jsonl -> deal to ranks -> generate or rank -> gather on rank 0 -> score
        -> RUN/eval/SPLIT/{predictions.jsonl, metrics.json, table.md}, TensorBoard

Used by the trainer in its loop, with the model under DeepSpeed, and by `vltrain evaluate` with a plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from vltrain.config import Config
from vltrain.data.conversation import encode_prompt, stop_ids
from vltrain.data.images import open_rgb, read_image
from vltrain.data.tokenizer import Tokenizer
from vltrain.evaluate.candidates import BlipCandidates, MultimodalCandidates
from vltrain.evaluate.gallery import write_gallery
from vltrain.evaluate.generate import Sampling, Sync, alone, generate
from vltrain.evaluate.ranking import CandidateModel, rank, to_item
from vltrain.evaluate.ready import answerable_samples
from vltrain.evaluate.report import score_samples, write_report
from vltrain.evaluate.samples import deal, image_loader, thin_out
from vltrain.evaluate.scoring import Report
from vltrain.models.build import AnyModel
from vltrain.models.qformer import InstructBlip
from vltrain.schema import Sample


def evaluate_split(
    model: AnyModel,
    samples_file: Path,
    tokenizer: Tokenizer,
    config: Config,
    *,
    split: str,
    folder: Path | None,
    step: int,
    max_samples: int | None,
    device: torch.device | str,
    writer: SummaryWriter | None = None,
) -> Report | None:
    """Answers and scores the questions of a split. A collective: all ranks call it with the same arguments.

    Args:
        model: in evaluation mode, plain or under DeepSpeed at any ZeRO stage; the caller's autocast context holds.
        samples_file: JSONL; images are found beside it.
        folder: the run's; rank 0 writes `eval/SPLIT/predictions.jsonl`, `metrics.json` and `table.md` there. None: nowhere.
        step: optimizer steps that the model has behind it, for the files and TensorBoard.
        max_samples: None: all.
        writer: TensorBoard's, on rank 0: gets `eval/SPLIT/accuracy` (or what the scorer calls its measure), the columns, further
            figures, and some questions with their images.

    Returns: the report on rank 0, None elsewhere.

    Raises: InputError as `answerable_samples`, before anything is answered; and for an image that is damaged behind its header, and a folder
        that cannot be written to.
    """
    samples = answerable_samples(samples_file, config, max_samples)
    assert config.eval.scorer is not None
    predictions = predict(model, samples, tokenizer, config, samples_file=samples_file, device=device, title=f"evaluate {split}")
    if predictions is None:
        return None
    report = score_samples(config.eval.scorer, samples, predictions, str(samples_file))
    if folder is not None:
        write_report(report, folder / "eval" / split, {"split": split, "step": step})
    if writer is not None:
        _show(writer, report, samples, config, split, samples_file.parent, step)
    return report


def predict(
    model: AnyModel,
    samples: list[Sample],
    tokenizer: Tokenizer,
    config: Config,
    *,
    samples_file: Path,
    device: torch.device | str,
    title: str,
) -> list[str] | None:
    """The model's answers, one text for each sample, on rank 0; None elsewhere. A collective."""
    rank_number, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = deal(samples, rank_number, world_size)
    look = {"disable": rank_number != 0, "dynamic_ncols": True, "mininterval": 1.0, "leave": False}
    with tqdm(total=len(samples), desc=title, unit="question", **look) as bar:
        answer = _rank if config.eval.method == "rank" else _generate
        answers = answer(
            model, [samples[number] for number in own], tokenizer, config, samples_file, device,
            sync=largest_over_ranks(device) if world_size > 1 and is_sharded(model) else alone,
            on_answered=lambda count: bar.update(min(count * world_size, len(samples) - bar.n)),
        )  # fmt: skip
    texts = list(zip(own, answers, strict=True))
    if world_size == 1:
        return [text for _, text in sorted(texts)]
    gathered: list | None = [None] * world_size if rank_number == 0 else None
    dist.gather_object(texts, gathered)
    return None if gathered is None else [text for _, text in sorted(pair for share in gathered for pair in share)]


def _generate(
    model: AnyModel, samples: list[Sample], tokenizer: Tokenizer, config: Config, samples_file: Path, device: torch.device | str,
    *, sync: Sync, on_answered: Callable[[int], None],
) -> list[str]:  # fmt: skip
    """The text that the model writes in answer to each sample."""
    chosen = config.eval
    answers = generate(
        model,
        [encode_prompt(sample, tokenizer, config.data.template, model.visual_tokens) for sample in samples],
        image_loader(samples_file.parent, model.image_size, config.data.max_image_pixels),
        sampling=Sampling(
            max_new_tokens=chosen.max_new_tokens, temperature=chosen.temperature, top_p=chosen.top_p, seed=config.train.seed
        ),
        stop_ids=stop_ids(tokenizer, config.data.template),
        vocab_size=tokenizer.vocab_size,
        batch_size=chosen.batch_size,
        device=device,
        sync=sync,
        on_answered=on_answered,
    )
    return [tokenizer.decode(answer).strip() for answer in answers]


def _rank(
    model: AnyModel, samples: list[Sample], tokenizer: Tokenizer, config: Config, samples_file: Path, device: torch.device | str,
    *, sync: Sync, on_answered: Callable[[int], None],
) -> list[str]:  # fmt: skip
    """The likeliest candidate of each sample."""
    load_image = image_loader(samples_file.parent, model.image_size, config.data.max_image_pixels)
    place = {"tokenizer": tokenizer, "load_image": load_image, "device": device}
    if isinstance(model, InstructBlip):
        candidates: CandidateModel = BlipCandidates(model=model, **place)
    else:
        candidates = MultimodalCandidates(model=model, template=config.data.template, **place)
    items = [to_item(sample, str(samples_file)) for sample in samples]
    settings = {"batch_size": config.eval.batch_size, "normalise_length": config.eval.normalise_length}
    winners = rank(candidates, items, **settings, sync=sync, on_answered=on_answered)
    return [item.candidates[winner] for item, winner in zip(items, winners, strict=True)]


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether ranks hold parts of the weights (ZeRO-3), so that every forward is a collective."""
    return any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())


def largest_over_ranks(device: torch.device | str) -> Sync:
    """The `sync` of ranks that make every forward together: an all-reduce on the model's device."""

    def largest(value: int) -> int:
        shared = torch.tensor(value, device=device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return int(shared)

    return largest


def _show(writer: SummaryWriter, report: Report, samples: list[Sample], config: Config, split: str, image_folder: Path, step: int) -> None:
    """Accuracies and a fixed, evenly spaced choice of answered questions."""
    writer.add_scalar(f"eval/{split}/{report.measure}", report.accuracy, step)
    writer.add_scalar(f"eval/{split}/failed_share", report.failed / max(report.overall.total, 1), step)
    for name, tally in report.columns.items():
        if tally.accuracy is not None and name != "Average":
            writer.add_scalar(f"eval/{split}/{report.measure}_by/{name}", tally.accuracy, step)
    writer.add_text(f"eval/{split}/table", report.to_markdown(), step)
    shown = thin_out(list(range(len(samples))), config.eval.tensorboard_samples)
    cards, limit = [], config.data.max_image_pixels
    for number in shown:
        names = samples[number].images
        images = [open_rgb(read_image(path, limit, str(path), inside=image_folder), limit, str(path)) for path in (image_folder / name for name in names)]
        cards.append((report.answers[number], images))
    write_gallery(writer, f"eval/{split}", cards, step)
    for name, value in report.figures.items():
        writer.add_scalar(f"eval/{split}/{name}", value, step)
    writer.flush()

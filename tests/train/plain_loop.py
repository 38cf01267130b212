"""The reference that distributed runs are held to: a plain PyTorch loop in one process, one sample at a time."""

from collections.abc import Iterator
from pathlib import Path

import torch

from tests.support.tiny import IMAGE_SIZE, tiny_config
from tests.train.worker import GRADIENT_STEP
from vltrain.batch import Batch
from vltrain.data.images import decode_image
from vltrain.data.loader import collate
from vltrain.data.pictures import SquareReader
from vltrain.data.plan import PackCost, Plan
from vltrain.data.shards import PackedDataset
from vltrain.data.stream.mixed import open_packed
from vltrain.models.build import build_model
from vltrain.schema import PackedRow
from vltrain.train.optim import lr_factor, parameter_groups, set_learning_rates


def one_sample_at_a_time(dataset: PackedDataset, number: int) -> Iterator[Batch]:
    """The batches of one pack's samples, each alone in its row."""
    row = dataset.row(number)
    start, shown = 0, 0
    for length, name in zip(row.segment_lengths.tolist(), row.sample_ids, strict=True):
        input_ids = row.input_ids[start : start + length]
        slots = row.image_slots[shown : shown + int((input_ids == -3).sum())]
        alone = PackedRow(
            input_ids=input_ids,
            loss_mask=row.loss_mask[start : start + length],
            segment_lengths=row.segment_lengths[:1] * 0 + length,
            image_ids=row.image_ids[slots],
            image_slots=slots * 0,
            sample_ids=(name,),
        )
        images = [decode_image(dataset.image(image), IMAGE_SIZE, 10**6, "") for image in alone.image_ids.tolist()]
        yield collate(alone, images, SquareReader(size=IMAGE_SIZE))
        start, shown = start + length, shown + len(slots)


def plain_run(packs: Path, changes: dict, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """The reference: no DeepSpeed, no packing, no accumulation tricks. Same keys as the worker's result."""
    config = tiny_config(**changes)
    dataset = open_packed(packs)
    model = build_model(config.model, device=device)
    plan = Plan(
        dataset.index,
        seed=config.train.seed,
        epochs=config.train.epochs,
        packs_per_step=config.train.packs_per_step,
        world_size=1,
        cost=PackCost(),
        max_steps=config.train.max_steps,
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(model.named_parameters(), config.optim, model.part_of),
        betas=config.optim.betas,
        eps=config.optim.eps,
    )
    warmup = config.optim.warmup_epochs * plan.steps_per_epoch
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    result, losses, norms = {}, [], []
    for step in range(plan.num_steps):
        batches = [batch for number in plan.packs_of(step).tolist() for batch in one_sample_at_a_time(dataset, number)]
        num_labels = sum(batch.num_label_tokens for batch in batches)
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)  # a parameter that no sample reaches decays like the others
        loss = sum(model(batch.to(device)).loss_sum for batch in batches) / num_labels
        loss.backward()
        if step == GRADIENT_STEP:
            result.update({f"gradient/{name}": parameter.grad.clone().cpu() for name, parameter in trained.items()})
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained.values()])
        if config.optim.clip:
            torch.nn.utils.clip_grad_norm_(trained.values(), config.optim.clip)
        set_learning_rates(optimizer, lr_factor(step, plan.num_steps, warmup, config.optim.min_lr_ratio))
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    result.update({f"weight/{name}": parameter.detach().cpu() for name, parameter in trained.items()})
    return {
        **result,
        "losses": torch.tensor(losses, dtype=torch.float64),
        "grad_norms": torch.tensor(norms, dtype=torch.float64),
    }


def relative_difference(found: torch.Tensor, expected: torch.Tensor, least_scale: float = 0.0) -> float:
    """Largest difference as a share of the largest expected value, or of `least_scale` where that is larger."""
    scale = max(expected.double().abs().max().item(), least_scale, 1e-30)
    return (found.double() - expected.double()).abs().max().item() / scale

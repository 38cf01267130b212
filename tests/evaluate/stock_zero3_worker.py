"""A rank of test_stock_answers.py: trains a stock model under ZeRO-3 with generation in between; checks answers and
losses; prints `fine`."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from test_stock_answers import NEW, PROMPTS, pictures, prompt_of

from tests.models.test_stock import shaken
from tests.support.stock import Piece, row_of, tiny
from vltrain.config.schema import OptimConfig
from vltrain.evaluate.answering.decoding import Sampling, alone
from vltrain.evaluate.answering.generate import generate
from vltrain.evaluate.run import largest_over_ranks
from vltrain.models.build import build_model
from vltrain.models.stock.model import StockModel
from vltrain.train.optim import parameter_groups
from vltrain.train.zero.engine import Engine, init_distributed, shutdown_distributed

SHARES = (slice(0, 3), slice(1, 2))  # the second rank has one prompt, without a picture


def fresh(family: str) -> StockModel:
    model = build_model(tiny(family))
    assert isinstance(model, StockModel)
    shaken(model)
    return model


def answers(model: StockModel, family: str, share: slice, together: bool) -> list[list[int]]:
    model.eval()
    prompts = [prompt_of(family, model, piece, place) for place, piece in enumerate(PROMPTS)][share]
    found = generate(
        model, prompts, pictures(family), sampling=Sampling(max_new_tokens=NEW), stop_ids=(), vocab_size=300,
        batch_size=2, device="cpu", sync=largest_over_ranks("cpu") if together else alone,
    )  # fmt: skip
    model.train()
    return found


def check(family: str, rank: int, world_size: int) -> None:
    plain, model = fresh(family), fresh(family)
    expected = answers(plain, family, SHARES[rank], together=False)
    ds_config = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    groups = parameter_groups(model.named_parameters(), OptimConfig(), model.part_of)
    row = row_of(family, plain.parts.core, [Piece((1,), 3, 5)])
    engine = Engine(model, groups, ds_config, betas=(0.9, 0.95), eps=1e-8, autocast_dtype=torch.float32)
    for step in range(2):
        if step == 0:
            found = answers(model, family, SHARES[rank], together=True)
            assert found == expected, f"rank {rank}: {found}, expected {expected}"
        loss = engine.forward(dataclasses.replace(row)).loss_sum / (row.num_label_tokens * world_size)
        if step == 0:
            torch.testing.assert_close(loss, plain(row).loss_sum / (row.num_label_tokens * world_size))
        engine.backward(loss, last_micro_step=True)
        engine.step()
        answers(model, family, SHARES[rank], together=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    own_rank, count = init_distributed()
    for name in ("smolvlm", "qwen3_vl"):
        check(name, own_rank, count)
    dist.barrier()
    shutdown_distributed()
    print("fine")

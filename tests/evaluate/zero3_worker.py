"""A rank of test_generate_zero3.py: trains under ZeRO-3 with evaluations in between, by generation and by ranking;
checks answers and losses; prints `fine`."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from test_generate import IMAGES, PROMPTS, STOP, VOCABULARY, make_prompts, plain_answers, tiny_model
from test_ranking import ITEMS, candidates_of, plain_winners

from tests.support.reading import pictures
from vltrain.batch import Batch
from vltrain.config.schema import OptimConfig
from vltrain.evaluate.answering.decoding import Sampling, alone
from vltrain.evaluate.answering.generate import generate
from vltrain.evaluate.answering.ranking import rank as rank_candidates
from vltrain.evaluate.run import is_sharded, largest_over_ranks
from vltrain.models.mmt.model import MultimodalModel
from vltrain.schema import IGNORE_INDEX
from vltrain.train.optim import parameter_groups
from vltrain.train.zero.engine import Engine, init_distributed, shutdown_distributed

MAX_NEW_TOKENS = 4


def make_engine(world_size: int) -> Engine:
    model = tiny_model().train()
    ds_config = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    groups = parameter_groups(model.named_parameters(), OptimConfig(), model.part_of)
    return Engine(model, groups, ds_config, betas=(0.9, 0.95), eps=1e-8, autocast_dtype=torch.float32)


def make_batch(seed: int) -> Batch:
    prompt = next(prompt for prompt in make_prompts(40, seed) if prompt.images)
    ids = torch.tensor(prompt.input_ids.tolist())
    labels = torch.cat([ids[1:], torch.tensor([IGNORE_INDEX])])
    labels[labels < 0] = IGNORE_INDEX
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=torch.arange(len(ids)),
        segment_lengths=torch.tensor([len(ids)]),
        pixels=torch.from_numpy(np.stack([IMAGES[name] for name in prompt.images])),
        image_slots=torch.arange(len(prompt.images)),
        sample_ids=("x",),
        num_label_tokens=int((labels != IGNORE_INDEX).sum()),
    )


def answer(model: MultimodalModel, share: slice) -> tuple[list[list[int]], list[int]]:
    """(generated answers, winning candidates)."""
    model.eval()
    sync = largest_over_ranks("cpu") if is_sharded(model) else alone
    answers = generate(
        model,
        PROMPTS[share],
        pictures(model, IMAGES.__getitem__),
        sampling=Sampling(max_new_tokens=MAX_NEW_TOKENS),
        stop_ids=STOP,
        vocab_size=VOCABULARY,
        batch_size=4,
        device="cpu",
        sync=sync,
    )
    winners = rank_candidates(candidates_of(model), ITEMS[share], batch_size=20, sync=sync)
    model.train()
    return answers, winners


def train(engine: Engine, rank: int, share: slice | None) -> list[float]:
    """Two steps; with a `share`, evaluations before and after each."""
    losses = []
    for step in range(2):
        if share is not None:
            answer(engine.model, share)
        output = engine.forward(make_batch(10 * step + rank))
        engine.backward(output.loss_sum / 10, last_micro_step=True)
        engine.step()
        losses.append(float(output.loss_sum.detach()))
    return losses


def main() -> None:
    rank, world_size = init_distributed()
    share = slice(0, 10) if rank == 0 else slice(10, 12)  # one rank is done long before the other
    untuned = [tokens[:MAX_NEW_TOKENS] for tokens in plain_answers()[share]], plain_winners()[share]
    undisturbed = train(make_engine(world_size), rank, None)
    engine = make_engine(world_size)
    assert is_sharded(engine.model) and answer(engine.model, share) == untuned
    assert train(engine, rank, share) == undisturbed
    tuned = answer(engine.model, share)
    plain = tiny_model()
    weights = {name: weight for name, weight, _ in engine.full_state()}
    assert not plain.load_state_dict(weights, strict=False).unexpected_keys
    assert not is_sharded(plain) and tuned == answer(plain, share)
    changed = torch.tensor(int(tuned[0] != untuned[0]))
    dist.all_reduce(changed)
    assert changed > 0, "two steps of training changed no answer: the comparison shows nothing"
    shutdown_distributed()
    print("fine")


if __name__ == "__main__":
    main()

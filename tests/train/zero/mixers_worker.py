"""Two steps of a tiny decoder under DeepSpeed, at ZeRO 0 and 3, on rows of this rank's own.

Called with the family, what is trained (`all`, then with activation checkpointing; or part of the names of the
parameters that are) and the file for rank 0's results: {stage: {"STEP loss": ..., "STEP grad NAME": whole gradient}}.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
from tiny_families import VOCABULARY, decoder_of, tiny_decoder

from vltrain.models.backbones.head import replace_head
from vltrain.models.backbones.llm import checkpoint_blocks
from vltrain.models.backbones.packed_decoder import prepare_decoder
from vltrain.ops.attention import PACKED_SDPA, packing_arguments
from vltrain.train.zero.engine import Engine, init_distributed, partitioner, shutdown_distributed

# By rank and micro-step. One rank has one group, the other several.
ROWS = {0: ((5, 5), (9, 2, 4)), 1: ((13, 1, 5, 9, 3), (7,))}


class Row(nn.Module):
    """The sum of the losses of all next tokens of a packed row."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.llm = model

    def forward(self, lengths: tuple[int, ...]) -> Tensor:
        ids = torch.randint(3, VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(sum(lengths)))
        positions = torch.cat([torch.arange(length) for length in lengths])
        arguments = packing_arguments(PACKED_SDPA, torch.tensor(lengths), ids.device, torch.float32)
        states = decoder_of(self.llm)(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, **arguments
        ).last_hidden_state[0]
        ends = torch.tensor(lengths).cumsum(0) - 1
        kept = torch.ones(len(ids), dtype=torch.bool).index_fill_(0, ends, False)
        return self.llm.get_output_embeddings()(states[kept], ids.roll(-1)[kept])[0]


def step(family: str, trained: str, stage: int, rank: int) -> dict[str, Tensor]:
    model = tiny_decoder(family)
    prepare_decoder(decoder_of(model), PACKED_SDPA)
    replace_head(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "all" or trained in name)
    if trained == "all":
        checkpoint_blocks(decoder_of(model), {"use_reentrant": False})
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {
            "stage": stage,
            **({"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 500} if stage == 3 else {}),
        },
    }
    row = Row(model)
    if (place := partitioner(settings)) is not None:
        place(row)
    groups = [{"params": [one for one in row.parameters() if one.requires_grad], "lr": 1e-3}]
    engine = Engine(row, groups, settings, betas=(0.9, 0.99), eps=1e-8, autocast_dtype=torch.float32)
    row.train()
    result: dict[str, Tensor] = {}
    for number in range(2):  # the second step by the order that ZeRO-3 has seen in the first
        loss = torch.zeros(())
        for micro, lengths in enumerate(ROWS[rank] if number else ROWS[1 - rank]):
            each = engine.forward(lengths)
            loss += each.detach()
            engine.backward(each / 100, last_micro_step=micro == 1)
        dist.all_reduce(loss)
        result |= {f"{number} grad {name}": one.clone() for name, one in engine.full_gradients() if one is not None}
        result[f"{number} loss"] = loss
        engine.step()
    return result


def main(family: str, trained: str, output: str) -> None:
    rank, _ = init_distributed()
    found = {stage: step(family, trained, stage, rank) for stage in (0, 3)}
    if rank == 0:
        torch.save(found, output)
    shutdown_distributed()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A packed row's losses and gradients and generated answers by each implementation of attention, in a process whose
flash-attn is a stand-in.

Called with the folder of the packages (on PYTHONPATH) and the file for the results: {implementation: {"calls": what was
asked of its kernel, and the differences from packed SDPA}}.
"""

import functools
import json
import sys
from pathlib import Path

import torch
import transformers

transformers.utils.import_utils.is_torch_cuda_available = lambda: (
    True
)  # which transformers asks before it uses a flash-attn

from tests.support import attention_kernels
from vltrain.models import build
from vltrain.models.backbones.packed_decoder import prepare_decoder
from vltrain.models.compiled import compile_blocks
from vltrain.models.mmt import build as mmt_build
from vltrain.ops.attention import PACKED_SDPA, PACKED_VARLEN, packing_arguments

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "evaluate"))
import test_generate
from tiny_families import tiny_decoder
from tiny_models import mixed_batch, randomise_adapters, tiny_config


def with_attention(name: str, make, *given, **options):
    mmt_build.choose_attention = lambda *_, **__: name
    return make(*given, **options)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@functools.cache
def train(
    name: str, checkpointing: bool, dtype: torch.dtype, compiled: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    config = tiny_config(tune="full", adapter={"vision": "both", "llm": "both"})
    model = with_attention(name, build.build_model, config, activation_checkpointing=checkpointing)
    randomise_adapters(model)
    model = model.to(torch.promote_types(dtype, torch.float32))
    if compiled:
        compile_blocks(model, "eager")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(mixed_batch()).loss_sum
    loss.backward()
    return loss.detach(), gradients(model)


def difference(found, expected) -> float:
    """The largest of the loss's and of each gradient's, relative to its largest entry."""
    pairs = [(found[0], expected[0]), *((found[1][name], expected[1][name]) for name in expected[1])]
    assert found[1].keys() == expected[1].keys()
    return max(float((one - other).abs().max() / other.abs().max().clamp(min=1e-12)) for one, other in pairs)


def windowed(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A sum over the states of a packed row of tiny_families' Mistral, and its gradients."""
    model = tiny_decoder("mistral").double()
    model.config._attn_implementation = name  # set by the method, flash-attn would ask for a GPU
    prepare_decoder(model.model, name)
    lengths = torch.tensor([13, 1, 9])
    ids = torch.randint(3, 300, (1, 23), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(int(length)) for length in lengths])[None]
    arguments = packing_arguments(name, lengths, ids.device, torch.float64)
    states = model.model(input_ids=ids, position_ids=positions, use_cache=False, **arguments).last_hidden_state
    total = (states * torch.linspace(-1, 1, states.shape[-1], dtype=torch.float64)).sum()
    total.backward()
    return total.detach(), gradients(model)


def outcome(name: str) -> dict:
    calls, told = attention_kernels.CALLS, {}
    attention_kernels.EXACT = True
    ways = {"plain": {}, "checkpointing": {"checkpointing": True}}
    if name == PACKED_VARLEN:
        ways["compiled"] = {"compiled": True}
    for key, options in ways.items():
        calls.clear()
        settings = {"checkpointing": False, "dtype": torch.float64, "compiled": False, **options}
        told[key] = difference(train(name, **settings), train(PACKED_SDPA, **{**settings, "compiled": False}))
        told[f"{key} calls"] = len(calls)
    told["kernel"], told["segments"] = calls[0]
    calls.clear()
    told["window"] = difference(windowed(name), windowed(PACKED_SDPA))
    told["window calls"] = len(calls)
    attention_kernels.EXACT = False
    (loss, _), (plain_loss, _) = (train(one, False, torch.bfloat16, False) for one in (name, PACKED_SDPA))
    told["bf16"] = float((loss - plain_loss).abs() / plain_loss)
    attention_kernels.EXACT = True
    model = with_attention(name, test_generate.tiny_model)
    for batch_size in (1, 7):
        told[f"answers {batch_size}"] = sum(
            one == other
            for one, other in zip(
                test_generate.run(test_generate.PROMPTS, batch_size, model), test_generate.plain_answers(), strict=True
            )
        )
    told["prompts"] = len(test_generate.plain_answers())
    return told


def main(output: str) -> None:
    torch.manual_seed(0)
    results = {name: outcome(name) for name in ("flash_attention_2", "flash_attention_3", "flash_attention_4")}
    try:
        from torch.nn.attention import varlen
    except ImportError:
        pass
    else:
        varlen.varlen_attn = attention_kernels.varlen_attn_2_12
        results["varlen"] = outcome(PACKED_VARLEN)
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])

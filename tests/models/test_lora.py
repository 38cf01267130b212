"""LoRA and LLaMA-Adapter: the identity at the start, the right layers, closed forms of what they compute, packing,
generation, merging."""

import numpy as np
import pytest
import torch
from test_build import LLAMA_2_7B, VIT_L_336
from test_flops import CASES
from tiny_models import LLM, counted_flops, make_batch, mixed_batch, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.support.reading import pictures
from vltrain.config.model.mmt import AdapterConfig, LLMConfig, MmtConfig, PeftConfig, VisionConfig
from vltrain.errors import InputError
from vltrain.evaluate.answering.decoding import Sampling
from vltrain.evaluate.answering.generate import generate
from vltrain.models.build import build_model, count_parameters
from vltrain.models.mmt.merge import merge_adapters
from vltrain.models.mmt.model import MultimodalModel
from vltrain.models.peft.lora import is_peft_parameter
from vltrain.models.peft.low_rank import merge_updates
from vltrain.schema import IMAGE_MODALITY_TOKEN, IMAGE_TOKEN, TEXT_MODALITY_TOKEN, Segment

LORA = PeftConfig(kind="lora", rank=4, targets=("q_proj", "v_proj", "down_proj"))
PROMPTS = PeftConfig(kind="adaption_prompt", adapter_len=5, adapter_layers=2)
both = pytest.mark.parametrize("peft", [LORA, PROMPTS], ids=lambda peft: peft.kind)


def tiny(peft: PeftConfig, moved: bool = True, **choice) -> MultimodalModel:
    """A tiny model with `peft`; `moved`: its layers away from the zeros that they start with."""
    choice["llm"] = {"peft": peft, **choice.get("llm", {})}
    model = build_model(tiny_config(**choice))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if moved and is_peft_parameter(name):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def with_peft(**settings) -> MmtConfig:
    return MmtConfig(
        vision=VisionConfig(config=VIT_L_336, tap_every=4),
        llm=LLMConfig(config=LLAMA_2_7B, tokenizer="none", peft=PeftConfig(**settings)),
        adapter=AdapterConfig(kind="repadapter", llm="none"),
    )


def test_trained_parameters_at_the_papers_size() -> None:
    count = count_parameters(build_model(with_peft(kind="lora"), device="meta"))
    assert count["peft"] == (32 * 2 * (4096 * 8 + 8 * 4096),) * 2 and count["llm"] == (6_738_415_616, 0)
    assert count["adapter"] == (24 * (1024 * 16 + 16 + 8 * 1024 + 1024),) * 2
    count = count_parameters(build_model(with_peft(kind="adaption_prompt", adapter_layers=30), device="meta"))
    assert count["peft"] == (30 * (10 * 4096 + 1),) * 2 and count["llm"] == (
        6_738_415_616,
        0,
    )  # the 1.2M of LLaMA-Adapter


@both
def test_it_starts_as_the_plain_network_and_leaves_other_weights_alone(peft: PeftConfig) -> None:
    plain, model = build_model(tiny_config()), tiny(peft, moved=False)
    assert torch.equal(model(mixed_batch()).segment_losses, plain(mixed_batch()).segment_losses)
    assert not torch.equal(tiny(peft)(mixed_batch()).segment_losses, plain(mixed_batch()).segment_losses)
    again = tiny(peft, moved=False)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


@both
@pytest.mark.parametrize("tune", ["adapters", "full"])
def test_what_is_trained_is_what_gets_a_gradient(peft: PeftConfig, tune: str) -> None:
    model = tiny(peft, tune=tune, adapter={"llm": "none"})
    model(mixed_batch()).loss_sum.backward()
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if is_peft_parameter(name):
            assert parameter.requires_grad and parameter.grad.abs().max() > 0, name
    per_block = len(peft.targets) * 2 * 3 if peft.kind == "lora" else 2 * 2
    assert sum(map(is_peft_parameter, named)) == per_block


def test_lora_is_the_low_rank_update() -> None:
    model = tiny(LORA)
    layer = model.llm.model.layers[1].mlp.down_proj
    states = torch.randn(3, LLM["intermediate_size"])
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    expected = states @ (layer.base_layer.weight + 16 / 4 * b @ a).T
    torch.testing.assert_close(layer(states), expected)


def test_prompts_are_a_gated_attention_of_their_own() -> None:
    """In double precision, head by head, from the definition: softmax over the prompts' keys, with the rotated
    query."""
    model = tiny(PROMPTS).double()
    adapted = model.llm.model.layers[2].self_attn
    attention, heads, dim = adapted.model, LLM["num_attention_heads"], LLM["hidden_size"] // LLM["num_attention_heads"]
    states = torch.randn(1, 7, LLM["hidden_size"], dtype=torch.float64)
    cos, sin = model.llm.model.rotary_emb(states, torch.arange(7)[None])
    arguments = {"hidden_states": states, "position_embeddings": (cos, sin), "attention_mask": None}
    found = adapted(**arguments)[0] - attention(**arguments)[0]
    query, prompts = attention.q_proj(states)[0], adapted.adaption_prompt[0]
    keys, values = attention.k_proj(prompts), attention.v_proj(prompts)
    mixed = []
    for head in range(heads):
        shared = head // (heads // LLM["num_key_value_heads"])
        part, group = slice(head * dim, head * dim + dim), slice(shared * dim, shared * dim + dim)
        turned = torch.cat([-query[:, part][:, dim // 2 :], query[:, part][:, : dim // 2]], dim=1)
        rotated = query[:, part] * cos[0] + turned * sin[0]
        mixed.append(adapted.adaption_gate * (rotated @ keys[:, group].T / dim**0.5).softmax(-1) @ values[:, group])
    torch.testing.assert_close(
        found[0], attention.o_proj(torch.cat(mixed, dim=1)), rtol=1e-6, atol=1e-7
    )  # peft's softmax is fp32


@both
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_is_its_segments_one_at_a_time(peft: PeftConfig, attention: str) -> None:
    model = tiny(peft, llm={"attention": attention})
    packed = make_batch([(7, []), (5, []), (9, [])], num_images=0)
    losses = model(packed).segment_losses
    start = 0
    for number, length in enumerate(packed.segment_lengths.tolist()):
        alone = make_batch([(length - 1, [])], num_images=0)
        alone.input_ids, alone.labels = packed.input_ids[start : start + length], packed.labels[start : start + length]
        alone.num_label_tokens = int((alone.labels != -100).sum())
        torch.testing.assert_close(model(alone).segment_losses[0], losses[number], rtol=1e-5, atol=1e-5)
        start += length


@both
def test_checkpointed_blocks_give_the_same_gradients(peft: PeftConfig) -> None:
    config = tiny_config(llm={"peft": peft})
    gradients = []
    for checkpointing in (False, True):
        model = build_model(config, activation_checkpointing=checkpointing)
        model(mixed_batch()).loss_sum.backward()
        gradients.append(
            {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        )
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def ask(model: MultimodalModel, prompts: list[Segment], batch_size: int) -> list[list[int]]:
    return generate(
        model,
        prompts,
        pictures(model, lambda name: np.full((3, 32, 32), int(name), np.uint8)),
        sampling=Sampling(max_new_tokens=7),
        stop_ids={0},
        vocab_size=LLM["vocab_size"],
        batch_size=batch_size,
        device="cpu",
    )


@both
def test_answers_from_the_cache_are_those_of_whole_forwards_at_any_batch_size(peft: PeftConfig) -> None:
    model = tiny(peft).eval()
    generator = np.random.default_rng(0)
    prompts = []
    for number, (length, image) in enumerate([(5, "9"), (11, None), (8, "200"), (3, None)]):
        text = generator.integers(1, LLM["vocab_size"], length).tolist()
        ids = [IMAGE_MODALITY_TOKEN, 1, IMAGE_TOKEN, IMAGE_TOKEN, *text] if image else [TEXT_MODALITY_TOKEN, 1, *text]
        mask = np.zeros(len(ids), bool)
        prompts.append(
            Segment(
                sample_id=str(number),
                input_ids=np.array(ids, np.int32),
                loss_mask=mask,
                images=(image,) if image else (),
            )
        )
    answers = ask(model, prompts, 4)
    assert ask(model, prompts, 1) == answers and any(answers)
    for prompt, answer in zip(prompts, answers):  # one whole forward for each new token
        ids, found = prompt.input_ids.tolist(), []
        pixels = torch.full(
            (len(prompt.images), 3, 32, 32), int(prompt.images[0]) if prompt.images else 0, dtype=torch.uint8
        )
        while len(found) < 7:
            with torch.no_grad():
                embeds = model.embed(
                    torch.tensor(ids + found), model.encode_images(pixels), torch.zeros(len(pixels), dtype=torch.int64)
                )
                hidden = model.llm.model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0, -1]
                token = int(model.llm.lm_head(hidden).argmax())
            if token == 0:
                break
            found.append(token)
        assert found == answer


@pytest.mark.parametrize("adapter", [{"llm": "none"}, {"llm": "both", "vision": "both"}])
def test_lora_merges_into_its_layers_beside_adapters(adapter: dict[str, str]) -> None:
    model = tiny(LORA, adapter=adapter)
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            parameter.data.add_(0.05)
    expected = model(mixed_batch()).segment_losses
    merge_adapters(model)
    assert not any(map(is_peft_parameter, dict(model.named_parameters())))
    torch.testing.assert_close(model(mixed_batch()).segment_losses, expected, rtol=1e-5, atol=1e-5)
    names = {name for name, _ in model.llm.named_parameters()}
    plain = {name for name, _ in build_model(tiny_config(adapter={"llm": "none"})).llm.named_parameters()}
    assert names - {name for name in names if name.endswith("bias")} == plain


def test_what_cannot_be_merged_is_refused_and_nothing_is_changed() -> None:
    for model, named in ((tiny(PROMPTS), "adaption_prompt"), (tiny(LORA, adapter={"kind": "router"}), "RouterAdapter")):
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        with pytest.raises(InputError, match=named):
            merge_adapters(model)
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in before.items())


def test_merging_is_of_the_trained_update_only() -> None:
    model = tiny(LORA, moved=False)
    before = model.llm.model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    merge_updates(model.llm)
    assert torch.equal(model.llm.model.layers[0].self_attn.q_proj.weight, before)


# Of the one the rows are others, of the other the layers have other names.
NOT_COUNTED = ("patches", "phi3 behind a SigLIP")


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj", "gate_proj", "down_proj")])
@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_COUNTED])
def test_operations_with_lora_are_what_torch_counts(name: str, targets: tuple[str, ...]) -> None:
    choice = dict(CASES[name])
    peft = PeftConfig(kind="lora", rank=4, targets=targets)
    choice["llm"] = {**choice.get("llm", {}), "attention": "eager", "peft": peft}
    choice["adapter"] = {**choice.get("adapter", {}), "groups": 1}
    assert_counted(build_model(tiny_config(**choice)))


def assert_counted(model: MultimodalModel, beyond: int = 0) -> None:
    """torch's own count of a step is the closed form's, and `beyond` more."""
    batch = make_batch([(13, [0, 1])], num_images=2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch).loss_sum.backward()
    tokens = len(batch.input_ids)
    pairs = 2 * tokens**2 - tokens  # eager attention computes all of them
    counted = model.flops().of(
        num_tokens=tokens, num_pairs=pairs, num_images=2, num_label_tokens=batch.num_label_tokens
    )
    assert counted + beyond == counted_flops(counter)


def test_operations_with_prompts_are_what_torch_counts_and_what_peft_does_twice() -> None:
    tokens, width, kv_width = 13 + 5, LLM["hidden_size"], LLM["hidden_size"] // 2
    # peft projects queries once more (with their gradient), values too (for nothing), and what the prompts add by
    # itself.
    again = tokens * 2 * (2 * width * width + width * kv_width + 2 * width * width)
    keys_and_values = 5 * 2 * (2 * 2 * width * kv_width)
    assert_counted(
        tiny(PROMPTS, llm={"attention": "eager"}, adapter={"groups": 1}), beyond=2 * (again + keys_and_values)
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kind": "lora", "targets": ("q_projj",)}, "no linear layer 'q_projj', did you mean 'q_proj'"),
        (
            {"kind": "adaption_prompt", "adapter_layers": 4},
            "adapter_layers: found 4, expected at most the LLM's 3 blocks",
        ),
    ],
)
def test_user_mistakes_are_named(settings: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        build_model(tiny_config(llm={"peft": PeftConfig(**settings)}))


def test_heads_that_peft_cannot_serve_are_refused() -> None:
    with pytest.raises(InputError, match="4 heads of 16 for a width of 32; take lora"):
        build_model(tiny_config(llm={"config": {**LLM, "head_dim": 16}, "peft": PROMPTS}))
    build_model(tiny_config(llm={"config": {**LLM, "head_dim": 16}, "peft": LORA}))(mixed_batch()).loss_sum.backward()

"""InstructBLIP: losses and gradients of packs equal transformers' own model on each question by itself; exactly what is
meant is trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
)

from tests.support.blip import QUERIES, blip_config, make_batch, make_samples, make_tokenizers
from tests.support.reading import squares
from vltrain.config.model.instructblip import BlipModelConfig, LanguageTuning, QFormerTuning
from vltrain.config.model.instructblip import InstructBlipConfig as OurConfig
from vltrain.data.loader import filler
from vltrain.data.text.instruction import InstructionSource
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.errors import InputError
from vltrain.models.build import build_model, count_parameters
from vltrain.models.instructblip.model import InstructBlip
from vltrain.models.instructblip.sizes import BLIPS
from vltrain.models.peft.low_rank import targeted
from vltrain.schema import IGNORE_INDEX, IMAGE_TOKEN, Sample, Turn

KINDS = ("llama", "t5")
IMAGE_ID = 63  # transformers' placeholder, a token that no text has


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def tokenizer_of(kind, places):
    return load_tokenizer(places[kind], InstructionSource(source=places["bert"], max_tokens=32))


def reference(model: InstructBlip) -> InstructBlipForConditionalGeneration:
    """transformers' own model, in float64, with the weights of ours."""
    config = InstructBlipConfig.from_dict({**model.config.to_dict(), "image_token_index": IMAGE_ID})
    theirs = InstructBlipForConditionalGeneration._from_config(config, attn_implementation="eager").double()
    if model.is_encoder_decoder:
        theirs.language_model.lm_head.weight = torch.nn.Parameter(
            theirs.language_model.lm_head.weight.clone()
        )  # transformers ties T5's
    theirs.load_state_dict(
        {InstructBlip.their_name(name): value for name, value in model.state_dict().items()}, strict=False
    )
    missing = {name for name, _ in theirs.named_parameters()} - {
        InstructBlip.their_name(name) for name, _ in model.named_parameters()
    }
    assert not missing, missing
    return theirs.eval()


def loss_of_one(theirs, ours, sample, tokenizer, template):
    """The sum of a question's label losses by transformers' forward, in float64."""
    batch = make_batch([sample], tokenizer, template)
    ids = torch.where(batch.input_ids == IMAGE_TOKEN, IMAGE_ID, batch.input_ids)
    pixels = (batch.pixels[batch.image_slots].double() / 255 - ours.mean.double()) / ours.std.double()
    instruction = batch.instruction_ids.expand(len(pixels), -1)
    arguments = {"pixel_values": pixels, "qformer_input_ids": instruction}
    split = len(ids) - int(batch.label_lengths)
    if template == "instructblip_t5":
        logits = theirs(
            **arguments, input_ids=ids[None, :split], decoder_input_ids=ours.shifted(ids[None, split:])
        ).logits[0]
        return torch.nn.functional.cross_entropy(logits, ids[split:], reduction="sum")
    logits = theirs(**arguments, input_ids=ids[None]).logits[0]
    return torch.nn.functional.cross_entropy(logits, batch.labels, ignore_index=IGNORE_INDEX, reduction="sum")


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_of_a_pack_equal_those_of_transformers_question_by_question(kind, places):
    config = blip_config(kind, vision="full", qformer__mode="full", llm__mode="full")
    model = build_model(config.model).double()
    theirs, tokenizer = reference(model), tokenizer_of(kind, places)
    samples = [sample for sample in make_samples(9) if sample.images]
    output = model(make_batch(samples, tokenizer, config.data.template))
    expected = torch.stack([loss_of_one(theirs, model, sample, tokenizer, config.data.template) for sample in samples])
    torch.testing.assert_close(output.segment_losses.double(), expected, rtol=1e-6, atol=1e-6)
    output.loss_sum.backward()
    expected.sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        expected = gradients[InstructBlip.their_name(name)]
        assert (parameter.grad - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-7, (
            name
        )  # T5's norms and softmax are fp32


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_of_frames_as_images_is_what_transformers_video_model_computes(kind, places):
    """InstructBlipVideo: its Q-Former looks at each frame with the question, its LLM gets all their tokens in order."""
    config = blip_config(kind, vision="full", qformer__mode="full", llm__mode="full")
    model, tokenizer, template = build_model(config.model).double(), tokenizer_of(kind, places), config.data.template
    whole = {**model.config.to_dict(), "video_token_index": IMAGE_ID, "model_type": "instructblipvideo"}
    theirs = InstructBlipVideoForConditionalGeneration._from_config(
        InstructBlipVideoConfig.from_dict(whole), attn_implementation="eager"
    ).double()
    if kind == "t5":  # transformers ties it
        theirs.language_model.lm_head.weight = torch.nn.Parameter(theirs.language_model.lm_head.weight.clone())
    theirs.load_state_dict(reference(model).state_dict(), strict=True)
    theirs.eval()
    samples = [
        Sample(
            id=f"clip{number}",
            images=tuple(f"{number}-{frame}.png" for frame in range(4)),
            turns=(Turn(role="user", text="<image>" * 4 + asked), Turn(role="assistant", text=answer)),
        )
        for number, (asked, answer) in enumerate(
            (("which color is the star ?", "red"), ("how many are there ?", "( b ) 2"))
        )
    ]
    losses = model(make_batch(samples, tokenizer, template)).segment_losses
    expected = []
    for sample in samples:
        batch = make_batch([sample], tokenizer, template)
        ids = torch.where(batch.input_ids == IMAGE_TOKEN, IMAGE_ID, batch.input_ids)
        frames = (batch.pixels[batch.image_slots].double() / 255 - model.mean.double()) / model.std.double()
        arguments = {"pixel_values": frames[None], "qformer_input_ids": batch.instruction_ids}
        split = len(ids) - int(batch.label_lengths)
        if kind == "t5":
            decoded = model.shifted(ids[None, split:])
            logits = theirs(**arguments, input_ids=ids[None, :split], decoder_input_ids=decoded).logits[0]
            labels = ids[split:]
        else:
            logits, labels = theirs(**arguments, input_ids=ids[None]).logits[0], batch.labels
        expected.append(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum"))
    torch.testing.assert_close(losses.double(), torch.stack(expected), rtol=1e-6, atol=1e-6)
    turned = [replace(sample, images=sample.images[::-1]) for sample in samples]
    assert (model(make_batch(turned, tokenizer, template)).segment_losses - losses).abs().min() > 1e-9, "order counts"


def test_a_random_vit_tells_images_apart():
    """transformers' default would start it at 1e-10: all images alike, and next to nothing to learn from."""
    model = build_model(blip_config("llama").model)
    with torch.no_grad():
        states = model.vision(torch.randn(2, 3, 16, 16)).last_hidden_state
    assert (states[0] - states[1]).abs().mean() > 0.1 * states.abs().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_segments_do_not_see_each_other(kind, places):
    model = build_model(blip_config(kind).model).double()
    tokenizer, template = tokenizer_of(kind, places), model.template
    samples = make_samples(6, seed=3)
    together = model(make_batch(samples, tokenizer, template)).segment_losses
    alone = torch.cat([model(make_batch([sample], tokenizer, template)).segment_losses for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_image_reaches_what_others_reach(kind, places):
    model = build_model(blip_config(kind, qformer__mode="lora", llm__mode="lora").model)
    text_only = [sample for sample in make_samples(10) if not sample.images]
    for batch in (
        make_batch(text_only, tokenizer_of(kind, places), model.template, blank=True),
        filler(True, squares(model)),
    ):
        model.zero_grad()
        model(batch).loss_sum.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            if name.startswith(("qformer.", "queries.", "projection.")) and parameter.requires_grad:
                assert parameter.grad.count_nonzero() == 0, name
    assert model(filler(False, squares(model))).loss_sum == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_image_goes_back_through_a_frozen_llm_as_others_do(kind, places):
    """ZeRO 3 gathers its weights then, on all ranks or on none."""
    model = build_model(blip_config(kind, qformer__mode="lora").model)
    text_only = [sample for sample in make_samples(10) if not sample.images]
    batch = make_batch(text_only, tokenizer_of(kind, places), model.template, blank=True)
    outputs = []
    first = model.blocks[len(model.vision.encoder.layers)]
    first.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    for one in (batch, filler(True, squares(model))):
        assert model(one).loss_sum.requires_grad
    assert len(outputs) == 2
    assert all((one if isinstance(one, torch.Tensor) else one[0]).requires_grad for one in outputs)


def test_the_text_ffn_of_the_last_layer_gets_no_gradient(places):
    """Structural: only the queries of the last layer are read. An importance study must know."""
    model = build_model(blip_config("llama", qformer__mode="full").model)
    samples = [sample for sample in make_samples(9) if sample.images]
    model(make_batch(samples, tokenizer_of("llama", places), model.template)).loss_sum.backward()
    dead = {
        name
        for name, parameter in model.qformer.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }
    last = f"encoder.layer.{model.config.qformer_config.num_hidden_layers - 1}."
    assert {
        name for name in dead if name.endswith(".weight") and "LayerNorm" not in name and "embeddings" not in name
    } == {
        f"{last}intermediate.dense.weight",
        f"{last}output.dense.weight",
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["lora", "adalora"])
def test_an_untrained_update_changes_nothing_and_sits_where_the_targets_say(kind, mode, places):
    samples, tokenizer = make_samples(6), tokenizer_of(kind, places)
    plain = build_model(blip_config(kind, qformer__mode="frozen").model).eval()
    changes = {"qformer__mode": mode, "qformer__targets": ["cross", "self"], "llm__mode": mode, "llm__targets": ["ffn"]}
    model = build_model(blip_config(kind, **changes).model).eval()
    batch = make_batch(samples, tokenizer, model.template)
    assert torch.equal(plain(batch).segment_losses, model(batch).segment_losses)
    wrapped = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    layers = {name: module for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    names = targeted("qformer", ("cross", "self")), targeted(kind, ("ffn",))
    expected = {
        name
        for name in layers
        if name.startswith("qformer.")
        and any(name.endswith(f".{end}") and f"layer.{name.split('.')[3]}.{end}" in name for end in names[0])
    }
    expected |= {
        name for name in layers if name.startswith("llm.") and any(name.endswith(f".{end}") for end in names[1])
    }
    assert wrapped == expected and len(wrapped) > 6
    assert sum(".crossattention." in name for name in wrapped) == 4 * 2  # layers 0 and 2 of three
    assert not any(".attention.output." in name for name in wrapped)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_frozen_networks_train_the_rest(kind, bits, places):
    pytest.importorskip("bitsandbytes")
    config = blip_config(kind, qformer__mode="lora", llm__mode="lora", model__bits=bits)
    model = build_model(config.model)
    batch = make_batch(make_samples(6), tokenizer_of(kind, places), model.template)
    exact = build_model(blip_config(kind, qformer__mode="lora", llm__mode="lora").model)(batch).loss_sum
    output = model(batch).loss_sum
    assert abs(output - exact) < 0.1 * exact and output != exact
    output.backward()
    assert any(
        ".lora_B" in name and parameter.grad.any()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


# At full size, without memory.
FULL_T5, FULL_VICUNA = (BLIPS[f"instructblip-{name}"].config for name in ("flan-t5-xl", "vicuna-7b"))


def count_at_full_size(sizes, qformer=None, llm=None):
    """(adapters' weights, everything trained, the paper's 100%)"""
    tuning = {
        "qformer": QFormerTuning(**(qformer or {"mode": "frozen"})),
        "llm": LanguageTuning(**(llm or {"mode": "frozen"})),
    }
    places = {"tokenizer": "none", "qformer_tokenizer": "none"}
    model = build_model(
        BlipModelConfig(instructblip=OurConfig(config=sizes, **places, **tuning)),
        device="meta",
    )
    counts = count_parameters(model)
    return counts["peft"][1], sum(trained for _, trained in counts.values()), model.reference_size()


@pytest.mark.parametrize(
    ("targets", "millions"),
    [(("self", "cross", "ffn"), 2.126), (("self",), 0.295), (("cross",), 0.356), (("ffn",), 1.475)],
)
def test_the_papers_counts_of_lora_on_the_qformer(targets, millions):
    adapters, trained, full = count_at_full_size(FULL_T5, qformer={"targets": targets})
    assert round(adapters / 1e6, 3) == millions
    assert round(full / 1e6, 2) == 187.26
    if len(targets) == 3:
        assert round(100 * adapters / full, 2) in (1.13, 1.14) and round(100 * trained / full, 2) == 1.99


def test_the_papers_counts_of_lora_on_both():
    both = {"qformer": {"mode": "lora"}, "llm": {"mode": "lora"}}
    adapters, trained, full = count_at_full_size(FULL_T5, **both)
    assert (round(100 * adapters / full, 2), round(100 * trained / full, 2)) == (8.06, 8.92)
    adapters, trained, full = count_at_full_size(FULL_VICUNA, **both)
    assert round(full / 1e6, 2) == 188.84
    assert (round(100 * adapters / full, 2), round(100 * trained / full, 2)) == (9.49, 11.17)
    _, trained, full = count_at_full_size(FULL_T5, qformer={"mode": "full"})
    assert trained == full


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"config": {"text_config": {"model_type": "opt"}}},
            "text_config.model_type: found 'opt', expected one of llama, t5",
        ),
        (
            {"config": {"vision_config": {"hidden_sise": 3}, "text_config": {"model_type": "t5"}}},
            "did you mean 'hidden_size'",
        ),
        ({"config": {"num_querytokens": 3, "text_config": {"model_type": "t5"}}}, "did you mean 'num_query_tokens'"),
        (
            {"source": "/nowhere/at/all", "config": {}},
            "model.instructblip.source: '/nowhere/at/all': no such file or folder",
        ),
    ],
)
def test_mistakes_are_told(changes, told):
    with pytest.raises(InputError, match=told.replace("(", "\\(")):
        build_model(blip_config("t5", **changes).model)


def test_placeholders_are_counted(places):
    model = build_model(blip_config("llama").model)
    batch = make_batch(make_samples(2), tokenizer_of("llama", places), model.template)
    batch.input_ids[QUERIES - 1] = 5
    with pytest.raises(AssertionError, match="visual places for"):
        model(batch)

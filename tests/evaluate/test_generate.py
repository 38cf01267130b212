"""Generated answers against a plain loop without cache, padding or batches."""

from __future__ import annotations

import functools
import threading

import numpy as np
import pytest
import torch

from tests.support.reading import pictures
from vltrain.config.model.mmt import AdapterConfig, LLMConfig, MmtConfig, VisionConfig
from vltrain.errors import InputError
from vltrain.evaluate.answering.decoding import Sampling, sample_tokens
from vltrain.evaluate.answering.generate import generate
from vltrain.models.build import build_model
from vltrain.models.mmt.model import MultimodalModel
from vltrain.schema import IMAGE_MODALITY_TOKEN, IMAGE_TOKEN, TEXT_MODALITY_TOKEN, Segment

VOCABULARY = 61
IMAGE_SIZE = 16
STOP = (49, 14)


def tiny_model(attention: str = "sdpa", llm: dict | None = None, **adapter) -> MultimodalModel:
    config = MmtConfig(
        vision=VisionConfig(
            config=dict(
                image_size=IMAGE_SIZE,
                patch_size=8,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
            ),
            tap_every=1,
        ),
        llm=LLMConfig(
            config=dict(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                initializer_range=0.3,
                **(llm or {}),
            ),
            tokenizer="none",
            attention=attention,
        ),
        adapter=AdapterConfig(**{"dim": 4, "groups": 2, **adapter}),
    )
    model = build_model(config).eval()
    with torch.no_grad():  # a neck and adapters that matter
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    return model


MODEL = tiny_model()
PIXELS = np.random.default_rng(1).integers(0, 256, (4, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
IMAGES = {f"image{number}": pixels for number, pixels in enumerate(PIXELS)}


def make_prompts(count: int, seed: int = 0) -> list[Segment]:
    """Prompts of 2 to 30 tokens with no, one or two images."""
    rng = np.random.default_rng(seed)
    prompts = []
    for number in range(count):
        names = tuple(rng.choice(sorted(IMAGES), size=rng.integers(0, 3)))
        ids = [IMAGE_MODALITY_TOKEN if names else TEXT_MODALITY_TOKEN]
        for _ in names:
            ids += [*rng.integers(0, VOCABULARY, rng.integers(1, 4)), *[IMAGE_TOKEN] * MODEL.visual_tokens]
        ids += [*rng.integers(0, VOCABULARY, rng.integers(1, 18))]
        tokens = {"input_ids": np.array(ids, np.int32), "loss_mask": np.zeros(len(ids), bool)}
        prompts.append(Segment(sample_id=f"sample{number}", images=tuple(map(str, names)), **tokens))
    return prompts


def run(
    prompts: list[Segment], batch_size: int, model: MultimodalModel = MODEL, load_image=IMAGES.__getitem__, **changes
) -> list[list[int]]:
    sampling = Sampling(**{"max_new_tokens": 12, **changes.pop("sampling", {})})
    settings = {"stop_ids": STOP, "vocab_size": VOCABULARY, "device": "cpu", **changes}
    return generate(model, prompts, pictures(model, load_image), sampling=sampling, batch_size=batch_size, **settings)


def plain_hidden_states(model: MultimodalModel, embeds: torch.Tensor) -> torch.Tensor:
    """[T, d] -> [T, d]; with routed adapters as training computes them, for a row of one segment."""
    if model.routing is None:
        return model.llm.model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0]
    num_tokens = len(embeds)
    return model._hidden_states(
        embeds, torch.arange(num_tokens), torch.tensor([num_tokens]), torch.zeros(num_tokens, dtype=torch.int64)
    )


@torch.no_grad()
def plain_answer(model: MultimodalModel, prompt: Segment, max_new_tokens: int = 12) -> list[int]:
    """One prompt, greedy, the whole sequence anew for each token."""
    visual = torch.empty(0, 3, 32)
    if prompt.images:
        visual = model.encode_images(torch.from_numpy(np.stack([IMAGES[name] for name in prompt.images])))
    answer: list[int] = []
    for _ in range(max_new_tokens):
        ids = torch.tensor([*prompt.input_ids.tolist(), *answer])
        embeds = model.embed(ids, visual, torch.arange(len(prompt.images)))
        token = int(model.llm.lm_head(plain_hidden_states(model, embeds)[-1]).argmax())
        if token in STOP:
            break
        answer.append(token)
    return answer


PROMPTS = make_prompts(40)


@functools.cache
def plain_answers() -> list[list[int]]:
    """The plain loop's, to all prompts."""
    return [plain_answer(MODEL, prompt) for prompt in PROMPTS]


def test_the_reference_is_worth_comparing_with():
    """Answers differ from each other, in length too, and images change them."""
    assert len({tuple(answer) for answer in plain_answers()}) > 30
    assert {0, 12} < {len(answer) for answer in plain_answers()} and len(
        {len(answer) for answer in plain_answers()}
    ) > 4
    with_image = [number for number, prompt in enumerate(PROMPTS) if prompt.images]
    other = {name: IMAGES[name][::-1].copy() for name in IMAGES}
    changed = run([PROMPTS[number] for number in with_image], 16, load_image=other.__getitem__)
    assert (
        sum(answer != plain_answers()[number] for number, answer in zip(with_image, changed, strict=True))
        > len(with_image) / 2
    )


@pytest.mark.parametrize("batch_size", [1, 3, 16, 64])
def test_greedy_answers_equal_the_plain_loop_at_any_batch_size(batch_size):
    assert run(PROMPTS, batch_size) == plain_answers()


def test_greedy_answers_equal_the_plain_loop_with_eager_attention():
    assert run(PROMPTS, 16, model=tiny_model("eager")) == plain_answers()


@pytest.mark.parametrize("batch_size", [1, 16])
def test_routed_adapters_answer_as_they_were_trained(batch_size):
    model = tiny_model(kind="router", temperature=0.5)
    with torch.no_grad():  # experts and decisions that differ by modality
        for name, parameter in model.llm.named_parameters():
            if ".adapter." in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    expected = [plain_answer(model, prompt) for prompt in PROMPTS]
    decided = model.decide_routing
    model.decide_routing = lambda: None  # the modality decides: other decisions, other answers
    with torch.no_grad():
        decided()
    for router in model.routing.decisions:
        model.routing.decisions[router] = model.routing.decisions[router].flip(0)
    assert run(PROMPTS, batch_size, model=model) != expected
    del model.decide_routing
    assert run(PROMPTS, batch_size, model=model) == expected


WINDOWED = {
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5, "head_dim": 8, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 9.0},
    "gemma3_text": {"sliding_window": 5, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize(("name", "attention"), [*((name, "sdpa") for name in WINDOWED), ("mistral", "eager")])
def test_llms_with_sliding_windows_answer_as_alone(name, attention):
    kind = "router" if name == "mistral" else "bottleneck"
    model = tiny_model(attention, {"model_type": name, **WINDOWED[name]}, kind=kind)
    prompts = make_prompts(7)
    assert run(prompts, 7, model) == run(prompts, 1, model) == [plain_answer(model, prompt) for prompt in prompts]


def test_answers_do_not_depend_on_the_neighbours_or_their_order():
    shuffled = np.random.default_rng(3).permutation(len(PROMPTS))[:11]
    assert run([PROMPTS[number] for number in shuffled], 4) == [plain_answers()[number] for number in shuffled]


def test_sampled_answers_depend_on_seed_and_sample_alone():
    sampling = {"temperature": 0.9, "top_p": 0.8, "seed": 7}
    expected = run(PROMPTS, 1, sampling=sampling)
    for batch_size in (3, 16):
        assert run(PROMPTS, batch_size, sampling=sampling) == expected
    assert run(PROMPTS[5:9], 4, sampling=sampling) == expected[5:9]
    assert run(PROMPTS, 16, sampling={**sampling, "seed": 8}) != expected
    assert expected != plain_answers()


def test_a_cold_or_narrow_nucleus_is_greedy():
    assert run(PROMPTS, 16, sampling={"temperature": 1e-4}) == plain_answers()
    assert run(PROMPTS, 16, sampling={"temperature": 1.0, "top_p": 1e-9}) == plain_answers()


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1.0, [0.5, 0.25, 0.15, 0.1]), (0.75, [0.5, 0.25]), (0.76, [0.5, 0.25, 0.15]), (0.3, [0.5])]
)
def test_tokens_are_drawn_with_the_nucleus_probabilities(top_p, kept):
    order = [2, 0, 3, 1]  # token that holds the k-th largest probability
    logits = torch.empty(4)
    logits[order] = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = sample_tokens(logits.expand(20_000, 4), uniforms, 1.0, top_p)
    shares = torch.bincount(drawn, minlength=4)[order] / 20_000
    expected = torch.tensor(kept + [0.0] * (4 - len(kept))) / sum(kept)
    torch.testing.assert_close(shares, expected, atol=1e-3, rtol=0)


def test_temperature_sharpens():
    logits = torch.tensor([1.0, 0.0])
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = sample_tokens(logits.expand(20_000, 2), uniforms, 0.5, 1.0)
    assert float((drawn == 0).double().mean()) == pytest.approx(1 / (1 + np.exp(-2.0)), abs=1e-3)


def test_each_distinct_image_of_a_batch_is_loaded_and_encoded_once(monkeypatch):
    loaded, encoded, lock = [], [], threading.Lock()

    def load_image(name: str) -> np.ndarray:
        with lock:
            loaded.append(name)
        return IMAGES[name]

    encode = MODEL.encode_images
    monkeypatch.setattr(MODEL, "encode_images", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    assert run(PROMPTS, len(PROMPTS), load_image=load_image) == plain_answers()
    assert sorted(loaded) == sorted(IMAGES)
    assert encoded == [len(IMAGES)]


def test_text_only_prompts_need_no_image_and_no_prompts_no_answers():
    text = [number for number, prompt in enumerate(PROMPTS) if not prompt.images]
    assert run([PROMPTS[number] for number in text], 8, load_image={}.__getitem__) == [
        plain_answers()[number] for number in text
    ]
    assert run([], 8) == []


def test_progress_counts_every_prompt():
    counts: list[int] = []
    run(PROMPTS, 16, on_answered=counts.append)
    assert counts == [16, 16, 8]


class Rank:
    """One of several threads that stand for ranks: `sync` is a maximum over all; forwards are recorded in order."""

    def __init__(self, barrier: threading.Barrier, values: list[int], rank: int) -> None:
        self.barrier, self.values, self.rank = barrier, values, rank
        self.calls: list[str] = []

    def sync(self, value: int) -> int:
        self.values[self.rank] = value
        self.barrier.wait(timeout=60)
        largest = max(self.values)
        self.barrier.wait(timeout=60)
        return largest


@pytest.mark.parametrize(
    "shares", [(slice(0, 30), slice(30, 40)), (slice(0, 3), slice(0, 0)), (slice(0, 0), slice(0, 0))]
)
def test_ranks_that_sync_make_the_same_forwards_and_the_answers_stay(shares):
    barrier, values = threading.Barrier(2), [0, 0]
    ranks = [Rank(barrier, values, number) for number in range(2)]
    models = [tiny_model(), tiny_model()]
    for rank, model in zip(ranks, models):
        for name in ("vision", "neck", "modality_embedding", "llm.model", "llm.lm_head"):
            model.get_submodule(name).register_forward_pre_hook(
                lambda module, arguments, rank=rank, name=name: rank.calls.append(name)
            )
    answers: list = [None, None]

    def work(number: int) -> None:
        answers[number] = run(PROMPTS[shares[number]], 4, model=models[number], sync=ranks[number].sync)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [plain_answers()[share] for share in shares]
    assert ranks[0].calls == ranks[1].calls
    assert ("vision" in ranks[0].calls) == bool(PROMPTS[shares[0]])


def test_rows_of_the_vocabulary_that_the_tokenizer_lacks_are_never_chosen():
    assert max(max(answer, default=0) for answer in plain_answers()) >= 40
    answers = run(PROMPTS, 16, vocab_size=40)
    assert max(max(answer, default=0) for answer in answers) == 39


def test_outputs_that_are_not_finite_name_their_sample():
    model = tiny_model()
    with torch.no_grad():
        model.modality_embedding.weight[0] = torch.nan
    text = next(prompt for prompt in PROMPTS if not prompt.images)
    with pytest.raises(InputError, match=f"'{text.sample_id}'.*not finite"):
        run([text], 1, model=model)


def test_an_unreadable_image_ends_the_evaluation():
    def load_image(name: str) -> np.ndarray:
        raise InputError(f"{name}: damaged")

    with pytest.raises(InputError, match="damaged"):
        run(PROMPTS, 4, load_image=load_image)

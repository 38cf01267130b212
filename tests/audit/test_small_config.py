"""A small copy of a config keeps every mechanism of it."""

import copy

import pytest
from transformers import CONFIG_MAPPING

from tests.audit.configs import LANGUAGE, VISION, config_of
from vltrain.audit.samples import TEXT
from vltrain.audit.small.config import shrink
from vltrain.audit.small.sizes import VOCABULARY, in_proportion


@pytest.mark.parametrize("kind", [*LANGUAGE, *VISION])
def test_every_kind_of_layer_stays_in_its_order(kind):
    large = config_of(kind).get_text_config()
    small = shrink(config_of(kind)).config.get_text_config()
    kinds = getattr(large, "layer_types", None)
    if kinds is None:
        assert 2 <= small.num_hidden_layers <= 4
        return
    assert list(dict.fromkeys(small.layer_types)) == list(dict.fromkeys(kinds))
    assert len(small.layer_types) == small.num_hidden_layers <= 8


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text", "gpt_oss", "cohere2"])
def test_windows_are_shorter_than_the_segments(kind):
    assert 1 < shrink(config_of(kind)).config.sliding_window < sorted(length for (length,) in TEXT)[-2]


def test_a_window_that_is_not_there_stays_away():
    assert shrink(CONFIG_MAPPING["mistral"](sliding_window=None)).config.sliding_window is None


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("gemma2", ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar")),
        ("granite", ("attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier")),
        ("cohere2", ("logit_scale", "tie_word_embeddings")),
        ("deepseek_v3", ("routed_scaling_factor", "norm_topk_prob")),
        ("llama", ("rope_parameters",)),
    ],
)
def test_scales_and_caps_stay(kind, names):
    large, small = config_of(kind), shrink(config_of(kind)).config
    for name in names:
        assert getattr(small, name) == getattr(large, name) is not None


@pytest.mark.parametrize(("heads", "shared", "kept"), [(32, 8, True), (32, 32, False), (32, 1, True)])
def test_how_heads_share_keys_stays(heads, shared, kept):
    small = shrink(CONFIG_MAPPING["qwen2"](num_attention_heads=heads, num_key_value_heads=shared)).config
    assert (small.num_key_value_heads < small.num_attention_heads) == kept
    assert (small.num_key_value_heads == 1) == (shared == 1)


def test_heads_that_do_not_sum_to_the_width_still_do_not():
    small = shrink(CONFIG_MAPPING["qwen3"](hidden_size=1024, num_attention_heads=16, head_dim=128)).config
    assert small.head_dim * small.num_attention_heads > small.hidden_size


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"])
def test_position_sections_fill_the_half_that_rotates(kind):
    text = shrink(config_of(kind)).config.get_text_config()
    entries = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rope = text.rope_parameters
    assert sum(rope["mrope_section"]) == int(entries * rope.get("partial_rotary_factor", 1.0)) // 2
    assert min(rope["mrope_section"]) >= 1


def test_parts_in_proportion():
    assert in_proportion([16, 24, 24], 16) == [4, 6, 6]
    assert in_proportion([11, 11, 10], 4) == [2, 1, 1]
    assert in_proportion([1, 1, 0], 2) == [1, 1, 0]


@pytest.mark.parametrize("kind", list(VISION))
def test_special_tokens_are_distinct_and_in_the_vocabulary(kind):
    made = shrink(config_of(kind))
    assert len(set(made.tokens.values())) == len(made.tokens)
    assert list(dict(sorted(made.tokens.items())).values()) == sorted(made.tokens.values())
    assert made.config.image_token_id == made.tokens[config_of(kind).image_token_id] < VOCABULARY
    assert made.config.get_text_config().vocab_size == VOCABULARY


def test_nothing_is_left_to_chance_and_the_original_stays():
    large = CONFIG_MAPPING["qwen2_moe"](attention_dropout=0.1)
    before = copy.deepcopy(large.to_dict())
    small = shrink(large).config
    assert small.attention_dropout == 0
    assert small.num_experts_per_tok < small.num_experts
    assert large.to_dict() == before


def test_pooling_of_patches_stays():
    small = shrink(CONFIG_MAPPING["gemma3"](vision_config={"image_size": 896, "patch_size": 14})).config
    side = small.vision_config.image_size // small.vision_config.patch_size
    assert side**2 / small.mm_tokens_per_image == (896 // 14) ** 2 / 256


def test_features_of_several_layers_stay_several():
    small = shrink(CONFIG_MAPPING["vipllava"]()).config
    layers = small.vision_feature_layers
    assert len({one % (small.vision_config.num_hidden_layers + 1) for one in layers}) == len(set(layers))


@pytest.mark.parametrize("kind", [*LANGUAGE, *VISION])
def test_it_is_small(kind):
    text = shrink(config_of(kind)).config.get_text_config()
    assert text.hidden_size <= 128 and text.num_hidden_layers <= 8

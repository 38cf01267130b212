"""T5 and Flan-T5, as LLMs of InstructBLIP."""

from __future__ import annotations

from transformers import T5Config, T5ForConditionalGeneration

from vltrain.models.backbones.family import EncoderDecoder

T5 = EncoderDecoder(
    title="T5",
    model_types=("t5",),
    config=T5Config,
    network=T5ForConditionalGeneration,
    blip_targets={  # the decoder counts its sublayers one further
        "attn": (
            "layer.0.SelfAttention.q",
            "layer.0.SelfAttention.v",
            "layer.1.EncDecAttention.q",
            "layer.1.EncDecAttention.v",
        ),
        "ffn": tuple(
            f"layer.{place}.DenseReluDense.{name}" for place in (1, 2) for name in ("wi", "wi_0", "wi_1", "wo")
        ),
    },
)

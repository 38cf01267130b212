"""The families that need a word. One that needs none isn't here."""

from __future__ import annotations

from vltrain.families.family import Family

_DEFAULT = Family()
FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v"),
        token_type_argument="mm_token_type_ids",
    ),
    Family(model_types=("gemma3",), blocks="images", token_type_argument="token_type_ids"),
    Family(
        model_types=("paligemma",),
        blocks="prefix",
        block_rule="over_window",
        first_position=1,
        token_type_argument="token_type_ids",
        # What PaliGemmaProcessor makes of a prompt, and the answer as its `suffix`.
        chat_template=(
            "{% for message in messages %}{% if message['role'] == 'user' %}"
            "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
            "{{ bos_token }}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
            "{{ part['text'] }}{% endfor %}{{ '\n' }}{% elif message['role'] == 'assistant' %}"
            "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}"
            "{% else %}{{ raise_exception('PaliGemma knows no system turn') }}{% endif %}{% endfor %}"
        ),
    ),
    Family(
        model_types=("mllama",),
        refused="its LLM reads images by cross-attention, which packs do not isolate",
    ),
)


def family_of(model_type: str) -> Family:
    """What is said of the family; the default where nothing is."""
    return next((family for family in FAMILIES if model_type in family.model_types), _DEFAULT)

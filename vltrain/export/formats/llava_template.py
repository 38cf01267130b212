"""The prompts of a run as chat templates (Jinja) of transformers' LLaVA processor: what
`vltrain.data.text.conversation` writes, with tokens for what it has as placeholders."""

from __future__ import annotations

import json

IMAGE = "<image>"
MODALITIES = ("<|no_image|>", "<|with_image|>")
"""What stands in front of a prompt without and with an image."""

# Messages whose content is a text, or a list of texts and images: read.messages, each with the images in `front` of its
# text, and the `rest`. Then what stands in front of all.
_READ = """\
{%- set read = namespace(messages=[], images=0, named=true) -%}
{%- for message in messages -%}
{%- set own = namespace(front='', rest='') -%}
{%- if message['content'] is string -%}
{%- set own.rest = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] != 'image' -%}
{%- set own.rest = own.rest + part['text'] -%}
{%- else -%}
{%- set read.images = read.images + 1 -%}
{%- if own.rest -%}
{%- set own.rest = own.rest + @PLACE@ -%}
{%- else -%}
{%- set own.front = own.front + @PLACE@ -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set read.messages = read.messages + [{'role': message['role'], 'front': own.front, 'rest': own.rest}] -%}
{%- endfor -%}
{%- set read.named = read.images > 0 -%}
{{- @WITH@ if read.images else @WITHOUT@ -}}
"""
# One question: no token spans it and an answer, which a tokenizer that reads both as one text does not know.
_MMT = """\
{{- @BOS@ -}}
{%- set before = namespace(system='') -%}
{%- for message in read.messages -%}
{%- if message['role'] == 'system' -%}
{%- set before.system = message['rest'] -%}
{%- elif message['role'] == 'user' and loop.last -%}
{{- message['front'] if read.named else @NONE@ -}}
{{- before.system + ('\\n' if before.system and message['rest'] else '') + message['rest'] -}}
{%- else -%}
{{- raise_exception('this model answers one question: its template mmt has no conversations as a text') -}}
{%- endif -%}
{%- endfor -%}
"""
_CHAT = """\
{%- set given = namespace(messages=[]) -%}
{%- for message in read.messages -%}
{%- if message['role'] == 'user' -%}
{%- set content = ((message['front'] if read.named else @NONE@) + message['rest']) | trim -%}
{%- set read.named = true -%}
{%- else -%}
{%- set content = message['rest'] | trim -%}
{%- endif -%}
{%- set given.messages = given.messages + [{'role': message['role'], 'content': content}] -%}
{%- endfor -%}
{%- set messages = given.messages -%}
{%- set enable_thinking = false -%}
{{- '' }}"""


def mmt_template(bos: str) -> str:
    """Template `mmt`, for one question."""
    return _with_words(_READ + _MMT, BOS=bos)


def chat_template(template: str, answer_prefix: str) -> str:
    """Template `chat`: a tokenizer's own `template`, with what a prompt has behind it."""
    behind = "{%- if add_generation_prompt -%}{{- @PREFIX@ -}}{%- endif -%}" if answer_prefix else ""
    return _with_words(_READ + _CHAT) + template.removesuffix("\n") + _with_words(behind, PREFIX=answer_prefix)


def _with_words(template: str, **words: str) -> str:
    known = {
        "PLACE": f"Image: {IMAGE}\n", "NONE": "Image: N/A\n", "WITHOUT": MODALITIES[0], "WITH": MODALITIES[1], **words,
    }  # fmt: skip
    for name, word in known.items():
        template = template.replace(f"@{name}@", json.dumps(word, ensure_ascii=False))
    return template

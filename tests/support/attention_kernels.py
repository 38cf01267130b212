"""Stand-ins for attention kernels of CUDA: their signatures and checks, and the arithmetic of one segment after another
in plain torch.

torch's `varlen_attn` as 2.10, 2.11 and 2.12 (also 2.13) have it, and packages of flash-attn 2.8, 3 and 4 that Python
finds and pip's metadata names. `CALLS` notes what was asked of each. The kernels themselves take bf16 and fp16 only;
`EXACT` lets fp32 and fp64 through as well.
"""

from pathlib import Path

import torch
from torch import Tensor

CALLS: list[tuple[str, int]] = []  # (function, number of segments)
EXACT = False


def check(*tensors: Tensor, starts: tuple[Tensor, ...] = (), head_multiple: int = 8, longest_head: int = 256) -> None:
    """What the kernels' C++ asserts of queries, keys, values and the starts of segments."""
    query, key, value = tensors
    assert EXACT or query.dtype in (torch.float16, torch.bfloat16), (
        "FlashAttention only support fp16 and bf16 data type"
    )
    assert query.dtype == key.dtype == value.dtype, "query and key must have the same dtype"
    assert all(tensor.stride(-1) == 1 for tensor in tensors), "Input tensor must have contiguous last dimension"
    assert query.shape[-1] <= longest_head and query.shape[-1] % head_multiple == 0, "head dimension"
    assert query.shape[-2] % key.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query"
    for start in starts:
        assert start.dtype == torch.int32 and start.is_contiguous() and start.ndim == 1, (
            "cu_seqlens must be int32 and contiguous"
        )


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool, window: tuple[int | None, ...] = (-1,)
) -> Tensor:
    """One segment. `query` [Lq, H, D], `key` and `value` [Lk, H_kv, D]; the mask is aligned to the lower right corner.

    window: how many keys before its own place a query sees first of all; all where that is -1 or None.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(repeats, 1) for states in (key, value))
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("qhd,khd->hqk", query.to(exact), key.to(exact)) * (
        query.shape[-1] ** -0.5 if scale is None else scale
    )
    if causal:
        seen = torch.ones(len(query), len(key), dtype=torch.bool).tril(len(key) - len(query))
        if window[0] not in (-1, None):
            seen &= ~seen.tril(len(key) - len(query) - window[0] - 1)
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.to(exact)).to(query.dtype)


def attend_packed(
    name: str, query, key, value, starts_q, starts_k, longest_q, longest_k, scale, causal, window=(-1,), **limits
) -> Tensor:
    check(query, key, value, starts=(starts_q, starts_k), **limits)
    ends_q, ends_k = starts_q.tolist(), starts_k.tolist()
    assert type(longest_q) is int and type(longest_k) is int, "max_seqlen must be an int"
    assert ends_q[-1] == len(query) and ends_k[-1] == len(key) == len(value), "cu_seqlens must cover all tokens"
    spans = [(slice(*q), slice(*k)) for q, k in zip(zip(ends_q, ends_q[1:]), zip(ends_k, ends_k[1:]), strict=True)]
    assert (
        max(q.stop - q.start for q, _ in spans) <= longest_q and max(k.stop - k.start for _, k in spans) <= longest_k
    ), "max_seqlen too small"
    CALLS.append((name, len(spans)))
    return torch.cat([attend(query[q], key[k], value[k], scale, causal, window) for q, k in spans])


def attend_batch(name: str, query, key, value, scale, causal, **limits) -> Tensor:
    check(query, key, value, **limits)
    CALLS.append((name, 0))
    return torch.stack([attend(*row, scale, causal) for row in zip(query, key, value, strict=True)])


def varlen_attn_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert query.shape[1] == key.shape[1], "no grouped-query attention"
    return attend_packed("varlen 2.10", query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, None, is_causal)


def varlen_attn_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert query.shape[1] == key.shape[1], "no grouped-query attention"
    return attend_packed(
        "varlen 2.11", query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size[1] == 0, window_size
    )


def varlen_attn_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(
            "Expect query and key/value to have the same number of heads. Try setting enable_gqa=True for GQA."
        )
    return attend_packed(
        "varlen 2.12", query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size[1] == 0, window_size
    )


def flash_2_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    return attend_packed(
        "flash 2",
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_size,
        head_multiple=1,
    )


def flash_2(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return attend_batch("flash 2", q, k, v, softmax_scale, causal, head_multiple=1)


def flash_3_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    return attend_packed(
        "flash 3", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size
    )


def flash_3(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    return attend_batch("flash 3", q, k, v, softmax_scale, causal)


def flash_4_varlen(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    return_lse=False,
):
    out = attend_packed(
        "flash 4",
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_size,
        longest_head=128,
    )
    return out, None


def flash_4(
    q,
    k,
    v,
    qv=None,
    gather_kv_indices=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    return_lse=False,
):
    return attend_batch("flash 4", q, k, v, softmax_scale, causal, longest_head=128), None


def no_cache(*_, **__):
    raise NotImplementedError


FLASH_2 = """from tests.support.attention_kernels import flash_2 as flash_attn_func
from tests.support.attention_kernels import flash_2_varlen as flash_attn_varlen_func
from tests.support.attention_kernels import no_cache as flash_attn_with_kvcache
__version__ = "2.8.3"
"""
FILES = {
    "flash-attn": {
        "flash_attn/__init__.py": FLASH_2,
        "flash_attn/bert_padding.py": "from transformers.modeling_flash_attention_utils import _pad_input "
        "as pad_input\n"
        "from transformers.modeling_flash_attention_utils import _unpad_input as unpad_input\n",
    },
    "flash-attn-3": {"flash_attn_interface.py": FLASH_2.replace("flash_2", "flash_3")},
    "flash-attn-4": {"flash_attn/cute/__init__.py": FLASH_2.replace("flash_2", "flash_4")},
}
VERSIONS = {"flash-attn": "2.8.3", "flash-attn-3": "3.0.0", "flash-attn-4": "4.0.0b36"}


def install(folder: Path, distribution: str, **replaced: str) -> None:
    """Writes a package and its metadata into a folder of `sys.path`. `replaced`: "source" in the place of its modules'
    own."""
    modules = FILES[distribution]
    for name, source in modules.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(replaced.get("source", source))
    info = folder / f"{distribution.replace('-', '_')}-{VERSIONS[distribution]}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {VERSIONS[distribution]}\n")
    (info / "top_level.txt").write_text(next(iter(modules)).partition("/")[0].removesuffix(".py") + "\n")

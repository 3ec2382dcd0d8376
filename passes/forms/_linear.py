"""Linear (kernelised) attention: the eager mathematics and the closed operation counts.

With features fq [B, H, T, R] and fk [B, G, S, R] (not negative) the weight of key j for query i
is ``fq_i . fk_j / max(sum_j fq_i . fk_j, eps)`` over the visible keys; a query that sees no key
gives 0. Head h reads the keys of group ``h // (H // G)``.

Causal: query i sees the keys j <= i + (S - T), computed in chunks of `CHUNK` tokens: inside a
chunk by the masked quadratic form, before it by a running state. Values at hidden keys do not
matter as long as they are finite.

Counts are those of the kernels (codegen/kit.py) before scheduling: a reduction over K terms is
K additions, index arithmetic is free, and bytes are every input read once and the output written
once per kernel. Operations are counted in the type they accumulate in (float32 for 16-bit data).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from passes.form import YES, FormSpec, Reason, Verdict, no
from passes.opcount import OpCount
from passes.site import AttentionSite

CHUNK = 64
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def linear_verdict(site: AttentionSite, name: str) -> Verdict:
    """What a linear form can take: causal and padding masks, cross attention, grouped heads."""
    mask = site.mask
    if mask.unknown:
        return no(
            Reason.MASK_UNKNOWN,
            f"the mask of {site.id} was not understood, and {name} can not apply a mask tensor",
        )
    if mask.bias:
        return no(
            Reason.MASK_BIAS,
            f"{site.id} adds a bias to its logits; {name} never forms the logits",
        )
    if mask.window is not None:
        return no(
            Reason.MASK_WINDOW,
            f"{site.id} sees a window of keys {mask.window}; {name} sums over all earlier keys",
        )
    return group_verdict(site)


def group_verdict(site: AttentionSite) -> Verdict:
    """The head counts and the dtype every form needs."""
    d = site.dims
    if d.G < 1 or d.H % d.G:
        return no(Reason.GROUPED, f"{d.H} query heads do not divide over {d.G} key/value heads")
    if dtype_name(site.dtype) not in _BYTES:
        return no(Reason.DTYPE, f"{site.dtype} is not a floating type ({', '.join(_BYTES)})")
    return YES


def dtype_name(dtype: object) -> str:
    """``torch.float32`` or "float32" -> "float32"."""
    return str(dtype).removeprefix("torch.")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16-bit data, else the type itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def visible(
    spec: FormSpec, queries: int, keys: int, device: torch.device | None = None
) -> torch.Tensor | None:
    """[T, S] bool of the spec's causal and window facts, None if every key is visible."""
    if not spec.causal and spec.window is None:
        return None
    row = torch.arange(queries, device=device)[:, None] + (keys - queries)
    column = torch.arange(keys, device=device)[None, :]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if spec.causal:
        seen = seen & (column <= row)
    if spec.window is not None:
        left, right = spec.window
        seen = seen & (column >= row - left) & (column <= row + right)
    return seen


def linear_weights(
    fq: torch.Tensor,
    fk: torch.Tensor,
    spec: FormSpec,
    key_mask: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Attention weights [B, H, T, S] from fq [B, H, T, R] and fk [B, G, S, R]; quadratic."""
    batch, heads, queries, width = fq.shape
    groups, keys = fk.shape[1], fk.shape[2]
    grouped = fq.reshape(batch, groups, -1, width)
    scores = (grouped @ fk.transpose(-1, -2)).reshape(batch, heads, queries, keys)
    seen = visible(spec, queries, keys, fq.device)
    if seen is not None:
        scores = scores.masked_fill(~seen, 0.0)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], 0.0)
    return scores / scores.sum(-1, keepdim=True).clamp_min(eps)


def linear_attention(
    fq: torch.Tensor,
    fk: torch.Tensor,
    v: torch.Tensor,
    *,
    key_mask: torch.Tensor | None = None,
    causal: bool = False,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Linear attention [B, H, T, E] in v's dtype.

    fq [B, H, T, R], fk [B, G, S, R], v [B, G, S, E], key_mask [B or 1, S] bool. Sums are kept in
    float32 when the data is 16 bit.
    """
    wide = accumulate_dtype(v.dtype)
    fq, fk, values = fq.to(wide), fk.to(wide), v.to(wide)
    if key_mask is not None:
        fk = fk.masked_fill(~key_mask[:, None, :, None], 0.0)
    batch, heads, queries, width = fq.shape
    grouped = fq.reshape(batch, fk.shape[1], -1, queries, width)  # [B, G, H/G, T, R]
    out = _causal(grouped, fk, values, eps) if causal else _whole(grouped, fk, values, eps)
    return out.reshape(batch, heads, queries, -1).to(v.dtype)


def _whole(fq: torch.Tensor, fk: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    ones = F.pad(v, (0, 1), value=1.0)  # the denominator rides along: features are read once
    both = fq @ (fk.transpose(-1, -2) @ ones)[:, :, None]  # [B, G, H/G, T, E + 1]
    return both[..., :-1] / both[..., -1:].clamp_min(eps)


def _causal(fq: torch.Tensor, fk: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    """Grouped queries [B, G, H/G, T, R]; keys before the first query only enter the state."""
    queries, keys = fq.shape[3], fk.shape[2]
    blind = max(queries - keys, 0)  # the first queries see nothing
    old = max(keys - queries, 0)
    out = _chunked(fq[:, :, :, blind:], fk[:, :, old:], v[:, :, old:], fk[:, :, :old],
                   v[:, :, :old], eps)  # fmt: skip
    return F.pad(out, (0, 0, blind, 0)) if blind else out


def _chunked(
    fq: torch.Tensor,
    fk: torch.Tensor,
    v: torch.Tensor,
    old_fk: torch.Tensor,
    old_v: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    tokens = fq.shape[3]
    size = min(CHUNK, max(tokens, 1))
    chunks = -(-tokens // size)
    pad = (0, 0, 0, chunks * size - tokens)
    fq = _split(F.pad(fq, pad), chunks)  # [B, G, H/G, N, C, R]
    fk = _split(F.pad(fk, pad), chunks)  # [B, G, N, C, R]
    ones = F.pad(torch.ones_like(v[..., :1]), pad)
    v = _split(torch.cat([F.pad(v, pad), ones], -1), chunks)  # the denominator rides along
    old = old_fk.transpose(-1, -2) @ F.pad(old_v, (0, 1), value=1.0)  # [B, G, R, E + 1]
    sums = fk.transpose(-1, -2) @ v  # [B, G, N, R, E + 1]
    before = torch.cat([old[:, :, None], sums[:, :, :-1]], 2).cumsum(2)[:, :, None]
    inside = (fq @ fk.transpose(-1, -2)[:, :, None]).tril() @ v[:, :, None]
    both = (inside + fq @ before).flatten(3, 4)[:, :, :, :tokens]
    return both[..., :-1] / both[..., -1:].clamp_min(eps)


def _split(x: torch.Tensor, chunks: int) -> torch.Tensor:
    """[..., N * C, R] -> [..., N, C, R]."""
    return x.reshape(*x.shape[:-2], chunks, -1, x.shape[-1])


# Closed counts. All sizes are ints; `site` must have static dims.


def sizes(site: AttentionSite) -> tuple[int, int, int, int, int, int, int]:
    """(B, H, G, T, S, D, E) as ints; ValueError for a dynamic dimension."""
    d = site.dims
    for name, value in (("B", d.B), ("T", d.T), ("S", d.S)):
        if isinstance(value, str):
            raise ValueError(f"{site.id}: operation counts need static dims; {name} is {value!r}")
    return int(d.B), d.H, d.G, int(d.T), int(d.S), d.D, d.E


def count_dtype(site: AttentionSite) -> str:
    """The type operations are counted in."""
    return "float64" if dtype_name(site.dtype) == "float64" else "float32"


def item_bytes(site: AttentionSite) -> int:
    """Bytes of one value of the site's tensors."""
    return _BYTES[dtype_name(site.dtype)]


def project_ops(rows: int, heads: int, d: int, r: int, *, scaled: bool, site: AttentionSite
                ) -> OpCount:  # fmt: skip
    """x [B, heads, T, d] times w [heads, d, r], rows = B * heads * T.

    mul rows*d*r, add rows*d*r; a scale other than 1 multiplies the result: mul rows*r.
    """
    return OpCount.of(
        count_dtype(site),
        mul=rows * d * r + (rows * r if scaled else 0),
        add=rows * d * r,
        read=(rows * d + heads * d * r) * item_bytes(site),
        written=rows * r * item_bytes(site),
    )


def softmax_pair_ops(rows: int, r: int, site: AttentionSite) -> OpCount:
    """[softmax(y), softmax(-y)] over rows of length r.

    For each sign and row: max r (row extreme), add r (subtract it), exp r, add r (sum), div r.
    """
    return OpCount.of(
        count_dtype(site),
        max=2 * rows * r,
        add=4 * rows * r,
        exp=2 * rows * r,
        div=2 * rows * r,
        read=rows * r * item_bytes(site),
        written=2 * rows * r * item_bytes(site),
    )


def elu1_ops(values: int, site: AttentionSite) -> OpCount:
    """elu(x) + 1 = max(x, 0) + exp(min(x, 0)): max 2, exp 1, add 1 for each value."""
    return OpCount.of(
        count_dtype(site),
        max=2 * values,
        exp=values,
        add=values,
        read=values * item_bytes(site),
        written=values * item_bytes(site),
    )


def fused(count: OpCount, site: AttentionSite, weights: int = 0) -> OpCount:
    """The operations of `count` in one kernel, which keeps features out of memory.

    Read are q, k, v, `weights` values of parameters and the key mask; written is the output. (The
    kernels for GPUs are not fused: there features are written and read again.)
    """
    b, h, g, t, s, d, e = sizes(site)
    values = b * h * t * d + b * g * s * (d + e) + weights
    mask = b * s if site.mask.padding else 0
    size = item_bytes(site)
    return OpCount(count.ops, values * size + mask, b * h * t * e * size)


def linear_attention_ops(site: AttentionSite, r: int) -> OpCount:
    """The sums of linear attention with r features (`linear_attention` above).

    key mask       mul B*G*S*r                                  (only with a padding mask)
    state          mul and add B*G*S*r*E
    normaliser     add B*G*S*r
    read           mul and add B*H*T*r*E
    denominator    mul and add B*H*T*r, max B*H*T (clamp)
    divide         div B*H*T*E
    Causal: queries are rounded up to T' tokens, whole chunks of C = min(CHUNK, T), and meet as
    many keys, after max(S - T, 0) older keys that only enter the state. T' stands for T and
    T' + max(S - T, 0) for S in the lines above, except clamp, divide and key mask; added are
    scores         mul and add B*H*T'*C*r, select B*H*T'*C (the triangle)
    inside         mul and add B*H*T'*C*E
    its row sums   add B*H*T'*C
    """
    b, h, g, t, s, _, e = sizes(site)
    qt, kt = b * h * t, b * g * s
    masked = kt * r if site.mask.padding else 0
    divide = OpCount.of(count_dtype(site), max=qt, div=qt * e, mul=masked)
    moved = OpCount.of(
        read=(qt * r + kt * (r + e)) * item_bytes(site) + (b * s if site.mask.padding else 0),
        written=qt * e * item_bytes(site),
    )
    if site.mask.causal:
        c = min(CHUNK, t)
        whole = -(-t // c) * c
        qt, kt = b * h * whole, b * g * (whole + max(s - t, 0))
        chunk = qt * c
        divide = divide + OpCount.of(
            count_dtype(site), mul=chunk * (r + e), add=chunk * (r + e + 1), select=chunk
        )
    sums = OpCount.of(
        count_dtype(site), mul=(kt + qt) * r * e + qt * r, add=(kt + qt) * r * e + (kt + qt) * r
    )
    return sums + divide + moved

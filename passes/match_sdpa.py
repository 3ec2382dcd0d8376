"""``scaled_dot_product_attention`` as it is called, brought to the canonical call."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from passes.builder import Builder, aten
from passes.match import Stop
from passes.match_softmax import real_users
from passes.ops import arg, has_tensor, hint, op_of, shape, val
from passes.rebuild import Number, Rebuilt, call_sdpa, settle, strip_scale

# Attention in one operator that hides its parts, and what to do about it.
OPAQUE = {
    "_native_multi_head_attention": "the fast path of nn.MultiheadAttention: trace after "
    "torch.backends.mha.set_fastpath_enabled(False)",
    "_transformer_encoder_layer_fwd": "the fast path of nn.TransformerEncoderLayer: trace after "
    "torch.backends.mha.set_fastpath_enabled(False)",
    "_scaled_dot_product_flash_attention": "a decomposed attention: trace before decompositions",
    "_scaled_dot_product_efficient_attention": "a decomposed attention: trace before "
    "decompositions",
    "_scaled_dot_product_flash_attention_for_cpu": "a decomposed attention: trace before "
    "decompositions",
    "flex_attention": "flex attention: load the model with attn_implementation='sdpa'",
}


def rebuild_sdpa(node: Node, builder: Builder, number: Number) -> Rebuilt:
    """Insert the canonical call for SDPA call `node`; `Stop` if it can not be one.

    `is_causal` with T != S means j <= i (top left); it becomes a bool mask tensor, so that a
    causal canonical call always has T == S.
    """
    q, k, v = (arg(node, i, n) for i, n in enumerate(("query", "key", "value")))
    if not (has_tensor(q) and has_tensor(k) and has_tensor(v)):
        raise Stop(node, "query, key or value is not a tensor")
    mask = arg(node, 3, "attn_mask")
    dropout, causal = arg(node, 4, "dropout_p", 0.0), arg(node, 5, "is_causal", False)
    scale = arg(node, 6, "scale", node.kwargs.get("scale"))
    if not isinstance(dropout, int | float) or not isinstance(causal, bool):
        raise Stop(node, "dropout_p or is_causal is not constant")
    if isinstance(scale, Node):
        raise Stop(node, "the scale is not constant")
    scale = float(scale) if scale is not None else hint(val(q).shape[-1]) ** -0.5
    rank = val(q).ndim
    q, q_factor = strip_scale(builder, q, number)
    k, k_factor = strip_scale(builder, k, number)
    scale *= q_factor * k_factor
    q, k, v = settle(builder, *(_four(builder, x, node) for x in (q, k, v)))
    if has_tensor(mask):
        mask = _four_mask(builder, mask, rank)
    if causal and shape(q)[2] != shape(k)[2]:
        mask, causal = _top_left(builder, q, k), False
    sdpa = call_sdpa(builder, (q, k, v), mask, float(dropout), causal, scale)
    return Rebuilt(sdpa, _back(builder, sdpa, rank))


def _four(b: Builder, node: Node, user: Node) -> Node:
    rank = val(node).ndim
    if rank == 4:
        return node
    if rank == 3:
        return b.unsqueeze(node, 1)
    if rank == 2:
        return b.unsqueeze(b.unsqueeze(node, 0), 0)
    raise Stop(user, f"attention on tensors with {rank} axes")


def _four_mask(b: Builder, mask: Node, rank: int) -> Node:
    if rank == 3 and val(mask).ndim == 3:
        return b.unsqueeze(mask, 1)
    while val(mask).ndim < 4:
        mask = b.unsqueeze(mask, 0)
    return mask


def _top_left(b: Builder, q: Node, k: Node) -> Node:
    """Bool [1, 1, T, S], True where j <= i."""
    sizes: list[Any] = [b.size(q, 2), b.size(k, 2)]
    ones = b.call(aten.ones.default, sizes, dtype=torch.bool, device=val(q).device)
    return _four_mask(b, b.call(aten.tril.default, ones), 4)


def _back(b: Builder, sdpa: Node, rank: int) -> Node:
    if rank == 4:
        return sdpa
    out = b.call(aten.squeeze.dim, sdpa, 1 if rank == 3 else 0)
    return out if rank == 3 else b.call(aten.squeeze.dim, out, 0)


def opaque_reason(node: Node) -> str | None:
    """Why an attention in one opaque operator or module is not matched; None for other nodes."""
    if node.op == "call_module" and node.graph.owning_module is not None:
        inner = node.graph.owning_module.get_submodule(str(node.target))
        if any(isinstance(m, torch.nn.MultiheadAttention) for m in inner.modules()):
            kind = type(inner).__name__
            return f"symbolic_trace keeps {kind} whole, so its attention can not be reached"
    reason = OPAQUE.get(op_of(node).rpartition(".")[2])
    return reason if reason is not None and real_users(node) else None

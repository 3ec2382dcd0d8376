"""Sealed forms, and SDPA nodes that were left in the graph."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax

from codegen.converters import argument, shape_of
from codegen.tvm_env import current_target


def convert_form(node: Any, importer: Any) -> Any:
    """``rewriter_forms::attnform_*`` -> the form's own kernel through a Kit."""
    from codegen.kit import Kit
    from passes.seal import read_spec

    q, k, v, key_mask, bias, params, text = node.args
    form, spec = read_spec(text)
    env = importer.env
    named = dict(zip(form.param_names(), [env[p] for p in params], strict=True))
    masks = [None if m is None else env[m] for m in (key_mask, bias)]
    kit = Kit(importer.block_builder, current_target())
    return form.kernel(kit, spec, named, env[q], env[k], env[v], *masks)


def convert_step(node: Any, importer: Any) -> Any:
    """``rewriter_forms::attnstep_*`` -> the form's own step kernel: (out, *new state)."""
    from codegen.kit import Kit
    from passes.decode_form import Streaming
    from passes.seal import read_spec

    q, k, v, state, position, params, text = node.args
    form, spec = read_spec(text)
    assert isinstance(form, Streaming)
    env = importer.env
    named = dict(zip(form.param_names(), [env[p] for p in params], strict=True))
    kit = Kit(importer.block_builder, current_target())
    held = [env[s] for s in state]
    out, new = form.step_kernel(kit, spec, named, env[q], env[k], env[v], held, env[position])
    return (out, *new)


def convert_sdpa(node: Any, importer: Any) -> Any:
    """``aten.scaled_dot_product_attention`` as products around a softmax.

    Sealing leaves no such node; a program that comes from elsewhere may hold one.
    """
    bb = importer.block_builder
    q, k, v = (importer.env[node.args[i]] for i in range(3))
    mask, causal = argument(node, 3, "attn_mask"), bool(argument(node, 5, "is_causal", False))
    scale = argument(node, 6, "scale")
    scale = 1.0 / math.sqrt(shape_of(q)[-1]) if scale is None else float(scale)
    groups = shape_of(q)[-3] // shape_of(k)[-3] if q.ty.ndim > 2 else 1
    if groups > 1:
        axis = q.ty.ndim - 3
        k, v = (bb.emit(relax.op.repeat(x, groups, axis)) for x in (k, v))
    order = [*range(k.ty.ndim - 2), k.ty.ndim - 1, k.ty.ndim - 2]
    keys = bb.emit(relax.op.permute_dims(k, order))
    logits = bb.emit(relax.op.multiply(bb.emit(relax.op.matmul(q, keys)), _f32(scale)))
    if mask is not None:
        logits = _masked(bb, logits, importer.env[mask])
    if causal:
        rows, columns = shape_of(logits)[-2:]
        logits = _masked(bb, logits, relax.const(np.tri(rows, columns, dtype=bool)))
    return bb.emit(relax.op.matmul(bb.emit(relax.op.nn.softmax(logits, axis=-1)), v))


def _f32(value: float) -> Any:
    return relax.const(value, "float32")


def _masked(bb: Any, logits: Any, mask: Any) -> Any:
    if str(mask.ty.dtype) == "bool":
        return bb.emit(relax.op.where(mask, logits, _f32(-math.inf)))
    return bb.emit(relax.op.add(logits, mask))


CONVERTERS = {"scaled_dot_product_attention.default": convert_sdpa}

"""Layer norm and RMS norm, with or without weight and bias."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax

from codegen.converters import argument, shape_of

_FLOAT32_EPS = float(np.finfo(np.float32).eps)


def _parameter(importer: Any, node: Any, width: tuple[int, ...], fill: float) -> Any:
    if node is None:
        return relax.const(np.full(width, fill, "float32"))
    return importer.env[node]


def convert_layer_norm(node: Any, importer: Any) -> Any:
    """``aten.layer_norm(x, normalized_shape, weight?, bias?, eps)``."""
    bb, x = importer.block_builder, importer.env[node.args[0]]
    width = tuple(int(n) for n in node.args[1])
    gamma = _parameter(importer, argument(node, 2, "weight"), width, 1.0)
    beta = _parameter(importer, argument(node, 3, "bias"), width, 0.0)
    eps = float(argument(node, 4, "eps", 1e-5))
    shape = shape_of(x)
    if len(width) > 1:
        # One axis is what the kernel takes; the axes are contiguous, so this copies nothing.
        flat = math.prod(width)
        x = bb.emit(relax.op.reshape(x, [*shape[: -len(width)], flat]))
        gamma, beta = (bb.emit(relax.op.reshape(p, [flat])) for p in (gamma, beta))
    y = bb.emit(relax.op.nn.layer_norm(x, gamma, beta, axes=[-1], epsilon=eps))
    return bb.emit(relax.op.reshape(y, shape)) if len(width) > 1 else y


def convert_rms_norm(node: Any, importer: Any) -> Any:
    """``aten.rms_norm(x, normalized_shape, weight?, eps?)`` over the last axis."""
    bb, x = importer.block_builder, importer.env[node.args[0]]
    width = tuple(int(n) for n in node.args[1])
    gamma = _parameter(importer, argument(node, 2, "weight"), width, 1.0)
    eps = argument(node, 3, "eps")
    axes = list(range(-len(width), 0))
    eps = _FLOAT32_EPS if eps is None else float(eps)
    return bb.emit(relax.op.nn.rms_norm(x, gamma, axes=axes, epsilon=eps))


CONVERTERS = {"layer_norm.default": convert_layer_norm, "rms_norm.default": convert_rms_norm}

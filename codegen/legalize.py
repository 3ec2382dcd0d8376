"""Own lowerings of Relax operators: vector activations, and norms and reductions in lanes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tvm
from tvm import ir

from codegen.kernels import activations, norm, reductions, softmax
from codegen.kernels.attention import attributes
from codegen.target import Target
from codegen.tvm_env import current_target

# Above TVM's own registrations (level 10).
_LEVEL = 20
_OPAQUE, _REDUCE = 8, 3
_FLOATS = ("float32", "float16")


def row_lanes(target: Target) -> int:
    """Partial results per row: two vector registers hide the latency of an add."""
    return 2 * target.lanes


def dtype_of(value: Any) -> str:
    """A tensor expression's dtype as a word."""
    return str(value.ty.dtype)


@functools.cache
def install() -> None:
    """Register the lowerings, once in a process."""
    for op, fn in activations.SCALAR.items():
        _override(op, _scalar(op.rsplit(".", 1)[-1], fn))
    _override("relax.nn.layer_norm", _layer_norm)
    _override("relax.nn.rms_norm", _rms_norm)
    _override("relax.nn.softmax", _softmax(softmax.softmax, "softmax"))
    _override("relax.nn.log_softmax", _softmax(softmax.log_softmax, "log_softmax"))
    for kind in reductions.REDUCERS:
        _override(f"relax.{kind}", _reduction(kind))


Lowering = Callable[[Any, Any], Any | None]


def _override(op: str, lowering: Lowering) -> None:
    """Use `lowering` where it gives a result, else what TVM has."""
    standard = tvm.ir.Op.get(op).get_attr("FLegalize")

    def legalize(bb: Any, call: Any) -> Any:
        result = lowering(bb, call)
        return standard(bb, call) if result is None else result

    tvm.ir.register_op_attr(op, "FLegalize", legalize, _LEVEL)


def _scalar(name: str, fn: Any) -> Lowering:
    def lower(bb: Any, call: Any) -> Any | None:
        if dtype_of(call.args[0]) not in _FLOATS:
            return None
        return bb.call_te(activations.elementwise(fn, name), call.args[0], primfunc_name_hint=name)

    return lower


def _last_axis(call: Any, axes: Any) -> bool:
    rank = call.args[0].ty.ndim
    return [int(a) % rank for a in axes] == [rank - 1]


def _layer_norm(bb: Any, call: Any) -> Any | None:
    x, gamma, beta = call.args
    if dtype_of(x) != "float32" or not _last_axis(call, call.attrs.axes):
        return None
    eps, lanes = float(call.attrs.epsilon), row_lanes(current_target())
    return bb.call_te(
        lambda a, g, b: norm.layer_norm(a, g, b, eps, lanes),
        x,
        gamma,
        beta,
        primfunc_name_hint="layer_norm",
        primfunc_attrs=attributes("layer_norm", {"centred": True, "eps": eps}),
    )


def _rms_norm(bb: Any, call: Any) -> Any | None:
    x, gamma = call.args
    if dtype_of(x) != "float32" or not _last_axis(call, call.attrs.axes):
        return None
    eps, lanes = float(call.attrs.epsilon), row_lanes(current_target())
    return bb.call_te(
        lambda a, g: norm.rms_norm(a, g, eps, lanes),
        x,
        gamma,
        primfunc_name_hint="rms_norm",
        primfunc_attrs=attributes("layer_norm", {"centred": False, "eps": eps}),
    )


def _softmax(define: Any, name: str) -> Lowering:
    def lower(bb: Any, call: Any) -> Any | None:
        x = call.args[0]
        if dtype_of(x) != "float32" or not _last_axis(call, [call.attrs.axis]):
            return None
        lanes = row_lanes(current_target())
        return bb.call_te(
            lambda a: define(a, lanes),
            x,
            primfunc_name_hint=name,
            primfunc_attrs={"op_pattern": _OPAQUE},
        )

    return lower


def _reduction(kind: str) -> Lowering:
    def lower(bb: Any, call: Any) -> Any | None:
        x, axes = call.args[0], call.attrs.axis
        if dtype_of(x) != "float32" or axes is None or not _last_axis(call, axes):
            return None
        keepdims, lanes = bool(call.attrs.keepdims), row_lanes(current_target())
        return bb.call_te(
            lambda a: reductions.row_reduction(a, kind, keepdims, lanes),
            x,
            primfunc_name_hint=f"row_{kind}",
            primfunc_attrs={"op_pattern": _REDUCE},
        )

    return lower


def as_constant(value: Any) -> Any | None:
    """The numpy array of a Relax constant, None for anything else."""
    return value.value.numpy() if isinstance(value, ir.GenericConst) else None

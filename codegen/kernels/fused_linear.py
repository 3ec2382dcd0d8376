"""Definition of linear attention with its feature maps inside: counted, never run as it is.

One PrimFunc takes q, k and v; the features are values in between and have float32's precision.
Bidirectional is TE, causal is written with the IR builder (see linear_attention.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from codegen.kernels import feature_maps, linear_attention
from codegen.kernels.attention import MINIMUM
from codegen.kernels.tiles import load
from codegen.kernels.vector_math import f32
from codegen.kernels.views import Layout

WEIGHTS = {"softmax_pair": 2, "elu1": 0}  # feature maps that fuse, and how many parameters they add


@dataclass(frozen=True)
class FusedFacts:
    """What the tensors of a fused linear attention do not say.

    Inputs are q, k, v, then w_q [H, D, R] and w_k [G, D, R] (map "softmax_pair"), then the key
    mask where present. `scales` multiply the projections of q and k.
    """

    map: str
    eps: float
    causal: bool
    scales: tuple[float, float] = (1.0, 1.0)
    key_mask: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FusedFacts:
        """Inverse of `to_json`."""
        return cls(**{**data, "scales": tuple(data["scales"])})

    def split(self, rest: Sequence[Any]) -> tuple[list[Any], Any]:
        """([w_q, w_k] or [None, None], key mask or None) out of the inputs after v."""
        number = WEIGHTS[self.map]
        weights = list(rest[:number]) or [None, None]
        return weights, rest[number] if self.key_mask else None

    def features(self, d: int, w: Any) -> int:
        """How many features a token has."""
        return d if w is None else 2 * int(w.shape[2])


def define(facts: FusedFacts, q: Any, k: Any, v: Any, *rest: Any, tokens_first: bool) -> Any:
    """Bidirectional: [B, H, T, E], or [B, T, H * E] with `tokens_first`."""
    weights, mask = facts.split(rest)
    fq, fk = (
        _features(facts, x, w, s) for x, w, s in zip((q, k), weights, facts.scales, strict=True)
    )
    return linear_attention.define(facts.eps, fq, fk, v, mask, tokens_first=tokens_first)


def _features(facts: FusedFacts, x: Any, w: Any, scale: float) -> Any:
    if facts.map == "elu1":
        return feature_maps.elu1(x, "float32")
    return feature_maps.softmax_pair(feature_maps.project(scale, x, w, "float32"))


Parameter = tuple[Sequence[int], str]  # shape and dtype


def causal(facts: FusedFacts, layout: Layout, params: Sequence[Parameter]) -> Any:
    """The causal PrimFunc for these inputs; the output is as `layout` says."""
    q, _, v = layout.inputs
    b, h, t, e = (*q.shape[:3], v.shape[3])
    dtype = params[0][1]
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        args = [T.arg(f"p{n}", T.buffer(list(s), d)) for n, (s, d) in enumerate(params)]
        shape = [b, t, h * e] if layout.tokens_first else [b, h, t, e]
        out = T.arg("out", T.buffer(shape, dtype))
        T.func_attr({"tirx.noalias": True})
        tensors, rest = layout.split(args)
        weights, mask = facts.split(rest)
        fq, fk = (
            _write(facts, x, w, s)
            for x, w, s in zip(tensors[:2], weights, facts.scales, strict=True)
        )
        view = layout.output(out, (b, h, t, e))
        linear_attention.write_causal(facts.eps, fq, fk, tensors[2], mask, view)
    return ib.get()


def _write(facts: FusedFacts, x: Any, w: Any, scale: float) -> Any:
    """The features of x [B, H, T, D] as a buffer [B, H, T, F]."""
    b_, h_, t_, d_ = (int(n) for n in x.shape)
    out = T.sblock_alloc_buffer((b_, h_, t_, facts.features(d_, w)), "float32")
    with T.grid(b_, h_, t_) as (b, h, i):
        if w is None:
            with T.serial(0, d_) as d:
                y = load(x, b, h, i, d)
                value = tirx.max(y, f32(0.0)) + tirx.exp(tirx.min(y, f32(0.0)))
                T.buffer_store(out, value, [b, h, i, d])
        else:
            _write_pair(scale, lambda d: load(x, b, h, i, d), w, out, [b, h, i])
    return out


def _write_pair(scale: float, x: Any, w: Any, out: Any, at: list[Any]) -> None:
    _, d_, r_ = (int(n) for n in w.shape)
    y = T.sblock_alloc_buffer((r_,), "float32")
    with T.serial(0, r_) as r:
        T.buffer_store(y, f32(0.0), [r])
        with T.serial(0, d_) as d:
            T.buffer_store(y, y[r] + x(d) * load(w, at[1], d, r), [r])
        if scale != 1.0:
            T.buffer_store(y, y[r] * f32(scale), [r])
    for start, low in ((0, False), (r_, True)):
        edge, total = (T.sblock_alloc_buffer((1,), "float32") for _ in range(2))
        T.buffer_store(edge, f32(-MINIMUM if low else MINIMUM), [0])
        T.buffer_store(total, f32(0.0), [0])
        with T.serial(0, r_) as r:
            T.buffer_store(edge, (tirx.min if low else tirx.max)(edge[0], y[r]), [0])
        with T.serial(0, r_) as r:
            below = edge[0] - y[r] if low else y[r] - edge[0]
            T.buffer_store(out, tirx.exp(below), [*at, start + r])
            T.buffer_store(total, total[0] + out[(*at, start + r)], [0])
        with T.serial(0, r_) as r:
            T.buffer_store(out, out[(*at, start + r)] / total[0], [*at, start + r])

"""Kit: the kernels a form may use when it is lowered.

Every method takes and returns Relax expressions and emits one PrimFunc, which carries the name
of the schedule rule meant for it and is not fused with its neighbours. Shapes must be static.
Data is float32 or float16 (sums are float32). Letters as in passes/site.py. On processors
`linear_attention` fuses with the feature maps that made its features (codegen/producers.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import relax

from codegen.kernels import attention, feature_maps, fused_linear, linear_attention
from codegen.kernels.attention import AttentionFacts, attributes
from codegen.kernels.fused_linear import FusedFacts
from codegen.kernels.views import VIEWS, Layout
from codegen.kit_decode import DecodeKernels
from codegen.kit_hash import HashKernels
from codegen.kit_landmarks import LandmarkKernels
from codegen.kit_maps import MapKernels
from codegen.kit_relative import RelativeKernels
from codegen.kit_rows import RowKernels
from codegen.producers import Features, features_of_both
from codegen.strides import view_of
from codegen.target import Target
from passes.errors import LoweringError

_DTYPES = ("float32", "float16")


class Kit(HashKernels, MapKernels, DecodeKernels, RowKernels, LandmarkKernels, RelativeKernels):
    """Kernels at hand, written into `builder` for `target`."""

    def __init__(self, builder: Any, target: Target) -> None:
        self.builder, self.target = builder, target

    def exact_attention(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        key_mask: Any = None,
        bias: Any = None,
        causal: bool = False,
        window: tuple[int, int] | None = None,
        scale: float,
    ) -> Any:
        """Softmax attention [B, H, T, E] without a T x S tensor in memory.

        q [B, H, T, D], k [B, G, S, D], v [B, G, S, E]; key_mask [B or 1, S] bool; bias float
        (added) or bool (True = seen), broadcastable to [B, H, T, S]. With `causal` query i sees
        keys j <= i + S - T; with `window` (l, r) keys i + S - T - l .. i + S - T + r. A query
        that sees no key gives 0.
        """
        q, k, v = self._data(q=q, k=k, v=v)
        kind = "" if bias is None else "hide" if _dtype(bias) == "bool" else "add"
        facts = AttentionFacts(float(scale), causal, window, key_mask is not None, kind)
        rest = [self.builder.normalize(x) for x in (key_mask, bias) if x is not None]
        params, layout = self._layout(q, k, v)
        known = facts.to_json()
        if layout is not None:
            known[VIEWS] = layout.to_json()

        def define(*args: Any) -> Any:
            if layout is None:
                return attention.define(facts, *args)
            tensors, others = layout.split(args)
            return attention.define(facts, *tensors, *others, tokens_first=layout.tokens_first)

        out = self._te(define, [*params, *rest], "attention", "attention", known)
        return self._heads_first(out, layout, (*_shape(q)[:3], _shape(v)[3]))

    def _layout(self, *tensors: Any) -> tuple[list[Any], Layout | None]:
        """(parameters, how they hold the tensors); None and the tensors themselves on a GPU."""
        if self.target.kind == "gpu":
            return list(tensors), None
        params: list[Any] = []
        views = []
        for x in tensors:
            base, view = view_of(self.builder, x)
            known = [n for n, p in enumerate(params) if p.same_as(base)]
            at = known[0] if known else len(params)
            params += [] if known else [base]
            views.append(replace(view, argument=at))
        return params, Layout(tuple(views), len(params), tokens_first=_shape(tensors[0])[1] > 1)

    def _heads_first(self, out: Any, layout: Layout | None, shape: tuple[int, ...]) -> Any:
        """The output as [B, H, T, E]; a transpose that follows cancels with this one."""
        if layout is None or not layout.tokens_first:
            return out
        b, h, t, e = shape
        split = self.builder.emit(relax.op.reshape(out, (b, t, h, e)))
        return self.builder.emit(relax.op.permute_dims(split, [0, 2, 1, 3]))

    def project(self, x: Any, w: Any, scale: float = 1.0) -> Any:
        """x [B, H, T, D] times w [H, D, R] times scale: [B, H, T, R]."""
        x, w = self._data(x=x, w=w)

        def define(x: Any, w: Any) -> Any:
            return feature_maps.project(float(scale), x, w)

        return self._te(define, [x, w], "project", "project", {"scale": float(scale)})

    def softmax_pair(self, y: Any) -> Any:
        """[softmax(y), softmax(-y)] over the last axis: [B, H, T, R] -> [B, H, T, 2 R]."""
        (y,) = self._data(y=y)
        facts = {"map": "softmax_pair"}
        return self._te(feature_maps.softmax_pair, [y], "softmax_pair", "feature_map", facts)

    def elu1(self, x: Any) -> Any:
        """elu(x) + 1 of every element."""
        (x,) = self._data(x=x)
        return self._te(feature_maps.elu1, [x], "elu1", "feature_map", {"map": "elu1"})

    def linear_attention(
        self, fq: Any, fk: Any, v: Any, *, key_mask: Any = None, causal: bool, eps: float
    ) -> Any:
        """sum_j (fq_i . fk_j) v_j / max(sum_j fq_i . fk_j, eps): [B, H, T, E].

        fq [B, H, T, R], fk [B, G, S, R], v [B, G, S, E], key_mask [B or 1, S] bool. With
        `causal` query i sees keys j <= i + S - T. A query that sees no key gives 0.
        """
        fq, fk, v = self._data(fq=fq, fk=fk, v=v)
        if self.target.kind != "gpu":
            made = features_of_both(self.builder, fq, fk)
            if made is not None:
                return self._fused(*made, v, key_mask, causal, float(eps))
        args = [fq, fk, v] + ([] if key_mask is None else [self.builder.normalize(key_mask)])
        facts = {"eps": float(eps), "causal": causal}
        if causal:
            return self._causal(args, float(eps), facts)

        def define(*tensors: Any) -> Any:
            return linear_attention.define(float(eps), *tensors)

        return self._te(define, args, "linear_attention", "linear_attention", facts)

    def _fused(
        self, q: Features, k: Features, v: Any, key_mask: Any, causal: bool, eps: float
    ) -> Any:
        """Linear attention from q, k and v themselves, in one kernel."""
        scales = (q.scale, k.scale)
        facts = FusedFacts(q.map, eps, causal, scales, key_mask is not None)
        params, layout = self._layout(q.x, k.x, v)
        assert layout is not None
        rest = [self.builder.normalize(x) for x in (q.w, k.w, key_mask) if x is not None]
        name, known = "linear_attention_fused", {**facts.to_json(), VIEWS: layout.to_json()}

        def define(*args: Any) -> Any:
            tensors, others = layout.split(args)
            first = layout.tokens_first
            return fused_linear.define(facts, *tensors, *others, tokens_first=first)

        args, shape = [*params, *rest], (*_shape(q.x)[:3], _shape(v)[3])
        if not causal:
            return self._heads_first(self._te(define, args, name, name, known), layout, shape)
        func = fused_linear.causal(facts, layout, [(_shape(x), _dtype(x)) for x in args])
        b, h, t, e = shape
        out = (b, t, h * e) if layout.tokens_first else shape
        return self._heads_first(self._call(func, args, name, known, out), layout, shape)

    def _call(
        self, func: Any, args: list[Any], rule: str, facts: dict[str, Any], shape: tuple[int, ...]
    ) -> Any:
        """A call of a ready PrimFunc whose one output has this shape and the first input's type."""
        func = func.without_attr("global_symbol")
        for key, value in attributes(rule, facts).items():
            func = func.with_attr(key, value)
        name = self.builder.add_func(func, f"{rule}_causal")
        out = relax.TensorType(shape, _dtype(args[0]))
        return self.builder.emit(relax.call_tir(name, args, out))

    def _causal(self, args: list[Any], eps: float, facts: dict[str, Any]) -> Any:
        fq, fk, v = (_shape(x) for x in args[:3])
        dtype = _dtype(args[0])
        rows = _shape(args[3])[0] if len(args) == 4 else 0
        func = linear_attention.causal(eps, fq, fk, v, rows, dtype=dtype)
        return self._call(func, args, "linear_attention", facts, (*fq[:3], v[3]))

    def _te(self, define: Any, args: list[Any], name: str, rule: str, facts: dict[str, Any]) -> Any:
        return self.builder.emit(
            self.builder.call_te(
                define, *args, primfunc_name_hint=name, primfunc_attrs=attributes(rule, facts)
            )
        )

    def _data(self, **tensors: Any) -> list[Any]:
        """Normalised arguments; LoweringError for a dynamic shape or a type without kernels."""
        done = []
        for name, x in tensors.items():
            expr = self.builder.normalize(x)
            if _dtype(expr) not in _DTYPES:
                raise LoweringError(
                    f"{name} is {_dtype(expr)}; attention kernels take {' or '.join(_DTYPES)}"
                )
            _shape(expr, name)
            done.append(expr)
        return done


def _dtype(expr: Any) -> str:
    return str(getattr(expr.ty.dtype, "dtype", expr.ty.dtype))


def _shape(expr: Any, name: str = "a tensor") -> list[int]:
    try:
        return [int(n) for n in expr.ty.shape]
    except TypeError as error:
        raise LoweringError(
            f"{name} of an attention has the shape {expr.ty.shape}, and kernels need numbers; "
            "compile with static sizes"
        ) from error

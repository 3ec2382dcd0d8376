"""The kit's attentions that change rows of weights, and what they are made from (see kit.py).

Letters as in passes/site.py. These kernels are for processors; a GPU is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax

from codegen.kernels import row_attention, row_maps
from codegen.kernels.attention import AttentionFacts
from codegen.kernels.row_attention import RowFacts
from codegen.kernels.views import VIEWS
from passes.errors import LoweringError


class RowKernels:
    """Mixed into `Kit`, which brings the builder and the emitters."""

    builder: Any
    target: Any
    _te: Any
    _data: Any
    _call: Any
    _layout: Any
    _heads_first: Any

    def heads(self, x: Any) -> int:
        """The number of heads of x [B, H, T, D]."""
        (x,) = self._data(x=x)
        return _sizes(x)[1]

    def batch(self, x: Any) -> int:
        """The batch of x [B, H, T, D]."""
        (x,) = self._data(x=x)
        return _sizes(x)[0]

    def repeat_heads(self, x: Any, heads: int) -> Any:
        """x [B, G, S, D] with each head heads / G times: [B, heads, S, D]."""
        (x,) = self._data(x=x)
        groups = _sizes(x)[1]
        if groups == heads:
            return x
        return self.builder.emit(relax.op.repeat(x, heads // groups, 1))

    def join(self, tensors: list[Any], axis: int) -> Any:
        """The tensors one after the other on an axis."""
        return self.builder.emit(relax.op.concat(tensors, axis))

    def with_ones(self, x: Any) -> Any:
        """[x, 1]: x [B, H, T, D] with one more channel."""
        (x,) = self._data(x=x)
        ones = relax.const(np.ones((*_sizes(x)[:3], 1), dtype=_dtype(x)))
        return self.join([x, ones], 3)

    def clipped_attention(self, q: Any, k: Any, v: Any, *, zeta: float, gamma: float, **how: Any
                          ) -> Any:  # fmt: skip
        """Attention with weights clip((zeta - gamma) softmax + gamma, 0, 1), gamma <= 0.

        `how`: key_mask, bias, causal, window and scale as for `exact_attention`.
        """
        return self._rows(q, k, v, RowFacts("clip", zeta=zeta, gamma=gamma), **how)

    def mixed_attention(self, q: Any, k: Any, v: Any, *, parts: int, **how: Any) -> Any:
        """Softmax attention with `parts` keys for each value: k [B, G, S, parts D]."""
        return self._rows(q, k, v, RowFacts("mix", parts=parts), **how)

    def kernel_sums(self, q: Any, k: Any, v: Any, **how: Any) -> Any:
        """sum_j exp(scale q.k_j) v_j over the visible keys, for logits that are not above 0."""
        return self._rows(q, k, v, RowFacts("sum"), **how)

    def top_attention(self, q: Any, k: Any, v: Any, *, best: int, rest: bool, **how: Any) -> Any:
        """Softmax over the `best` keys of each query; with `rest` the others keep their weight.

        Their values are then their plain mean; `how` must not hold a bias or a window.
        """
        return self._rows(q, k, v, RowFacts("top", best=best, rest=rest), **how)

    def gate(self, x: Any, q: Any, w: Any, b: Any, gain: float) -> Any:
        """x [B, H, T, E] times gain sigmoid(q.w + b), q [B, H, T, D], w [H, D], b [H, 1].

        The end of an attention.
        """
        x, q, w, b = self._data(x=x, q=q, w=w, b=b)

        def define(*args: Any, tokens_first: bool) -> Any:
            return row_maps.gate(float(gain), *args, tokens_first=tokens_first)

        return self._row_map(define, [x, q], "gate", [w, b], last=True, gain=float(gain))

    def one_query(self, w: Any, batch: int) -> Any:
        """One query a head, the same in every sample: w [H, D] -> [batch, H, 1, D]."""
        (w,) = self._data(w=w)
        heads, width = _sizes(w)
        rows = self.builder.emit(relax.op.reshape(w, (1, heads, 1, width)))
        return self.builder.emit(relax.op.broadcast_to(rows, (batch, heads, 1, width)))

    def without_last(self, x: Any) -> tuple[Any, Any]:
        """(all channels but the last, the last) of x [B, H, T, D + 1]."""
        (x,) = self._data(x=x)
        width = _sizes(x)[3]
        cuts = ((0, width - 1), (width - 1, width))
        first, last = (self.builder.emit(relax.op.strided_slice(x, [3], [a], [b])) for a, b in cuts)
        return first, last

    def scale_channels(self, x: Any, g: Any, key_mask: Any = None) -> Any:
        """x [B, G, S, E] times g [B, H, 1, E] channel by channel: [B, H, S, E]; 0 where hidden."""
        x, g = self._data(x=x, g=g)
        rest = [g] if key_mask is None else [g, self.builder.normalize(key_mask)]
        return self._row_map(row_maps.scale_channels, [x], "scale_channels", rest)

    def add_rows(self, x: Any, q: Any, share: Any = None) -> Any:
        """x + q, or x + q share: x, q [B, H, T, E], share [B, H, 1, 1]. The end of an attention."""
        x, q = self._data(x=x, q=q)
        rest = [] if share is None else self._data(share=share)
        return self._row_map(row_maps.add_rows, [x, q], "add_rows", rest, last=True)

    def extend(self, x: Any, factor: float, *, one: bool) -> Any:
        """[x, factor |x|^2] and, with `one`, a 1 behind it: x [B, H, T, D]."""
        (x,) = self._data(x=x)
        facts: dict[str, Any] = {"factor": float(factor), "one": one}
        return self._row_map(lambda x: row_maps.extend(factor, one, x), [x], "extend", **facts)

    def ratio(self, x: Any, least: float) -> Any:
        """x [B, H, T, E + 2] without its last two channels, over the larger (at least `least`).

        The end of an attention.
        """
        (x,) = self._data(x=x)
        width = _sizes(x)[3]
        top = self.builder.emit(relax.op.strided_slice(x, [3], [0], [width - 2]))
        last = self.builder.emit(relax.op.strided_slice(x, [3], [width - 2], [width]))

        def define(*args: Any, tokens_first: bool) -> Any:
            return row_maps.ratio(least, *args, tokens_first=tokens_first)

        return self._row_map(define, [top, last], "ratio", last=True, least=least)

    def mixture_keys(
        self, k: Any, shift: Any, rate: Any, mix: Any, *, scale: float, key_norm: bool
    ) -> Any:
        """Keys of a mixture of Gaussians for queries [q, -|q|^2 / 2, 1] and logits times `scale`.

        k [B, G, S, D], shift [G, M, D], rate and mix [G, M] -> [B, G, S, M (D + 2)].
        """
        k, *rest = self._data(k=k, shift=shift, rate=rate, mix=mix)
        inverse = 1.0 / scale

        def define(*args: Any) -> Any:
            return row_maps.mixture(inverse, key_norm, *args)

        facts: dict[str, Any] = {"inverse": inverse, "key_norm": key_norm}
        return self._row_map(define, [k], "mixture", rest, **facts)

    def _row_map(
        self,
        define: Callable[..., Any],
        tensors: list[Any],
        name: str,
        rest: Sequence[Any] = (),
        *,
        last: bool = False,
        **facts: Any,
    ) -> Any:
        """A kernel define(*tensors, *rest) that reads `tensors` [B, H, T, X] where they lie.

        `last`: its output is the attention's, and `define` also takes `tokens_first`.
        """
        params, layout = self._layout(*tensors)
        known = {"map": name, "tensors": len(tensors), **facts}
        if layout is not None:
            layout = replace(layout, tokens_first=last and layout.tokens_first)
            known[VIEWS] = layout.to_json()

        def emit(*args: Any) -> Any:
            first = {"tokens_first": layout is not None and layout.tokens_first} if last else {}
            if layout is None:
                return define(*args, **first)
            views, others = layout.split(args)
            return define(*views, *others, **first)

        out = self._te(emit, [*params, *rest], f"row_{name}", "row_map", known)
        return self._heads_first(out, layout, _sizes(tensors[0])) if last else out

    def _rows(
        self,
        q: Any,
        k: Any,
        v: Any,
        change: RowFacts,
        *,
        key_mask: Any = None,
        bias: Any = None,
        causal: bool = False,
        window: tuple[int, int] | None = None,
        scale: float,
    ) -> Any:
        if self.target.kind == "gpu":
            raise LoweringError(f"attention with rows changed by {change.kind!r} has no GPU kernel")
        q, k, v = self._data(q=q, k=k, v=v)
        kind = (
            ""
            if bias is None
            else "hide"
            if _dtype(self.builder.normalize(bias)) == "bool"
            else "add"
        )
        facts = AttentionFacts(float(scale), causal, window, key_mask is not None, kind)
        rest = [self.builder.normalize(x) for x in (key_mask, bias) if x is not None]
        params, layout = self._layout(q, k, v)
        args = [*params, *rest]
        known = {**facts.to_json(), "change": change.to_json(), VIEWS: layout.to_json()}
        types = [(_sizes(x), _dtype(x)) for x in args]
        func = row_attention.define(facts, change, layout, types)
        b, h, t, e = (*_sizes(q)[:3], _sizes(v)[3])
        shape = (b, t, h * e) if layout.tokens_first else (b, h, t, e)
        out = self._call(func, args, "row_attention", known, shape)
        return self._heads_first(out, layout, (b, h, t, e))


def _sizes(expr: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in expr.ty.shape)


def _dtype(expr: Any) -> str:
    return str(getattr(expr.ty.dtype, "dtype", expr.ty.dtype))

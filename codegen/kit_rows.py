"""The kit's attentions that change rows of weights, and what they are made from (see kit.py).

Letters as in passes/site.py. These kernels are for processors; a GPU is refused.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from codegen.kernels import row_attention
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

    def clipped_attention(self, q: Any, k: Any, v: Any, *, zeta: float, gamma: float, **how: Any
                          ) -> Any:  # fmt: skip
        """Attention with weights clip((zeta - gamma) softmax + gamma, 0, 1), gamma <= 0.

        `how`: key_mask, bias, causal, window and scale as for `exact_attention`.
        """
        return self._rows(q, k, v, RowFacts("clip", zeta=zeta, gamma=gamma), **how)

    def mixed_attention(self, q: Any, k: Any, v: Any, *, parts: int, **how: Any) -> Any:
        """Softmax attention with `parts` keys for each value: k [B, G, S, parts D]."""
        return self._rows(q, k, v, RowFacts("mix", parts=parts), **how)

    def top_attention(self, q: Any, k: Any, v: Any, *, best: int, rest: bool, **how: Any) -> Any:
        """Softmax over the `best` keys of each query; with `rest` the others keep their weight.

        Their values are then their plain mean; `how` must not hold a bias or a window.
        """
        return self._rows(q, k, v, RowFacts("top", best=best, rest=rest), **how)

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

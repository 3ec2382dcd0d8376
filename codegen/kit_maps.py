"""The kit's feature maps and norms of the kernelised forms (a part of codegen/kit.py).

Each method emits one kernel of codegen/kernels/maps.py with the schedule rule ``map``. Letters as
in passes/site.py; W is a number of weight rows that divides the heads: W heads of weights serve
H heads of data, H / W neighbours sharing one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from codegen.kernels import hybrid, maps
from codegen.kernels.attention import attributes
from codegen.kernels.hybrid import HybridFacts
from codegen.kernels.views import VIEWS


class MapKernels:
    """Mixed into `Kit`, which brings the builder and the emitters."""

    builder: Any
    _te: Any
    _data: Any
    _layout: Any
    _heads_first: Any
    project: Any
    linear_attention: Any
    exact_attention: Any

    def _map(
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

        out = self._te(emit, [*params, *rest], f"map_{name}", "map", known)
        return self._heads_first(out, layout, _sizes(tensors[0])) if last else out

    def constant(self, values: NDArray[Any]) -> Any:
        """A float32 constant of the module."""
        return self.builder.emit(relax.const(np.asarray(values, dtype="float32")))

    def tokens(self, x: Any) -> int:
        """The number of tokens of x [B, H, T, D]."""
        (x,) = self._data(x=x)
        return _sizes(x)[2]

    def last(self, x: Any) -> int:
        """The size of the last axis."""
        return _sizes(self.builder.normalize(x))[-1]

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        """The same values in another shape; moves nothing."""
        return self.builder.emit(relax.op.reshape(x, shape))

    def shared_project(self, x: Any, w: Any, scale: float = 1.0) -> Any:
        """x [B, H, T, D] times w [W, D, R] times scale: [B, H, T, R]."""
        x, w = self._data(x=x, w=w)
        (b, h, t, d), groups, r = _sizes(x), _sizes(w)[0], _sizes(w)[2]
        if groups == h:
            return self.project(x, w, scale=scale)
        rows = self.reshape(x, (b, groups, h // groups * t, d))
        return self.reshape(self.project(rows, w, scale=scale), (b, h, t, r))

    def relu(self, x: Any, floor: float) -> Any:
        """max(x, 0) + floor of every element."""
        (x,) = self._data(x=x)
        return self._map(lambda x: maps.relu(floor, x), [x], "relu", floor=floor)

    def cosine(self, x: Any, table: Any, floor: float) -> Any:
        """[r sin, r cos], r = max(x, 0) + floor: x [B, H, T, D], table [T, 2] -> [B, H, T, 2 D]."""
        x, table = self._data(x=x, table=table)
        return self._map(lambda *a: maps.cosine(floor, *a), [x], "cosine", [table], floor=floor)

    def exp_query(self, y: Any, offset: Any = None) -> Any:
        """exp(y + offset - maximum of the row): y [B, H, T, R], offset [W, R]."""
        (y,) = self._data(y=y)
        rest = [] if offset is None else self._data(offset=offset)
        return self._map(maps.exp_query, [y], "exp_query", rest)

    def exp_key(self, y: Any, x: Any, *, scale: float, floor: float) -> Any:
        """exp(y - scale |x|^2 / 2) + floor, the exponent at most 60: y [B, G, S, R], x [.., D]."""
        args, scale = self._data(y=y, x=x), float(scale)

        def define(y: Any, x: Any) -> Any:
            return maps.exp_key(scale, floor, y, x)

        return self._map(define, args, "exp_key", scale=scale, floor=floor)

    def polynomial(self, y: Any, *, low: bool, flat: float = 1.0) -> Any:
        """[flat, y, pairs] (`low`) or [flat, pairs]: products are flat^2 (+ t) + t^2 / 2."""
        (y,) = self._data(y=y)

        def define(y: Any) -> Any:
            return maps.polynomial(low, flat, y)

        return self._map(define, [y], "polynomial", low=low, flat=flat)

    def head_norm(self, x: Any, gamma: Any, beta: Any, eps: float) -> Any:
        """Layer norm over the last axis with gamma and beta [W, X] of the head."""
        x, *rest = self._data(x=x, gamma=gamma, beta=beta)
        return self._map(lambda *a: maps.head_norm(eps, *a), [x], "head_norm", rest, eps=eps)

    def glu(self, a: Any, b: Any) -> Any:
        """a sigmoid(b) of every element."""
        return self._map(maps.glu, self._data(a=a, b=b), "glu")

    def divide(self, x: Any, count: Any, tiny: float) -> Any:
        """x [B, H, T, E] / max(count, tiny), count [B or 1, 1, T, 1]: the end of an attention."""
        x, count = self._data(x=x, count=count)

        def define(*args: Any, tokens_first: bool) -> Any:
            return maps.divide(tiny, *args, tokens_first=tokens_first)

        return self._map(define, [x], "divide", [count], last=True, tiny=tiny)

    def token_norm(self, x: Any, *, scale: float, eps: float) -> Any:
        """x scale over the root of its mean square over heads and channels: [B, H, T, E].

        The end of an attention.
        """
        (x,) = self._data(x=x)

        def define(x: Any, *, tokens_first: bool) -> Any:
            return maps.token_norm(scale, eps, x, tokens_first=tokens_first)

        return self._map(define, [x], "token_norm", last=True, scale=scale, eps=eps)

    def linear_sum(self, fq: Any, fk: Any, v: Any, *, key_mask: Any = None, causal: bool) -> Any:
        """sum_j (fq_i . fk_j) v_j / 2^60: linear attention without its denominator.

        The division is exact. The denominator is limited below to 2^60, which no sum of features
        reaches. Give float32: the result is out of float16's range.
        """
        return self.linear_attention(fq, fk, v, key_mask=key_mask, causal=causal, eps=maps.HUGE)

    def counts(self, q: Any, k: Any, key_mask: Any, *, causal: bool, scale: float) -> Any:
        """How many keys each query sees, over `scale` and 2^60: [B or 1, 1, T, 1]."""
        (b, _, t, _), s = _sizes(q), _sizes(k)[2]
        if key_mask is None:
            seen = np.clip(np.arange(t) + 1 + s - t, 0, s) if causal else np.full(t, s)
            return self.constant(seen.reshape(1, 1, t, 1) / (scale * maps.HUGE))
        ones = self.constant(np.ones((b, 1, t, 1)))
        keys, values = (self.constant(np.full((b, 1, s, 1), x)) for x in (1.0, 1.0 / scale))
        return self.linear_sum(ones, keys, values, key_mask=key_mask, causal=causal)

    def hybrid(
        self,
        q: Any,
        k: Any,
        v: Any,
        fq: Any,
        fk: Any,
        mix: Any,
        *,
        key_mask: Any = None,
        causal: bool,
        scale: float,
        block: int,
        eps: float,
    ) -> Any:
        """Softmax with the keys of neighbouring blocks, features with the others: [B, H, T, E].

        q, k, v have as many tokens, in three or more blocks; fq [B, H, T, R], fk [B, G, T, R];
        mix [H]: its sigmoid weighs the softmax terms (codegen/kernels/hybrid.py).
        """
        args = self._data(q=q, k=k, v=v, fq=fq, fk=fk, mix=mix)
        args += [] if key_mask is None else [self.builder.normalize(key_mask)]
        facts = HybridFacts(float(scale), block, causal, eps, key_mask is not None)
        func = hybrid.define(facts, [(_sizes(x), self.dtype(x)) for x in args])
        func = func.without_attr("global_symbol")
        for key, value in attributes("hybrid", facts.to_json()).items():
            func = func.with_attr(key, value)
        out = relax.TensorType((*_sizes(q)[:3], _sizes(v)[3]), self.dtype(q))
        return self.builder.emit(relax.call_tir(self.builder.add_func(func, "hybrid"), args, out))

    def cast(self, x: Any, dtype: str) -> Any:
        """x in another type (itself if it has it)."""
        x = self.builder.normalize(x)
        if self.dtype(x) == dtype:
            return x
        return self.builder.emit(relax.op.astype(x, dtype))

    def dtype(self, x: Any) -> str:
        """The type of the values."""
        x = self.builder.normalize(x)
        return str(getattr(x.ty.dtype, "dtype", x.ty.dtype))

    def block_attention(
        self, q: Any, k: Any, v: Any, *, key_mask: Any, causal: bool, scale: float, block: int
    ) -> Any:
        """Softmax attention inside blocks of `block` tokens: q, k, v have as many tokens.

        The last block is filled up with hidden keys.
        """
        q, k, v = self._data(q=q, k=k, v=v)
        b, h, t, _ = _sizes(q)
        size = min(block, t)
        number = -(-t // size)
        fill = number * size - t
        q, k, v = (self._blocks(x, h, size, number, fill) for x in (q, k, v))
        mask = self._block_mask(key_mask, (b, h, number, size), fill)
        out = self.exact_attention(q, k, v, key_mask=mask, causal=causal, scale=scale)
        out = self.reshape(out, (b, h, number * size, _sizes(v)[3]))
        return self.builder.emit(relax.op.strided_slice(out, [2], [0], [t])) if fill else out

    def _blocks(self, x: Any, heads: int, size: int, number: int, fill: int) -> Any:
        """[B, G, T, X] -> [B * heads * number, 1, size, X]."""
        b, g, _, width = _sizes(x)
        if g != heads:
            x = self.builder.emit(relax.op.repeat(x, heads // g, 1))
        if fill:
            x = self.builder.emit(relax.op.nn.pad(x, [0, 0, 0, 0, 0, fill, 0, 0]))
        return self.reshape(x, (b * heads * number, 1, size, width))

    def _block_mask(self, mask: Any, shape: tuple[int, ...], fill: int) -> Any:
        b, h, number, size = shape
        if mask is None and not fill:
            return None
        if mask is None:
            mask = self.builder.emit(relax.const(np.ones((1, number * size - fill), dtype=bool)))
        rows = _sizes(self.builder.normalize(mask))[0]
        if fill:
            none = relax.const(np.zeros((rows, fill), dtype=bool))
            mask = self.builder.emit(relax.op.concat([mask, none], 1))
        mask = self.reshape(mask, (rows, 1, number, size))
        mask = self.builder.emit(relax.op.broadcast_to(mask, shape))
        return self.reshape(mask, (b * h * number, size))


def _sizes(expr: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in expr.ty.shape)

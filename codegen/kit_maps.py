"""The kit's feature maps and norms of the kernelised forms (a part of codegen/kit.py).

Each method emits one kernel of codegen/kernels/maps.py with the schedule rule ``map``. Letters as
in passes/site.py; W is a number of weight rows that divides the heads: W heads of weights serve
H heads of data, H / W neighbours sharing one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from codegen.kernels import maps


class MapKernels:
    """Mixed into `Kit`, which brings the builder and the emitters."""

    builder: Any
    _te: Any
    _data: Any
    project: Any

    def _map(self, define: Callable[..., Any], args: list[Any], name: str, **facts: Any) -> Any:
        return self._te(define, args, f"map_{name}", "map", {"map": name, **facts})

    def constant(self, values: NDArray[Any]) -> Any:
        """A float32 constant of the module."""
        return self.builder.emit(relax.const(np.asarray(values, dtype="float32")))

    def tokens(self, x: Any) -> int:
        """The number of tokens of x [B, H, T, D]."""
        (x,) = self._data(x=x)
        return _sizes(x)[2]

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
        args = self._data(x=x, table=table)
        return self._map(lambda *a: maps.cosine(floor, *a), args, "cosine", floor=floor)

    def exp_query(self, y: Any, offset: Any = None) -> Any:
        """exp(y + offset - maximum of the row): y [B, H, T, R], offset [W, R]."""
        given = {"y": y} if offset is None else {"y": y, "offset": offset}
        return self._map(maps.exp_query, self._data(**given), "exp_query")

    def exp_key(self, y: Any, x: Any, *, scale: float, floor: float) -> Any:
        """exp(y - scale |x|^2 / 2) + floor, the exponent at most 60: y [B, G, S, R], x [.., D]."""
        args, facts = self._data(y=y, x=x), {"scale": float(scale), "floor": floor}
        return self._map(lambda *a: maps.exp_key(scale, floor, *a), args, "exp_key", **facts)

    def polynomial(self, y: Any, *, low: bool) -> Any:
        """[1, y, pairs] (`low`) or [pairs]; products of rows are 1 + t + t^2 / 2 or t^2 / 2."""
        (y,) = self._data(y=y)
        return self._map(lambda y: maps.polynomial(low, y), [y], "polynomial", low=low)

    def head_norm(self, x: Any, gamma: Any, beta: Any, eps: float) -> Any:
        """Layer norm over the last axis with gamma and beta [W, X] of the head."""
        args = self._data(x=x, gamma=gamma, beta=beta)
        return self._map(lambda *a: maps.head_norm(eps, *a), args, "head_norm", eps=eps)

    def glu(self, a: Any, b: Any) -> Any:
        """a sigmoid(b) of every element."""
        return self._map(maps.glu, self._data(a=a, b=b), "glu")

    def divide(self, x: Any, count: Any, tiny: float) -> Any:
        """x [B, H, T, E] / max(count, tiny), count [B or 1, 1, T, 1]."""
        args = self._data(x=x, count=count)
        return self._map(lambda *a: maps.divide(tiny, *a), args, "divide", tiny=tiny)

    def token_norm(self, x: Any, *, scale: float, eps: float) -> Any:
        """x scale over the root of its mean square over heads and channels: [B, H, T, E]."""
        (x,) = self._data(x=x)
        facts = {"scale": scale, "eps": eps}
        return self._map(lambda x: maps.token_norm(scale, eps, x), [x], "token_norm", **facts)


def _sizes(expr: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in expr.ty.shape)

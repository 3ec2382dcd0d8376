"""The kit's landmarks and small inverses of the low-rank forms (a part of codegen/kit.py).

Everything is float32. Letters as in passes/site.py; m landmarks. These kernels are for processors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from codegen.kernels import blocks, landmarks, newton, pooling
from codegen.kernels.attention import attributes
from passes.errors import LoweringError


class LandmarkKernels:
    """Mixed into `Kit`, which brings the builder and the emitters."""

    builder: Any
    target: Any
    _data: Any
    exact_attention: Any

    def segment_means(self, x: Any, m: int, key_mask: Any = None, *, block: int = 0) -> Any:
        """Means of m runs of the visible tokens: x [B, G, S, D] -> [B, G, m, D] float32.

        Without a token to its name a landmark is 0. With `block` a run is so many neighbours,
        visible or not.
        """

        def define(*args: Any) -> None:
            landmarks.segments(block, *args)

        (x,) = self._data(x=x)
        b, g, _, d = _sizes(x)
        args = [x, *self._masks(key_mask)]
        return self._landmarks("segments", define, args, (b, g, m, d), block=block)

    def filled_segments(self, key_mask: Any, m: int) -> Any:
        """Which of the m landmarks have a visible token: bool [B or 1, m]; None without a mask."""
        if key_mask is None:
            return None
        (mask,) = self._masks(key_mask)
        out = (_sizes(mask)[0], m)
        return self._landmarks("filled", landmarks.filled, [mask], out, dtype="bool")

    def apply_pseudo_inverse(
        self, q: Any, k: Any, w: Any, *, key_mask: Any = None, scale: float, steps: int
    ) -> Any:
        """A^+ w, A = softmax(scale q k^T): q [B, H, m, D], k [B, G, m, D], w [B, H, m, E]."""
        q, k, w = self._data(q=q, k=k, w=w)

        def define(*args: Any) -> None:
            landmarks.pseudo_inverse(scale, steps, *args)

        args = [q, k, w, *self._masks(key_mask)]
        facts: dict[str, Any] = {"scale": scale, "steps": steps}
        return self._landmarks("pseudo_inverse", define, args, _sizes(w), **facts)

    def lift_keys(self, k: Any, key_mask: Any = None) -> Any:
        """[k, 1, -h] with h half the largest squared length of a visible key: [B, G, S, D + 2]."""
        (k,) = self._data(k=k)
        args, (*lead, d) = [k, *self._masks(key_mask)], _sizes(k)
        return self._landmarks("lift", newton.lift, args, (*lead, d + 2), rule="newton")

    def solve_gaussian(
        self, x: Any, n: Any, *, key_mask: Any = None, scale: float, ridge: float, steps: int
    ) -> Any:
        """U = (A + ridge I)^-1 n, A = exp(-scale |x_i - x_j|^2 / 2), and a guard behind it.

        x [B, G, m, D], n [B, G, m, W] -> [B, G, m, W + 1]; the last channel is 1/100 of |U|'s last.
        """
        x, n = self._data(x=x, n=n)

        def define(*args: Any) -> None:
            newton.solve(scale, ridge, steps, *args)

        args, (*lead, w) = [x, n, *self._masks(key_mask)], _sizes(n)
        facts: dict[str, Any] = {"scale": scale, "ridge": ridge, "steps": steps}
        return self._landmarks("solve", define, args, (*lead, w + 1), rule="newton", **facts)

    def pool(self, x: Any, w: Any, key_mask: Any = None) -> Any:
        """Visible tokens pooled by weights, over the slots' coverage: [B, G, r, D] float32.

        x [B, G, S, D], w [G, r, S]; the coverage of a slot is the part of its |w| that is visible.
        """
        w, x = self._data(w=w, x=x)
        (b, g, s, d), (_, r, keys) = _sizes(x), _sizes(w)
        if keys != s:
            raise LoweringError(f"pooling weights are for {keys} tokens, and there are {s}")
        args = [w, x, *self._masks(key_mask)]
        return self._landmarks("pool", pooling.pool, args, (b, g, r, d), rule="pooling")

    def slot_bias(self, w: Any, bias: Any, batch: int, key_mask: Any = None) -> Any:
        """bias [G, r] plus the log of each slot's coverage: [B or 1, G, 1, r]."""
        w, bias = self._data(w=w, bias=bias)
        g, r, _ = _sizes(w)
        if key_mask is None:
            return self.builder.emit(relax.op.reshape(bias, (1, g, 1, r)))
        args, out = [w, bias, *self._masks(key_mask)], (batch, g, 1, r)
        return self._landmarks("slot_bias", pooling.slot_bias, args, out, rule="pooling")

    def chosen_blocks(
        self, q: Any, k: Any, v: Any, *, key_mask: Any, scale: float, block: int, best: int
    ) -> Any:
        """Softmax over the own and the `best` blocks of keys and the means of all others.

        q [B, H, T, D], k [B, G, T, D], v [B, G, T, E] float32 -> [B, H, T, E].
        """
        q, k, v = self._data(q=q, k=k, v=v)
        (b, h, t, d), e = _sizes(q), _sizes(v)[3]
        number = -(-t // block)
        means_q = self.segment_means(q, number, key_mask, block=block)
        means_k, means_v = (self.segment_means(x, number, key_mask, block=block) for x in (k, v))
        counts = self._log_counts(key_mask, t, block)
        places = (b, h, number, best + 1)

        def choose(*args: Any) -> None:
            blocks.choose(scale, *args)

        chosen = self._landmarks("choose", choose, [means_q, means_k, counts], places,
                                 rule="blocks", dtype="int32", scale=scale)  # fmt: skip
        length = (best + 1) * block + number

        def added(*args: Any) -> None:
            blocks.bias(block, t, *args)

        bias = self._landmarks("bias", added, [chosen, counts, *self._masks(key_mask)],
                               (b * h * number, 1, 1, length), rule="blocks", block=block,
                               keys=t)  # fmt: skip
        keys, values = (
            self._gather(x, m, chosen, block, length) for x, m in ((k, means_k), (v, means_v))
        )
        fill = number * block - t
        if fill:
            q = self.builder.emit(relax.op.nn.pad(q, [0, 0, 0, 0, 0, fill, 0, 0]))
        q = self.builder.emit(relax.op.reshape(q, (b * h * number, 1, block, d)))
        out = self.exact_attention(q, keys, values, bias=bias, scale=scale)
        out = self.builder.emit(relax.op.reshape(out, (b, h, number * block, e)))
        return self.builder.emit(relax.op.strided_slice(out, [2], [0], [t])) if fill else out

    def _log_counts(self, key_mask: Any, keys: int, block: int) -> Any:
        number = -(-keys // block)
        if key_mask is None:
            sizes = np.minimum(block, keys - block * np.arange(number))
            return self.builder.emit(relax.const(np.log(sizes)[None].astype("float32")))
        (mask,) = self._masks(key_mask)

        def define(*args: Any) -> None:
            blocks.log_counts(block, *args)

        out = (_sizes(mask)[0], number)
        return self._landmarks("log_counts", define, [mask], out, rule="blocks", block=block)

    def _gather(self, x: Any, means: Any, chosen: Any, block: int, length: int) -> Any:
        def define(*args: Any) -> None:
            blocks.gather(block, *args)

        b, h, number, _ = _sizes(chosen)
        out = (b * h * number, 1, length, _sizes(x)[3])
        return self._landmarks(
            "gather", define, [x, means, chosen], out, rule="blocks", block=block
        )

    def _masks(self, *masks: Any) -> list[Any]:
        return [self.builder.normalize(m) for m in masks if m is not None]

    def _landmarks(
        self,
        kernel: str,
        define: Any,
        args: list[Any],
        shape: tuple[int, ...],
        *,
        dtype: str = "float32",
        rule: str = "landmarks",
        **facts: Any,
    ) -> Any:
        if self.target.kind == "gpu":
            raise LoweringError(f"the kernel {rule}_{kernel} is not there for a GPU yet")
        types = [(_sizes(x), _dtype(x)) for x in args]
        func = landmarks.prim(types, (shape, dtype), define).without_attr("global_symbol")
        for key, value in attributes(rule, {"kernel": kernel, **facts}).items():
            func = func.with_attr(key, value)
        name = self.builder.add_func(func, f"{rule}_{kernel}")
        out = relax.TensorType(shape, dtype)
        return self.builder.emit(relax.call_tir(name, args, out))


def _sizes(expr: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in expr.ty.shape)


def _dtype(expr: Any) -> str:
    return str(getattr(expr.ty.dtype, "dtype", expr.ty.dtype))

"""The kit's products of features with factors of relative positions (a part of codegen/kit.py).

Letters as in passes/site.py. These kernels are for processors; a GPU is refused.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from codegen.kernels import relative
from codegen.kernels.attention import attributes
from codegen.kernels.relative import RelativeFacts
from codegen.kernels.row_attention import RowFacts


class RelativeKernels:
    """Mixed into `Kit`, which brings the builder and the emitters."""

    builder: Any
    _data: Any
    _rows: Any

    def relative_factors(
        self,
        offset: Any,
        bias: Any,
        *,
        grid: tuple[int, ...] | None,
        tokens: tuple[int, int],
        causal: bool,
    ) -> Any:
        """e^(offset + bias - their maximum) [B or 1, H, T, S]; 0 for what causality hides.

        offset [H, N] as `RelativeFacts` has it; bias None or broadcastable to [B, H, T, S].
        """
        (offset,) = self._data(offset=offset)
        args = [offset]
        if bias is not None:
            (bias,) = self._data(bias=bias)
            shape = (*(1 for _ in range(4 - len(bias.ty.shape))), *_sizes(bias))
            args.append(self.builder.emit(relax.op.reshape(bias, shape)))
        facts = RelativeFacts(tokens, grid, causal, bias is not None)
        shapes = [_sizes(x) for x in args]
        func = relative.define(facts, [(s, "float32") for s in shapes])
        func = func.without_attr("global_symbol")
        for key, value in attributes("relative", facts.to_json()).items():
            func = func.with_attr(key, value)
        sizes = relative.shape_of(facts, shapes[0], shapes[1] if len(shapes) > 1 else None)
        name = self.builder.add_func(func, "relative")
        return self.builder.emit(relax.call_tir(name, args, relax.TensorType(sizes, "float32")))

    def product_attention(self, fq: Any, fk: Any, v: Any, factors: Any, *, key_mask: Any) -> Any:
        """sum_j (fq_i.fk_j c_ij) v_j over the sum of these weights: [B, H, T, E].

        fq [B, H, T, R], fk [B, G, S, R], v [B, G, S, E], factors c [B or 1, H, T, S] not negative.
        A query that sees no key gives 0.
        """
        how = {"key_mask": key_mask, "bias": factors, "scale": 1.0}
        return self._rows(fq, fk, v, RowFacts("product"), **how)


def _sizes(expr: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in expr.ty.shape)

"""The kit's products of features with factors of relative positions (a part of codegen/kit.py).

Letters as in passes/site.py. These kernels are for processors; a GPU is refused.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from codegen.kernels import relative, relative_blocks
from codegen.kernels.attention import attributes
from codegen.kernels.relative import RelativeFacts
from codegen.kernels.relative_blocks import BlockFacts
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
        args = self._inputs(offset, bias)
        facts = RelativeFacts(tokens, grid, causal, bias is not None)
        shapes = [_sizes(x) for x in args]
        func = relative.define(facts, [(s, "float32") for s in shapes])
        sizes = relative.shape_of(facts, shapes[0], shapes[1] if len(shapes) > 1 else None)
        return self._ready(func, args, "relative", facts.to_json(), sizes)

    def _inputs(self, offset: Any, bias: Any) -> list[Any]:
        """[offset, bias] with four axes, or [offset]."""
        (offset,) = self._data(offset=offset)
        if bias is None:
            return [offset]
        (bias,) = self._data(bias=bias)
        shape = (*(1 for _ in range(4 - len(bias.ty.shape))), *_sizes(bias))
        return [offset, self.builder.emit(relax.op.reshape(bias, shape))]

    def _ready(
        self, func: Any, args: list[Any], rule: str, facts: dict[str, Any], shape: tuple[int, ...],
        dtype: str = "float32",
    ) -> Any:  # fmt: skip
        """A call of a ready PrimFunc with one output."""
        func = func.without_attr("global_symbol")
        for key, value in attributes(rule, facts).items():
            func = func.with_attr(key, value)
        name = self.builder.add_func(func, rule)
        return self.builder.emit(relax.call_tir(name, args, relax.TensorType(shape, dtype)))

    def relative_attention(
        self,
        fq: Any,
        fk: Any,
        v: Any,
        offset: Any,
        bias: Any,
        *,
        key_mask: Any = None,
        causal: bool,
        block: int,
    ) -> Any:
        """`product_attention` where factors more than `block` away are alike on each side.

        fq [B, H, T, R], fk [B, G, T, R], v [B, G, T, E] of float32 in three or more blocks; a bias
        of j - i alone, beside keys hidden from all, broadcastable to [B, H, T, T]. In time linear
        in the tokens but for reading the bias.
        """
        fq, fk, v = self._data(fq=fq, fk=fk, v=v)
        args = self._inputs(offset, bias)
        tokens, types = _sizes(fq)[2], [(_sizes(x), "float32") for x in args]
        facts = {"visible": False, "causal": causal}
        func = relative_blocks.table(tokens, causal, types)
        batch = types[1][0][0] if len(args) > 1 else 1
        shape: tuple[int, ...] = (batch, types[0][0][0], 2 * tokens - 1)
        table = self._ready(func, args, "relative_table", facts, shape)
        if bias is not None:
            func, shape = relative_blocks.visible(types[1:]), (batch, tokens)
            facts = {**facts, "visible": True}
            key_mask = self._ready(func, args[1:], "relative_table", facts, shape, "bool")
        args = [fq, fk, v, table] + ([] if key_mask is None else [self.builder.normalize(key_mask)])
        known = BlockFacts(block, causal, key_mask is not None)
        masks = [] if key_mask is None else [(_sizes(args[4]), "bool")]
        func = relative_blocks.define(known, [(_sizes(x), "float32") for x in args[:4]] + masks)
        shape = (*_sizes(fq)[:3], _sizes(v)[3])
        return self._ready(func, args, "relative_blocks", known.to_json(), shape)

    def product_attention(self, fq: Any, fk: Any, v: Any, factors: Any, *, key_mask: Any) -> Any:
        """sum_j (fq_i.fk_j c_ij) v_j over the sum of these weights: [B, H, T, E].

        fq [B, H, T, R], fk [B, G, S, R], v [B, G, S, E], factors c [B or 1, H, T, S] not negative.
        A query that sees no key gives 0.
        """
        how = {"key_mask": key_mask, "bias": factors, "scale": 1.0}
        return self._rows(fq, fk, v, RowFacts("product"), **how)


def _sizes(expr: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in expr.ty.shape)

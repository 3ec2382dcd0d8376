"""Kernels over binary codes, as part of the kit (codegen/kit.py)."""

from __future__ import annotations

from typing import Any

from codegen.kernels import angular, hamming, table_attention


class HashKernels:
    """What `Kit` offers to forms that hash."""

    def hash_codes(self: Any, x: Any, anchors: Any, centre: Any, mix: Any, rate: Any) -> Any:
        """Signs of a kernelised hash as packed words: x [B, H, T, D] -> uint32 [B, H, T, W].

        anchors [G, D, m], centre [G, m], mix [G, m, b], rate [G] float32 with H % G == 0 (see
        passes/forms/_hash.py); W = ceil(b / 32).
        """
        args = self._data(x=x, anchors=anchors, centre=centre, mix=mix, rate=rate)
        return self._te(hamming.hash_codes, args, "hash_codes", "hash_codes", {})

    def width(self: Any, x: Any) -> int:
        """The size of the last axis."""
        (x,) = self._data(x=x)
        return int(x.ty.shape[-1])

    def sign_codes(self: Any, x: Any, threshold: Any) -> Any:
        """Bits x / |x| > threshold as packed words: x [B, H, T, D] -> uint32 [B, H, T, W].

        threshold [G] float32 with H % G == 0; W = ceil(D / 32).
        """
        args = self._data(x=x, threshold=threshold)
        return self._te(angular.sign_codes, args, "sign_codes", "sign_codes", {})

    def angular_attention(
        self: Any, cq: Any, ck: Any, v: Any, conv: Any, *, key_mask: Any = None, bits: int
    ) -> Any:
        """y / |y| + DW(v) with y = v / 2 + c_q (c_k^T v) / pi: [B, H, T, E] in v's dtype.

        cq [B, H, T, W], ck [B, G, T, W] uint32, v [B, G, T, E], conv [G, taps], key_mask
        [B or 1, T] bool. Hidden tokens have the value 0.
        """
        v, conv = self._data(v=v, conv=conv)
        rest = [] if key_mask is None else [self.builder.normalize(key_mask)]
        args = [self.builder.normalize(cq), self.builder.normalize(ck), v, conv, *rest]
        facts = {"bits": bits}

        def define(*tensors: Any) -> Any:
            return angular.define(facts, *tensors)

        return self._te(define, args, "angular_attention", "angular_attention", facts)

    def table_attention(
        self: Any,
        cq: Any,
        ck: Any,
        v: Any,
        table: Any,
        *,
        key_mask: Any = None,
        conv: Any = None,
        causal: bool,
        bits: int,
        common: bool = False,
    ) -> Any:
        """sum_j w_ij v_j / sum_j w_ij with w = exp(table[h, count]): [B, H, T, E] in v's dtype.

        cq [B, H, T, W], ck [B, G, S, W] uint32, v [B, G, S, E], table [H, bits + 1] float32 (the
        largest of a head becomes weight 1), key_mask [B or 1, S] bool. The count of a pair is that
        of the bits of cq xor ck, or with `common` of cq and ck. `conv` [G, taps] adds a
        convolution over the values around a token (T = S). With `causal` query i sees keys
        j <= i + S - T. A query that sees no key gives 0.
        """
        v, table = self._data(v=v, table=table)
        rest = [self.builder.normalize(x) for x in (key_mask, conv) if x is not None]
        args = [self.builder.normalize(cq), self.builder.normalize(ck), v, table, *rest]
        taps = 0 if conv is None else self.width(conv)
        facts = table_attention.TableFacts(bits, common, causal, key_mask is not None, taps)

        def define(*tensors: Any) -> Any:
            return table_attention.define(facts, *tensors)

        return self._te(define, args, "table_attention", "table_attention", facts.to_json())

    def hamming_attention(
        self: Any,
        cq: Any,
        ck: Any,
        v: Any,
        *,
        key_mask: Any = None,
        causal: bool,
        bits: int,
        beta: float,
        own: bool,
        eps: float,
    ) -> Any:
        """Attention with weights b - 2 Hamming + beta: [B, H, T, E] in v's dtype.

        cq [B, H, T, W], ck [B, G, S, W] uint32, v [B, G, S, E], key_mask [B or 1, S] bool. With
        `own` beta multiplies the query's own value instead of the sum. With `causal` query i sees
        keys j <= i + S - T. A query that sees no key gives 0.
        """
        (v,) = self._data(v=v)
        rest = [] if key_mask is None else [self.builder.normalize(key_mask)]
        args = [self.builder.normalize(cq), self.builder.normalize(ck), v, *rest]
        facts = {"bits": bits, "beta": beta, "own": own, "eps": eps, "causal": causal}
        if not causal:

            def define(*tensors: Any) -> Any:
                return hamming.define(facts, *tensors)

            return self._te(define, args, "hamming_attention", "hamming_attention", facts)
        return self._signed_sums(args, facts)

    def _signed_sums(self: Any, args: list[Any], facts: dict[str, Any]) -> Any:
        from tvm import relax

        from codegen.kernels.attention import attributes

        shapes = [[int(n) for n in a.ty.shape] for a in args]
        dtype = str(getattr(args[2].ty.dtype, "dtype", args[2].ty.dtype))
        rows = shapes[3][0] if len(args) == 4 else 0
        cq, ck, v = shapes[:3]
        func = hamming.causal(facts, cq, ck, v, rows, dtype).without_attr("global_symbol")
        for key, value in attributes("hamming_attention", facts).items():
            func = func.with_attr(key, value)
        name = self.builder.add_func(func, "hamming_attention_causal")
        out = relax.TensorType((*cq[:3], v[3]), dtype)
        return self.builder.emit(relax.call_tir(name, args, out))

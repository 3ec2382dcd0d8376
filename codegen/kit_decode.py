"""The kit's kernels of decoding steps (a part of codegen/kit.py).

The state's tensors are changed in place; what is handed back are the same tensors, so a graph
must not use a state after the step that changed it. Letters as in passes/site.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax

from codegen.kernels import decode, decode_hybrid
from codegen.kernels.attention import attributes
from codegen.target import Target
from passes.errors import LoweringError


class DecodeKernels:
    """Mixed into `Kit`, which brings the builder and the target."""

    builder: Any
    target: Target
    _data: Any

    def linear_step(self, fq: Any, fk: Any, v: Any, state: Any, norm: Any, *, eps: float) -> Any:
        """(out, state, norm): each token is added to the state, then read by its queries.

        fq [B, H, T, R], fk [B, G, T, R], v [B, G, T, E], state [B, G, R, E], norm [B, G, R];
        out [B, H, T, E] = fq state / max(fq norm, eps).
        """
        fq, fk, v, state, norm = self._data(fq=fq, fk=fk, v=v, state=state, norm=norm)
        shape = [*_tensor(fq)[0][:3], _tensor(v)[0][3]]
        named = {"fq": fq, "fk": fk, "v": v, "sum": state, "norm": norm}
        tensors = {name: _tensor(x) for name, x in named.items()}
        tensors["out"] = (shape, _tensor(v)[1])
        func = decode.linear_step(float(eps), tensors, self.target.lanes)
        return self._step(func, tensors, list(named.values()), (3, 4), {"kind": "linear"})

    def attention_step(
        self,
        q: Any,
        k: Any,
        v: Any,
        keys: Any,
        values: Any,
        position: Any,
        *,
        scale: float,
        left: int | None = None,
        clip: tuple[float, float] | None = None,
    ) -> Any:
        """(out, keys, values): k and v are written at the position, then attended up to there.

        q [B, H, T, D], k [B, G, T, D], v [B, G, T, E], keys [B, G, N, D, block],
        values [B, G, N * block, E], position [B, T] int64; out [B, H, T, E]. `left`, `clip`: as
        codegen/kernels/decode.py has them.
        """
        q, k, v, keys, values = self._data(q=q, k=k, v=v, keys=keys, values=values)
        position = self.builder.normalize(position)
        shape = [*_tensor(q)[0][:3], _tensor(v)[0][3]]
        named = {"q": q, "k": k, "v": v, "position": position, "keys": keys, "values": values}
        tensors = {name: _tensor(x) for name, x in named.items()}
        tensors["out"] = (shape, _tensor(v)[1])
        facts = decode.Cached(float(scale), left, clip)
        func = decode.attention_step(facts, tensors, self.target.lanes)
        return self._step(func, tensors, list(named.values()), (4, 5), {"kind": "cached"})

    def rows_at(self, table: Any, position: Any) -> Any:
        """The rows of table [N, W] float32 for positions [B, T] int64: [T, W]."""
        (table,), position = self._data(table=table), self.builder.normalize(position)
        tensors = {"table": _tensor(table), "position": _tensor(position)}
        tensors["out"] = ([tensors["position"][0][1], tensors["table"][0][1]], "float32")
        func = decode.rows_at(tensors)
        return self._step(func, tensors, [table, position], (), {"kind": "rows"})[0]

    def code_signs(self, words: Any, bits: int, last: float) -> Any:
        """Packed codes uint32 [B, H, T, W] as -1 and 1, then `last`: [B, H, T, bits + 1]."""
        words = self.builder.normalize(words)
        tensors = {"words": _tensor(words)}
        tensors["out"] = ([*tensors["words"][0][:3], bits + 1], "float32")
        func = decode.code_signs(float(last), tensors)
        return self._step(func, tensors, [words], (), {"kind": "codes"})[0]

    def hybrid_step(
        self,
        q: Any,
        k: Any,
        v: Any,
        fq: Any,
        fk: Any,
        mix: Any,
        state: Sequence[Any],
        position: Any,
        *,
        scale: float,
        window: int,
        eps: float,
    ) -> Any:
        """(out, *state): new tokens join the ring of near ones, then softmax there and sums.

        As codegen/kernels/decode_hybrid.py has it; everything but `position` is float32.
        """
        q, k, v, fq, fk, mix = self._data(q=q, k=k, v=v, fq=fq, fk=fk, mix=mix)
        names = ("keys", "values", "part", "part_norm", "sum", "norm")
        kept = self._data(**dict(zip(names, state, strict=True)))
        named = {"q": q, "k": k, "v": v, "fq": fq, "fk": fk, "mix": mix}
        named["position"] = self.builder.normalize(position)
        changed = tuple(range(len(named), len(named) + len(names)))
        named |= zip(names, kept, strict=True)
        tensors = {name: _tensor(x) for name, x in named.items()}
        tensors["out"] = ([*tensors["q"][0][:3], tensors["v"][0][3]], "float32")
        facts = decode_hybrid.Facts(float(scale), window, float(eps))
        func = decode_hybrid.hybrid_step(facts, tensors, self.target.lanes)
        return self._step(func, tensors, list(named.values()), changed, {"kind": "hybrid"})

    def _step(
        self,
        func: Any,
        tensors: dict[str, decode.Tensor],
        args: list[Any],
        changed: tuple[int, ...],
        facts: dict[str, Any],
    ) -> tuple[Any, ...]:
        """The output and the arguments at `changed`, which the kernel writes to."""
        if self.target.kind == "gpu":
            raise LoweringError(
                f"decoding steps have no kernel for {self.target.name}; compile for a processor"
            )
        func = func.without_attr("global_symbol")
        for key, value in attributes(decode.NAME, facts).items():
            func = func.with_attr(key, value)
        name = self.builder.add_func(func, f"decode_{facts['kind']}")
        every = list(tensors.values())
        if not changed:
            return (self.builder.emit(relax.call_tir(name, args, relax.TensorType(*every[-1]))),)
        types = [relax.TensorType(*every[-1]), *(relax.TensorType(*every[i]) for i in changed)]
        call = relax.op.call_tir_inplace(name, args, [-1, *changed], types)
        both = self.builder.emit(call)
        return tuple(self.builder.emit(relax.TupleGetItem(both, i)) for i in range(len(types)))


def _tensor(expr: Any) -> decode.Tensor:
    shape = [int(n) for n in expr.ty.shape]
    return shape, str(getattr(expr.ty.dtype, "dtype", expr.ty.dtype))

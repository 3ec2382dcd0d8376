"""A layer of two experts for GPUs (TE): each token's row times its own expert's weights alone.

Tokens are not listed by expert as on a processor (codegen/kernels/dispatch.py). Neighbouring
threads take columns of one token, so a warp goes one way and reads the weights of one expert.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from codegen.kernels.coded import code_of, weight_of
from codegen.kernels.dispatch import DispatchFacts, Tensor
from codegen.kernels.vector_math import f32
from passes.linear_forms._codes import PANEL


def dispatch(facts: DispatchFacts, tensors: dict[str, Tensor]) -> Any:
    """As codegen/kernels/dispatch.py has it, in stages: two logits, the product, its end."""
    *given, (shape, _) = tensors.values()
    names = list(tensors)[: len(given)]
    args = [te.placeholder(s, kind, name=n) for n, (s, kind) in zip(names, given, strict=True)]
    return te.create_prim_func([*args, _output(facts, dict(zip(names, args, strict=True)), shape)])


def _output(facts: DispatchFacts, held: dict[str, Any], shape: tuple[int, ...]) -> Any:
    x, router = held["x"], held["router"]
    depth = int(x.shape[1])
    n = te.reduce_axis((0, depth), name="n")
    logits = te.compute(
        (shape[0], 2), lambda r, e: te.sum(x[r, n] * router[e, n], axis=n), name="experts_logits"
    )
    k = te.reduce_axis((0, depth), name="k")

    def term(r: Any, j: Any) -> Any:
        panel, column = j // PANEL, j % PANEL
        word = held["words"][panel, k // facts.codes.per, column]
        code = weight_of(facts.codes, code_of(facts.codes, word, k % facts.codes.per))
        shifted, scaled = _second(logits, r), held["multiply"][panel, k, column]
        return te.sum(x[r, k] * tirx.if_then_else(shifted, code, scaled), axis=k)

    product = te.compute(shape, term, name="experts_product")

    def end(r: Any, j: Any) -> Any:
        value = product[r, j]
        value = tirx.Select(_second(logits, r), value * held["scale"][j], value)
        if facts.bias:
            value = value + held["bias"][j]
        return value * _gate(logits, r) if facts.gate else value

    return te.compute(shape, end, name="experts_out")


def _second(logits: Any, r: Any) -> Any:
    """Whether token r goes to expert 1, as torch sends it: to expert 0 where both are equal."""
    return logits[r, 1] > logits[r, 0]


def _gate(logits: Any, r: Any) -> Any:
    """The probability of the larger logit."""
    behind = tirx.max(logits[r, 0], logits[r, 1]) - tirx.min(logits[r, 0], logits[r, 1])
    return f32(1.0) / (f32(1.0) + tirx.exp(-behind))

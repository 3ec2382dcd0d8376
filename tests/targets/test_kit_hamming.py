"""Kernels over binary codes: words, other sizes and options, and no product with a code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import tvm_ffi
from tvm import tirx

from codegen.target import target_named
from passes.form import form_named
from passes.forms import _hash
from passes.rewire import rewired
from tests.targets.kit_tools import Case, Trial, trial


def made(case: Case, **options: Any) -> Trial:
    """A trial of hamming with these options, away from thresholds."""
    rng = np.random.default_rng()
    form = form_named("hamming", options)
    while True:
        t = trial("hamming", case, rng)
        params = {n: p.numpy() for n, p in form.init_params(case.site).items()}
        t = Trial(form, case, t.arrays, params)
        wide = {n: torch.from_numpy(p).double() for n, p in params.items()}
        q, k = (torch.from_numpy(t.arrays[n]).double() for n in "qk")
        if form.margin(t.spec, wide, q, k) > 1e-5:
            return t


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (Case(T=600, S=600, D=24, E=40), {}),  # several pieces, a tail of the vectors
        (Case(B=2, T=21, S=70, H=6, G=2, key_rows=2), {"bits": 33, "anchors": 7}),
        (Case(T=37, S=37), {"bits": 3, "beta": 32}),
        (Case(B=2, T=19, S=19, H=4, G=2, key_rows=1), {"constant": "own_value", "bits": 6}),
        (Case(T=50, S=50, causal=True, H=4, G=2, key_rows=1), {"constant": "own_value"}),
        (Case(T=9, S=30, causal=True), {"bits": 40}),
        (Case(T=30, S=9, causal=True), {}),
        (Case(T=24, S=24, dtype="float16"), {}),
    ],
    ids=str,
)
def test_kernel_equals_module(case: Case, options: dict[str, Any]) -> None:
    t = made(case, **options)
    if case.key_rows == 1 and case.B > 1:  # a mask for the whole batch
        t.arrays["key_mask"] = t.arrays["key_mask"][:1]
    tolerance = 2e-3 if case.dtype == "float16" else 2e-5
    np.testing.assert_allclose(t.run(), t.reference(), atol=tolerance, rtol=tolerance)


def test_narrow_vectors_and_many_bits() -> None:
    from tests.targets.kit_tools import with_target

    t = with_target(made(Case(T=40, S=40, causal=True), bits=64), vector_bytes=16)
    np.testing.assert_allclose(t.run(), t.reference(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("bits", [5, 32, 50])
def test_words_hold_the_codes(bits: int) -> None:
    """The words themselves: run the hash alone and unpack."""
    import tvm
    from tvm import relax

    from codegen.kit import Kit
    from codegen.kit_build import _finish

    t = made(Case(B=2, T=11, S=11, H=4, G=2, D=20), bits=bits)
    builder = relax.BlockBuilder()
    arrays = {"x": t.arrays["q"], **t.params}
    variables = {
        n: relax.Var(n, relax.TensorType(a.shape, str(a.dtype))) for n, a in arrays.items()
    }
    with builder.function("main", list(variables.values())):
        with builder.dataflow():
            out = Kit(builder, t.target).hash_codes(*variables.values())
            result = builder.emit_output(out)
        builder.emit_func_output(result)
    built = _finish(builder.get(), t.target)
    machine = relax.VirtualMachine(built.library, tvm.cpu())
    words = machine["main"](*(tvm.runtime.tensor(a) for a in arrays.values())).numpy()
    assert words.dtype == np.uint32
    assert words.shape == (2, 4, 11, -(-bits // 32))
    got = [(words[..., r // 32] >> np.uint32(r % 32)) & 1 for r in range(bits)]
    params = {n: torch.from_numpy(p).double() for n, p in t.params.items()}
    want = _hash.projections(torch.from_numpy(t.arrays["q"]).double(), params) > 0
    np.testing.assert_array_equal(np.stack(got, -1).astype(bool), want.numpy())


FIELDS = (
    "body", "block", "init", "seq", "then_case", "else_case", "value", "indices", "a", "b", "args",
    "condition", "true_value", "false_value", "base", "predicate", "iter_values",
)  # fmt: skip


def walk(node: Any) -> Iterator[Any]:
    """Every statement and expression below `node`."""
    if isinstance(node, Sequence | tvm_ffi.Array) and not isinstance(node, str):
        for one in node:
            yield from walk(one)
        return
    yield node
    for field in FIELDS:
        inner = getattr(node, field, None)
        if inner is not None and not callable(inner) and not isinstance(inner, str | int | float):
            yield from walk(inner)


def products(func: Any) -> list[Any]:
    """Every floating multiplication of a PrimFunc."""
    nodes = list(walk(func.body))
    stores = sum(type(n).__name__ == "BufferStore" for n in nodes)
    assert stores == str(func).count("] = "), "the walk must reach every store"
    return [n for n in nodes if type(n).__name__ == "Mul" and "float" in str(n.ty)]


def is_constant(x: Any) -> bool:
    return type(x).__name__ in ("FloatImm", "Broadcast") and (
        type(x).__name__ == "FloatImm" or type(x.value).__name__ == "FloatImm"
    )


@pytest.mark.parametrize("causal", [False, True])
def test_no_floating_product_of_a_code_and_a_value(causal: bool) -> None:
    """In the scheduled TensorIR only the constant beta multiplies; codes are uint32 words."""
    t = made(Case(T=64, S=64, causal=causal))
    built = t.build()
    name = next(n for n in built.scheduled if n.startswith("hamming_attention"))
    func = built.scheduled[name]
    assert [str(p.dtype) for p in func.params][:2] == ["uint32", "uint32"]
    multiplied = products(func)
    assert all(is_constant(m.a) or is_constant(m.b) for m in multiplied), multiplied
    assert 1 <= len(multiplied) <= 8
    # The walk does see products: the hash has them.
    assert any(
        not is_constant(m.a) and not is_constant(m.b)
        for m in products(built.scheduled[next(n for n in built.scheduled if "hash" in n)])
    )
    text = str(func)
    assert "fma" not in text
    assert "matmul" not in text


def test_shared_queries_and_keys_are_hashed_once() -> None:
    t = made(Case(T=24, S=24))
    at = rewired(t.case.site, t.form.rewires(t.case.site))
    assert at.shared
    from tvm import relax

    from codegen.kit import Kit
    from codegen.kit_build import _finish

    builder = relax.BlockBuilder()
    arrays = {"q": t.arrays["q"], "v": t.arrays["v"], **t.params}
    variables = {
        n: relax.Var(n, relax.TensorType(a.shape, str(a.dtype))) for n, a in arrays.items()
    }
    with builder.function("main", list(variables.values())):
        with builder.dataflow():
            q, v = variables["q"], variables["v"]
            params = {n: variables[n] for n in t.params}
            out = t.form.kernel(Kit(builder, t.target), t.spec, params, q, q, v)
            result = builder.emit_output(out)
        builder.emit_func_output(result)
    built = _finish(builder.get(), t.target)
    assert sum(c.startswith("hash") for c in built.calls) == 1
    mine, closed = ({(o, d): n for o, d, n in c} for c in (built.ops, t.form.ops(at)))
    assert mine == closed


def test_a_gpu_gets_the_same_definitions() -> None:
    """Bidirectional builds to scheduled kernels for CUDA's rules."""
    from tvm import relax

    from codegen.kit import Kit
    from codegen.schedule import schedule

    t = made(Case(T=64, S=64))
    target = target_named("cuda:sm_90")

    builder = relax.BlockBuilder()
    given = {**t.arrays, **t.params}
    variables = {n: relax.Var(n, relax.TensorType(a.shape, str(a.dtype))) for n, a in given.items()}
    with builder.function("main", list(variables.values())):
        with builder.dataflow():
            q, k, v = (variables[n] for n in "qkv")
            out = t.form.kernel(
                Kit(builder, target), t.spec, {n: variables[n] for n in t.params}, q, k, v
            )
            result = builder.emit_output(out)
        builder.emit_func_output(result)
    funcs = [f for _, f in builder.get().functions_items() if isinstance(f, tirx.PrimFunc)]
    assert len(funcs) == 2
    assert all(schedule(f, target).rule == "gpu_hamming" for f in funcs)

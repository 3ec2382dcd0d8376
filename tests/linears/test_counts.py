"""Every linear form's closed operation count against its lowered kernels, of random sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from tvm import te

from codegen.count import NotCountable, count
from passes.linear_form import LinearForm, LinearSpec, linear_form_named, linear_forms
from passes.linear_forms.moe import Moe
from passes.opcount import OpCount
from tests.linears.kernels import counted

# What decides which code a row runs is known only at run time, so its kernel has no fixed count.
DISPATCHED = {"moe"}
POSITIONS = {("mul", "int64"), ("mul", "int32")}  # in a word: constants once loops are unrolled


def sizes() -> tuple[int, int]:
    """(inputs, outputs)"""
    return 16 + int(torch.randint(80, ())), 32 + int(torch.randint(80, ()))


def layer(name: str) -> tuple[LinearForm, LinearSpec, dict[str, Tensor]]:
    """A form, the spec and the packed tensors of a layer of random size."""
    form = linear_form_named(name)
    k, n = sizes()
    spec = LinearSpec(name, k, n, True, form.config.to_json())
    packed = form.pack(form.convert(torch.randn(n, k), None))
    ordered = {key: packed[key] for key in form.packed_names(spec)} | {"bias": torch.randn(n)}
    return form, spec, ordered


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 16, 40])
@pytest.mark.parametrize("name", sorted(set(linear_forms()) - DISPATCHED))
def test_closed_counts_are_those_of_the_kernels(name: str, rows: int) -> None:
    form, spec, packed = layer(name)
    made, closed = counted(form, spec, packed, rows), form.ops(spec, rows)
    assert {op: n for op, n in made.ops.items() if op not in POSITIONS} == dict(closed.ops)
    assert made.bytes_written == closed.bytes_written == 4 * rows * spec.outputs
    assert made.bytes_read == closed.bytes_read


@pytest.mark.parametrize("name", sorted(set(linear_forms()) - DISPATCHED))
def test_rows_beside_whole_tiles_cost_at_most_a_tile(name: str) -> None:
    """Tiles of eight rows overlap where they do not fit; the closed form leaves that out."""
    form, spec, packed = layer(name)
    rows = 9 + int(torch.randint(7, ()))
    made = counted(form, spec, packed, rows).ops["mul", "float32"]
    least, most = (form.ops(spec, r).ops["mul", "float32"] for r in (rows, 16))
    assert least <= made <= most


def dense(rows: int, k: int, n: int) -> OpCount:
    """A product with a bias, and one without, as TensorIR."""
    x, w, b = (te.placeholder(s, name=c) for s, c in (((rows, k), "x"), ((n, k), "w"), ((n,), "b")))
    at = te.reduce_axis((0, k), name="k")
    made = te.compute((rows, n), lambda i, j: te.sum(x[i, at] * w[j, at], axis=at))
    out = te.compute((rows, n), lambda i, j: made[i, j] + b[j])
    return count(te.create_prim_func([x, w, b, out]))


def test_a_mixture_is_a_router_and_two_kernels() -> None:
    form = Moe({"latencies": [6, 4]})
    k, n = sizes()
    spec, rows = LinearSpec("moe", k, n, True, form.config.to_json()), 50
    made = form.ops(spec, rows)
    router = OpCount.of(mul=2 * rows * k, add=2 * rows * k, exp=2 * rows, max=rows)
    parts: Any = router + dense(20, k, n) + form.shift.ops(spec, 30)
    assert dict(made.ops) == dict(parts.ops)


def test_its_own_kernel_has_no_fixed_count() -> None:
    form = Moe()
    spec = LinearSpec("moe", 16, 32, False, form.config.to_json())
    packed = form.pack(form.convert(torch.randn(32, 16), None))
    with pytest.raises(NotCountable):
        counted(form, spec, {name: packed[name] for name in form.packed_names(spec)}, 8)

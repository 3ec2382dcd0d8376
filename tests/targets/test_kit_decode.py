"""Decoding steps through the kit, against float64: positions, grouped heads, odd sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from tvm import relax, tirx

from codegen.kit import Kit
from codegen.schedule import schedule
from codegen.target import Target, target_named
from passes.decode_form import Streaming
from passes.errors import LoweringError
from passes.form import form_named
from tests.targets.kit_tools import Case

LENGTH = 150
CASES = [
    Case(T=1, causal=True),
    Case(T=1, B=2, H=8, G=2, D=16, E=16, causal=True),
    Case(T=5, H=6, G=1, D=7, E=5, causal=True),  # more heads than one tile, odd widths
    Case(T=3, H=3, G=3, D=80, E=72, causal=True),
]
FORMS = ["exact", "elu", "hedgehog"]


@dataclass
class Step:
    """A compiled step of one form at one case's shapes."""

    form: Streaming
    case: Case
    params: dict[str, np.ndarray]
    library: Any

    def __call__(self, q: Any, k: Any, v: Any, state: list[Any], first: int) -> list[Any]:
        c = self.case
        at = first + np.arange(c.T)[None].repeat(c.B, 0)
        vm = relax.VirtualMachine(self.library, tvm.cpu())
        given = [tvm.runtime.tensor(np.ascontiguousarray(x)) for x in (q, k, v, at)]
        given += [*state, *(tvm.runtime.tensor(p) for p in self.params.values())]
        return list(vm["main"](*given))


def build(name: str, case: Case, rng: np.random.Generator, target: Target | None = None) -> Step:
    form = form_named(name)
    assert isinstance(form, Streaming)
    target = target or target_named("cpu")
    params = {
        n: (p.numpy() + 0.3 * rng.normal(size=p.shape)).astype("float32")
        for n, p in form.init_params(case.site).items()
    }
    c, kind = case, case.dtype
    named = {
        "q": ((c.B, c.H, c.T, c.D), kind), "k": ((c.B, c.G, c.T, c.D), kind),
        "v": ((c.B, c.G, c.T, c.E), kind), "position": ((c.B, c.T), "int64"),
        **{s.name: (s.shape, s.dtype) for s in form.state(case.site, LENGTH)},
        **{n: (p.shape, "float32") for n, p in params.items()},
    }  # fmt: skip
    variables = {n: relax.Var(n, relax.TensorType(*t)) for n, t in named.items()}
    states = [variables[s.name] for s in form.state(case.site, LENGTH)]
    builder = relax.BlockBuilder()
    with builder.function("main", list(variables.values())):
        with builder.dataflow():
            q, k, v, position = (variables[n] for n in ("q", "k", "v", "position"))
            weights = {n: variables[n] for n in params}
            out, new = form.step_kernel(
                Kit(builder, target), form.spec(case.site), weights, q, k, v, states, position
            )
            result = builder.emit_output(relax.Tuple([out, *new]))
        builder.emit_func_output(result)
    mod = builder.get()
    for gv, func in list(mod.functions_items()):
        if isinstance(func, tirx.PrimFunc):
            done = schedule(func, target)
            assert done.rule, done.crashes
            mod[gv] = done.func.with_attr("global_symbol", gv.name_hint)
    return Step(form, case, params, tvm.compile(mod, target=tvm.target.Target(dict(target.tvm))))


def tensors(c: Case, rng: np.random.Generator, tokens: int) -> tuple[np.ndarray, ...]:
    shapes = ((c.B, c.H, tokens, c.D), (c.B, c.G, tokens, c.D), (c.B, c.G, tokens, c.E))
    return tuple(rng.normal(size=s).astype(c.dtype) for s in shapes)


def states(step: Step, value: float) -> list[Any]:
    specs = step.form.state(step.case.site, LENGTH)
    return [tvm.runtime.tensor(np.full(s.shape, value, s.dtype)) for s in specs]


def reference(step: Step, q: Any, k: Any, v: Any) -> np.ndarray:
    wide = [torch.from_numpy(x).double() for x in (q, k, v)]
    params = {n: torch.from_numpy(p).double() for n, p in step.params.items()}
    return step.form.attend(step.form.spec(step.case.site), params, *wide).numpy()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_equal_float64(name: str, case: Case) -> None:
    rng = np.random.default_rng()
    step, number = build(name, case, rng), 140 // case.T
    q, k, v = tensors(case, rng, number * case.T)
    # A cache may hold anything behind the position; sums start from zero.
    state = states(step, np.nan if name == "exact" else 0.0)
    step(*(np.full_like(x[:, :, : case.T], np.nan) for x in (q, k, v)), states(step, np.nan), 0)
    outs = []
    for n in range(number):
        part = slice(n * case.T, (n + 1) * case.T)
        out, *new = step(q[:, :, part], k[:, :, part], v[:, :, part], state, n * case.T)
        outs.append(out.numpy())
        for old, fresh in zip(state, new, strict=True):  # changed in place
            np.testing.assert_array_equal(old.numpy(), fresh.numpy())
        state = new
    want = reference(step, q, k, v)
    np.testing.assert_allclose(np.concatenate(outs, 2), want, atol=3e-5, rtol=1e-5)


def test_half_precision_keeps_float32_sums() -> None:
    rng, case = np.random.default_rng(), Case(T=2, causal=True, dtype="float16")
    for name in ("exact", "elu"):
        step = build(name, case, rng)
        q, k, v = tensors(case, rng, 20)
        state, outs = states(step, 0.0), []
        for n in range(0, 20, 2):
            part = slice(n, n + 2)
            out, *state = step(q[:, :, part], k[:, :, part], v[:, :, part], state, n)
            outs.append(out.numpy())
        assert outs[0].dtype == np.float16
        np.testing.assert_allclose(np.concatenate(outs, 2), reference(step, q, k, v), atol=1e-2)


@pytest.mark.parametrize("name", FORMS)
def test_nan_in_one_head_stays_there(name: str) -> None:
    rng, case = np.random.default_rng(), Case(T=1, H=4, G=2, causal=True)
    step = build(name, case, rng)
    q, k, v = tensors(case, rng, 1)
    k[0, 0, 0, 3] = np.nan
    bad = np.isnan(step(q, k, v, states(step, 0.0), 0)[0].numpy())
    assert bad[0, :2].all()
    assert not bad[0, 2:].any()


@pytest.mark.parametrize("first", [10**6, -5])
def test_a_position_outside_stays_inside_the_buffers(first: int) -> None:
    rng, case = np.random.default_rng(), Case(T=3, causal=True)
    step = build("exact", case, rng)
    room = step.form.state(case.site, LENGTH)[1].shape[2]
    q, k, v = tensors(case, rng, 3)
    outs = [step(q, k, v, states(step, 0.0), at) for at in (first, max(0, min(first, room - 3)))]
    for wild, inside in zip(*outs, strict=True):
        np.testing.assert_array_equal(wild.numpy(), inside.numpy())


def test_a_gpu_has_no_kernel_for_it() -> None:
    with pytest.raises(LoweringError, match="compile for a processor"):
        build("elu", CASES[0], np.random.default_rng(), target_named("cuda:sm_90"))

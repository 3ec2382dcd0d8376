"""Build and run one form's kernels alone (for tests, verification and tuning)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, tirx

from codegen import tvm_env  # noqa: F401  (TVM's threads, before its pool is made)
from codegen.count import count
from codegen.graph_passes.attention_pairs import attention_pairs
from codegen.kit import Kit
from codegen.schedule import schedule
from codegen.target import Target
from passes.errors import LoweringError
from passes.form import Form, FormSpec
from passes.opcount import OpCount

Array = NDArray[Any]


def pool_threads() -> int:
    """Threads with which built forms run in the calling thread: TVM_NUM_THREADS, else every usable
    core."""
    return int(tvm.runtime.num_threads())


@dataclass(frozen=True)
class Kernel:
    """One kernel of a built form: its name, the rule that scheduled it, its operations."""

    name: str
    scheduled_by: str
    ops: OpCount


@dataclass(frozen=True)
class BuiltForm:
    """A compiled one-site module; `kernels` in order of definition (not of call)."""

    kernels: tuple[Kernel, ...]
    calls: tuple[str, ...]
    library: Any
    scheduled: Mapping[str, Any]

    @property
    def ops(self) -> OpCount:
        """Operations of one run: each call counts."""
        by_name = {k.name: k.ops for k in self.kernels}
        total = OpCount()
        for name in self.calls:
            total = total + by_name[name]
        return total


def build_form(
    form: Form,
    spec: FormSpec,
    params: Mapping[str, Array],
    arrays: Mapping[str, Array],
    target: Target,
    precision: str = "fp32",
) -> BuiltForm:
    """Lower `form` at one site with the shapes and types of `arrays` (q, k, v, key_mask, bias).

    `precision` is what a model around it would be compiled in (codegen/precision.py).
    """
    builder = relax.BlockBuilder()
    given = {**arrays, **{f"param.{n}": a for n, a in params.items()}}
    variables = {
        n: relax.Var(n.replace(".", "_"), relax.TensorType(a.shape, str(a.dtype)))
        for n, a in given.items()
    }
    with builder.function("main", list(variables.values())):
        with builder.dataflow():
            kit = Kit(builder, target)
            out = form.kernel(
                kit,
                spec,
                {n: variables[f"param.{n}"] for n in params},
                *(variables.get(n) for n in ("q", "k", "v", "key_mask", "bias")),
            )
            result = builder.emit_output(out)
        builder.emit_func_output(result)
    # Producers that the kit fused into their readers are left over.
    mod = relax.transform.DeadCodeElimination()(builder.get())
    return _finish(attention_pairs(mod, target, precision), target)


def _finish(mod: Any, target: Target) -> BuiltForm:
    kernels, calls, scheduled = [], [], {}
    for gv, func in list(mod.functions_items()):
        if not isinstance(func, tirx.PrimFunc):
            continue
        outcome = schedule(func, target)
        if not outcome.rule:
            raise LoweringError(f"no rule took the kernel {gv.name_hint}: {outcome.crashes}")
        kernels.append(Kernel(gv.name_hint, outcome.rule, count(func)))
        scheduled[gv.name_hint] = outcome.func
        mod[gv] = outcome.func.with_attr("global_symbol", gv.name_hint)
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call) and value.op == tvm.ir.Op.get("relax.call_tir"):
                calls.append(value.args[0].name_hint)
    library = tvm.compile(mod, target=tvm.target.Target(dict(target.tvm)))
    return BuiltForm(tuple(kernels), tuple(calls), library, scheduled)


def run_built(built: BuiltForm, arrays: Mapping[str, Array], params: Mapping[str, Array]) -> Array:
    """Run with the arrays it was built for (in the same order).

    A first run on NaN fills the memory pools, from which the second gets its buffers: a value a
    kernel forgets to write shows as NaN.
    """
    vm = relax.VirtualMachine(built.library, tvm.cpu())
    values = (*arrays.values(), *params.values())
    spoiled = [np.full_like(a, np.nan) if a.dtype.kind == "f" else a for a in values]
    vm["main"](*(tvm.runtime.tensor(a) for a in spoiled))
    result: Array = vm["main"](*(tvm.runtime.tensor(a) for a in values)).numpy()
    return result


def run_form(
    form: Form,
    spec: FormSpec,
    params: Mapping[str, Array],
    arrays: Mapping[str, Array],
    target: Target,
) -> Array:
    """The output [B, H, T, E] of `form` compiled alone for `target` and run once.

    `arrays`: q, k, v and, where used, key_mask and bias; `params` the form's parameters.
    """
    return run_built(build_form(form, spec, params, arrays, target), arrays, params)


class Running:
    """A built form with its inputs on the device; each call is one run."""

    def __init__(
        self, built: BuiltForm, arrays: Mapping[str, Array], params: Mapping[str, Array]
    ) -> None:
        self._main = relax.VirtualMachine(built.library, tvm.cpu())["main"]
        self._values = [tvm.runtime.tensor(a) for a in (*arrays.values(), *params.values())]

    def __call__(self) -> float:
        """Seconds of one run."""
        start = time.perf_counter()
        self._main(*self._values)
        return time.perf_counter() - start

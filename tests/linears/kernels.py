"""Build and run the kernel of one linear form alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import tvm
from tvm import relax, tirx

from codegen.count import count
from codegen.kit_linear import LinearKit
from codegen.schedule import schedule
from codegen.target import Target, target_named
from passes.linear_form import LinearForm, LinearSpec
from passes.opcount import OpCount


def lowered(
    form: LinearForm,
    spec: LinearSpec,
    packed: dict[str, torch.Tensor],
    shape: tuple[int, ...],
    target: Target | None = None,
) -> Any:
    """The unscheduled module: "main" takes x and the packed tensors in order."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    given = {
        n: relax.Var(n, relax.TensorType(t.shape, str(t.dtype).removeprefix("torch.")))
        for n, t in packed.items()
    }
    with builder.function("main", [x, *given.values()]):
        with builder.dataflow():
            kit = LinearKit(builder, target or target_named("cpu"))
            out = builder.emit_output(form.kernel(kit, spec, given, x))
        builder.emit_func_output(out)
    return builder.get()


def counted(
    form: LinearForm, spec: LinearSpec, packed: dict[str, torch.Tensor], rows: int
) -> OpCount:
    """Operations of the unscheduled kernels on `rows` rows."""
    ops = OpCount()
    for func in lowered(form, spec, packed, (rows, spec.inputs)).functions.values():
        if isinstance(func, tirx.PrimFunc):
            ops = ops + count(func)
    return ops


def run(
    form: LinearForm,
    spec: LinearSpec,
    packed: dict[str, torch.Tensor],
    x: torch.Tensor,
    target: Target | None = None,
) -> tuple[torch.Tensor, list[str]]:
    """(output, rules that scheduled); the first run is on NaN and spoils buffers."""
    return run_many(form, spec, packed, [x], target)[0]


def run_many(
    form: LinearForm,
    spec: LinearSpec,
    packed: dict[str, torch.Tensor],
    inputs: list[torch.Tensor],
    target: Target | None = None,
) -> list[tuple[torch.Tensor, list[str]]]:
    """As `run`, for several inputs of one shape."""
    target, shape = target or target_named("cpu"), tuple(inputs[0].shape)
    mod = lowered(form, spec, packed, shape, target)
    rules = []
    for name, func in list(mod.functions_items()):
        if isinstance(func, tirx.PrimFunc):
            outcome = schedule(func, target)
            assert not outcome.crashes, outcome.crashes
            rules.append(outcome.rule)
            mod[name] = outcome.func.with_attr("global_symbol", name.name_hint)
    built = tvm.compile(mod, target=tvm.target.Target(dict(target.tvm)))
    main = relax.VirtualMachine(built, tvm.cpu())["main"]
    tensors = [tvm.runtime.tensor(t.numpy()) for t in packed.values()]
    main(tvm.runtime.tensor(np.full(shape, np.nan, np.float32)), *tensors)
    return [
        (torch.from_numpy(main(tvm.runtime.tensor(x.numpy()), *tensors).numpy()), rules)
        for x in inputs
    ]

"""Helpers: compile a module in process and run it by TVM's virtual machine."""

from typing import Any

import numpy as np
import torch

from codegen.build import compile_vm
from codegen.frontend import to_relax
from codegen.lower import Lowered, lower
from codegen.target import Target, target_named


def lowered(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    target: Target | None = None,
    exported: torch.export.ExportedProgram | None = None,
) -> Lowered:
    target = target or target_named("cpu")
    exported = exported or torch.export.export(module.eval(), args)
    return lower(to_relax(exported, target), target)


def run(result: Lowered, args: tuple[Any, ...], target: Target | None = None) -> list[np.ndarray]:
    import tvm
    from tvm import relax

    executable = compile_vm(result, target or target_named("cpu"))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    values = [a.numpy() for a in args if isinstance(a, torch.Tensor)]
    given = [tvm.runtime.tensor(v) for v in (*values, *result.weights.values())]
    out = machine["main"](*given)
    return [o.numpy() for o in (out if len(result.outputs) > 1 or _many(out) else [out])]


def _many(out: Any) -> bool:
    return not hasattr(out, "numpy")


def check(module: torch.nn.Module, *args: Any, tolerance: float = 1e-4) -> Lowered:
    """Compile, run, compare with float64 torch; every kernel must have a rule."""
    result = lowered(module, args)
    wide = tuple(
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    )
    got = run(result, args)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    with torch.no_grad():
        wanted = module.double()(*wide)
    module.float()
    module.load_state_dict(state)
    leaves = [x for x in torch.utils._pytree.tree_leaves(wanted) if isinstance(x, torch.Tensor)]
    assert len(got) == len(leaves) == len(result.outputs)
    for have, want, spec in zip(got, leaves, result.outputs, strict=True):
        assert have.shape == tuple(want.shape) == spec.shape
        np.testing.assert_allclose(have, want.numpy(), atol=tolerance, rtol=tolerance)
    assert all(k.scheduled_by for k in result.kernels), result.kernels
    return result

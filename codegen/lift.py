"""Takes the big constants out of a module and makes them trailing parameters of "main"."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

# Smaller constants stay in the code: a parameter costs more than it saves.
SMALLEST_BYTES = 256


def lift_constants(mod: Any) -> tuple[Any, dict[str, NDArray[Any]]]:
    """(module whose "main" takes (inputs..., weights...), weights by parameter name, in order).

    Constants equal in dtype, shape and content become one weight.
    """
    lifter = _Lifter(mod)
    main = mod["main"]
    body = lifter.visit_expr(main.body)
    params = [*main.params, *lifter.params.values()]
    attrs = {**dict(main.attrs or {}), "num_input": len(main.params)}
    lifted = relax.Function(params, body, main.ret_ty, main.is_pure).with_attrs(attrs)
    mod = lifter.builder_.get()
    mod.update_func(mod.get_global_var("main"), lifted)
    return mod, lifter.weights


@mutator
class _Lifter(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: Any) -> None:
        super().__init__(mod)
        self.params: dict[str, Any] = {}
        self.weights: dict[str, NDArray[Any]] = {}

    def visit_generic_const_(self, constant: Any) -> Any:
        array = np.from_dlpack(constant.value) if _plain(constant) else constant.value.numpy()
        if array.nbytes < SMALLEST_BYTES:
            return constant
        content = hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16)
        content.update(f"{array.dtype}{array.shape}".encode())
        key = content.hexdigest()
        if key not in self.params:
            name = f"weight_{len(self.params)}"
            self.params[key] = relax.Var(name, constant.ty)
            self.weights[name] = constant.value.numpy()
        return self.params[key]


def _plain(constant: Any) -> bool:
    return str(constant.ty.dtype) in ("float32", "int64", "int32")

"""One module with several functions over the same weights, out of modules lowered one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, tirx
from tvm.relax.expr import _update_type
from tvm.relax.expr_functor import PyExprMutator, mutator

from codegen.lower import Lowered


def merge(parts: Mapping[str, Lowered]) -> Lowered:
    """The parts' "main" functions as functions of those names, each (inputs..., all weights...).

    Equal weights become one. Inputs and outputs of the result are those of the first part, the
    kernels those of all, with the part's name before theirs.
    """
    weights: dict[str, NDArray[Any]] = {}
    known: dict[str, str] = {}
    names: dict[str, list[str]] = {}  # part -> its weights' names in the whole
    for part, lowered in parts.items():
        names[part] = []
        for array in lowered.weights.values():
            name = known.setdefault(_content(array), f"weight_{len(weights)}")
            weights.setdefault(name, array)
            names[part].append(name)
    mod = tvm.IRModule()
    for part, lowered in parts.items():
        _take(mod, part, lowered, names[part], weights)
    first, every = next(iter(parts.values())), parts.items()
    kernels = [replace(k, name=f"{part}_{k.name}") for part, low in every for k in low.kernels]
    notes = tuple(dict.fromkeys(note for low in parts.values() for note in low.notes))
    return Lowered(mod, weights, first.inputs, first.outputs, kernels, notes)


def _content(array: NDArray[Any]) -> str:
    content = hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16)
    return f"{content.hexdigest()} {array.dtype} {array.shape}"


def _take(
    mod: Any, part: str, lowered: Lowered, own: list[str], weights: Mapping[str, NDArray[Any]]
) -> None:
    """Add the functions of `lowered`, renamed, to `mod`."""
    renamed = {}
    for var, func in lowered.mod.functions_items():
        if isinstance(func, tirx.PrimFunc):
            name = f"{part}_{var.name_hint}"
            renamed[var.name_hint] = tvm.ir.GlobalVar(name)
            _update_type(renamed[var.name_hint], var.ty)
            mod.update_func(renamed[var.name_hint], func.with_attr("global_symbol", name))
    main = _Renamer(renamed).visit_expr(lowered.mod["main"])
    count = len(lowered.inputs)
    params = dict(zip(own, main.params[count:], strict=True))
    every = [
        params[name]
        if name in params
        else relax.Var(name, relax.TensorType(array.shape, array.dtype.name))
        for name, array in weights.items()
    ]
    attrs = {**dict(main.attrs or {}), "global_symbol": part, "num_input": count}
    whole = relax.Function([*main.params[:count], *every], main.body, main.ret_ty, main.is_pure)
    mod.update_func(tvm.ir.GlobalVar(part), whole.with_attrs(attrs))


@mutator
class _Renamer(PyExprMutator):  # type: ignore[misc]
    """Calls of renamed functions."""

    def __init__(self, renamed: Mapping[str, Any]) -> None:
        super().__init__()
        self.renamed = renamed

    def visit_global_var_(self, var: Any) -> Any:
        return self.renamed.get(var.name_hint, var)

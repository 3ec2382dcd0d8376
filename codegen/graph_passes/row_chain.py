"""Linear layers one behind the other become one kernel where their rows are many.

A chain (codegen/kernels/row_chain.py) is a norm, a linear layer, an activation, a second linear
layer and an addition, in this order; all but one linear layer may be missing. What lies between
is read by nothing else. Few rows stay in the caches from one kernel to the next, and large weights
would pass by too often, so neither makes a chain.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import ir, relax
from tvm.relax.expr_functor import PyExprMutator, PyExprVisitor, mutator, visitor

from codegen.kernels import dense, row_chain
from codegen.kernels.attention import attributes
from codegen.kernels.row_chain import ACTIVATIONS, ChainFacts, Layer
from codegen.legalize import as_constant, dtype_of
from codegen.target import Target

# Bytes of a chain's largest tensor from which the caches do not hold it.
LARGE = 8 * 1024 * 1024
# Parts of a core's second-level cache. Several operators are one kernel even of fewer rows if their
# input is large beside it and their weights are not.
_PART, _NEAR = 0.5, 1.25
# How often that tensor is as large as the weights, which pass by once for each block of rows.
_TIMES = 4
_NORMS = {"relax.nn.layer_norm": "layer_norm", "relax.nn.rms_norm": "rms_norm"}
_ELEMENTWISE = {*ACTIVATIONS, "relax.add", "relax.subtract", "relax.multiply", "relax.divide"}


def row_chains(mod: Any, target: Target, precision: str = "fp32") -> Any:
    """`mod` with the chains of "main" as kernels of rule ``row_chain`` (float32, processors)."""
    if target.kind == "gpu" or precision != "fp32":
        return mod
    chains = _Finder(mod["main"], target).chains()
    if not chains:
        return mod
    rewriter = _Replacer(mod, chains, target)
    main = rewriter.visit_expr(mod["main"])
    rewriter.builder_.update_func(mod.get_global_var("main"), main)
    return relax.transform.DeadCodeElimination()(rewriter.builder_.get())


@dataclass
class _Weight:
    """A weight [N, K]: a constant, or its transpose; `factor` [N] of its rows or None."""

    constant: Any
    transposed: bool
    factor: NDArray[Any] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(_shape(self.constant))
        return shape[::-1] if self.transposed else shape

    def packed(self, width: int) -> Any:
        """As a constant in panels of `width` columns."""
        array = self.constant.value.numpy()
        array = array.T if self.transposed else array
        array = array if self.factor is None else array * self.factor[:, None]
        return relax.const(dense.pack(np.ascontiguousarray(array), width))


@dataclass
class _Chain:
    """A chain while it grows. `last` is the variable it ends in, `rest` its inputs after x."""

    x: Any
    last: Any
    layers: list[Layer] = field(default_factory=list)
    weights: list[_Weight] = field(default_factory=list)
    rest: list[Any] = field(default_factory=list)
    products: list[Any] = field(default_factory=list)

    def pays(self, target: Target) -> bool:
        """Whether memory or another core's cache is spared by keeping rows where they are."""
        rows, depth = math.prod(_shape(self.x)[:-1]), _shape(self.x)[-1]
        values = rows * max([depth, *(w.shape[0] for w in self.weights)])
        weights = sum(math.prod(w.shape) for w in self.weights)
        if 4 * values >= LARGE and values >= _TIMES * weights:
            return True
        several = len(self.layers) == 2 or self.layers[0].norm != ""
        passed = 4 * rows * depth >= _PART * target.l2_bytes
        return several and passed and 4 * weights <= _NEAR * target.l2_bytes


def _shape(value: Any) -> list[int]:
    return [int(d) for d in value.ty.shape]


def _name(value: Any) -> str:
    return str(getattr(getattr(value, "op", None), "name", ""))


def _could_be_weight(value: Any) -> bool:
    matrix = isinstance(value, ir.GenericConst) and value.ty.ndim == 2
    return matrix and dtype_of(value) == "float32"


def _identity(constant: Any) -> int:
    """Equal for constants that share their data (a tied weight is bound twice)."""
    return int(np.from_dlpack(constant.value).ctypes.data)


@visitor
class _Graph(PyExprVisitor):  # type: ignore[misc]
    """What each variable of a function is, and which variables are made of it."""

    def __init__(self) -> None:
        self.values: dict[Any, Any] = {}
        self.readers: dict[Any, list[Any]] = defaultdict(list)
        self.constants: Counter[int] = Counter()  # how often each matrix is read

    def visit_var_binding_(self, binding: Any) -> None:
        self.values[binding.var] = binding.value
        self._read(binding.value, binding.var)

    def _read(self, value: Any, reader: Any) -> None:
        if isinstance(value, relax.Var):
            self.readers[value].append(reader)
        if _could_be_weight(value):
            self.constants[_identity(value)] += 1
        for part in getattr(value, "args", None) or getattr(value, "fields", None) or ():
            self._read(part, reader)
        if isinstance(value, relax.TupleGetItem):
            self._read(value.tuple_value, reader)

    def visit_seq_expr_(self, op: Any) -> None:
        super().visit_seq_expr_(op)
        self._read(op.body, None)


class _Finder:
    """The chains of a function."""

    def __init__(self, main: Any, target: Target) -> None:
        self.target, self.width = target, dense.panel_width(target)
        graph = _Graph()
        graph.visit_expr(main)
        self.values, self.readers = graph.values, graph.readers
        self.constants = graph.constants

    def chains(self) -> dict[Any, _Chain]:
        """Chains that pay, by the variables they end in; no two share an operator."""
        found: dict[Any, _Chain] = {}
        within: set[Any] = set()
        for var in self.values:
            if var in within or self._weight(var) is None:
                continue
            chain = self._grown(var)
            if chain.pays(self.target) and not (
                len(chain.layers) == 1 and self._joined(chain.last)
            ):
                found[chain.last] = chain
                within.update(chain.products)
        return found

    def _grown(self, product: Any) -> _Chain:
        """The chain whose first product is `product`."""
        x = self.values[product].args[0]
        norm = self._norm(x)
        if norm is not None and self._only_reader(x) is None:
            norm = None
        chain = _Chain(x if norm is None else norm.args[0], product)
        self._take_layer(chain, product, norm)
        following = self._only_reader(chain.last)
        if self._reads(following, chain.last):
            self._take_layer(chain, following)
        self._take_addition(chain)
        return chain

    def _take_layer(self, chain: _Chain, product: Any, norm: Any = None) -> None:
        """The product, with its norm, and a bias, a factor and an activation behind it."""
        weight = self._weight(product)
        assert weight is not None
        chain.last, bias = product, None
        while (found := self._vector(chain.last, weight.shape[0])) is not None:
            following, kind, vector = found
            if kind == "relax.add":
                bias = vector if bias is None else bias + vector
            else:
                factor, bias = weight.factor, None if bias is None else bias * vector
                weight = replace(weight, factor=vector if factor is None else factor * vector)
            chain.last = following
        following, act = self._only_reader(chain.last), ""
        if _name(self._value(following)) in ACTIVATIONS:
            chain.last, act = following, _name(self.values[following])
        kind, eps = ("", 0.0) if norm is None else (_NORMS[_name(norm)], float(norm.attrs.epsilon))
        chain.rest += [*(() if norm is None else norm.args[1:]), weight]
        chain.rest += [] if bias is None else [relax.const(bias)]
        chain.layers.append(Layer(kind, eps, bias is not None, act))
        chain.weights.append(weight)
        chain.products.append(product)

    def _vector(self, var: Any, columns: int) -> tuple[Any, str, NDArray[Any]] | None:
        """What only reads `var`, the sum or product with a constant [N]: itself, kind, constant."""
        following = self._only_reader(var)
        kind = _name(self._value(following))
        if kind not in ("relax.add", "relax.multiply"):
            return None
        others = self._others(following, var)
        array = as_constant(others[0]) if len(others) == 1 else None
        whole = array is not None and array.shape == (columns,)
        return (following, kind, array) if whole and array is not None else None

    def _take_addition(self, chain: _Chain) -> None:
        """The sum of the chain and one other tensor of the same shape."""
        following = self._only_reader(chain.last)
        if _name(self._value(following)) != "relax.add":
            return
        others = self._others(following, chain.last)
        same = len(others) == 1 and isinstance(others[0], relax.Var)
        if not same or _shape(others[0]) != _shape(chain.last):
            return
        normed = chain.layers[0].norm != "" and others[0].same_as(chain.x)
        chain.rest += [] if normed else others
        chain.layers[-1] = replace(chain.layers[-1], add="normed" if normed else "given")
        chain.last = following

    def _joined(self, var: Any) -> bool:
        """Whether something elementwise follows, which a product alone would take with it."""
        return _name(self._value(self._only_reader(var))) in _ELEMENTWISE

    def _norm(self, var: Any) -> Any | None:
        """The norm along the last axis that `var` is."""
        value = self._value(var)
        if _name(value) not in _NORMS or not isinstance(value.args[0], relax.Var):
            return None
        rank = value.args[0].ty.ndim
        return value if [int(a) % rank for a in value.attrs.axes] == [rank - 1] else None

    def _value(self, var: Any) -> Any:
        """What a variable of the function is; None for anything else."""
        return self.values.get(var)

    def _reads(self, var: Any, x: Any) -> bool:
        """Whether `var` is a product of x with a weight."""
        return self._weight(var) is not None and self.values[var].args[0].same_as(x)

    def _others(self, var: Any, one: Any) -> list[Any]:
        """The operands of `var` beside `one`."""
        return [a for a in self.values[var].args if not a.same_as(one)]

    def _only_reader(self, var: Any) -> Any:
        """The variable made of `var`, if nothing else reads it."""
        readers = self.readers.get(var, [])
        return readers[0] if len(readers) == 1 else None

    def _weight(self, var: Any) -> _Weight | None:
        """The weight, of this product alone, if `var` is a float32 product that fills panels."""
        value = self._value(var)
        if _name(value) != "relax.matmul" or not isinstance(value.args[0], relax.Var):
            return None
        x, y = value.args
        made = self._value(y)
        turned = _name(made) == "relax.permute_dims"
        constant = made.args[0] if turned else y
        if not _could_be_weight(constant) or dtype_of(x) != "float32" or x.ty.ndim < 2:
            return None
        weight = _Weight(constant, transposed=not turned)
        own = self.constants[_identity(constant)] == 1 and (
            not turned or self._only_reader(y) is not None
        )
        return weight if own and weight.shape[0] % self.width == 0 else None


@mutator
class _Replacer(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: Any, chains: dict[Any, _Chain], target: Target) -> None:
        super().__init__(mod)
        self.chains, self.target = chains, target
        self.rows: dict[Any, Any] = {}  # tensors [R, N], by what they are otherwise

    def visit_var_binding_(self, binding: Any) -> None:
        chain = self.chains.get(binding.var)
        if chain is None:
            super().visit_var_binding_(binding)
        else:
            self.set_var_remap(binding.var, self._kernel(chain, _shape(binding.var)))

    def _kernel(self, chain: _Chain, shape: list[int]) -> Any:
        facts, width = ChainFacts(tuple(chain.layers)), dense.panel_width(self.target)
        args = [
            a.packed(width) if isinstance(a, _Weight) else self._flat(self.visit_expr(a))
            for a in (chain.x, *chain.rest)
        ]
        made = self.builder_.emit_te(
            lambda *given: row_chain.define(facts, self.target, *given),
            *args,
            primfunc_name_hint=row_chain.NAME,
            primfunc_attrs=attributes(row_chain.NAME, facts.to_json()),
        )
        self.rows[result := self._shaped(made, shape)] = made
        return result

    def _flat(self, value: Any) -> Any:
        """Rows of a tensor; vectors as they are."""
        *lead, width = _shape(value)
        if not lead:
            return value
        if value not in self.rows:
            self.rows[value] = self._shaped(value, [math.prod(lead), width])
        return self.rows[value]

    def _shaped(self, value: Any, shape: list[int]) -> Any:
        same = _shape(value) == list(shape)
        return value if same else self.builder_.emit(relax.op.reshape(value, shape))

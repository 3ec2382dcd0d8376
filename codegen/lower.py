"""From a Relax module to scheduled TensorIR, with the weights lifted out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, tirx

from codegen import legalize, tvm_env
from codegen.frontend import Imported
from codegen.graph_passes.attention_pairs import attention_pairs
from codegen.graph_passes.channels_last import channels_last
from codegen.graph_passes.row_chain import row_chains
from codegen.kernel_cache import Entry, KernelCache, key_of
from codegen.lift import lift_constants
from codegen.memory import Memory, planned
from codegen.precision import require
from codegen.prepack import prepack
from codegen.schedule import Outcome, Tuned, refuse, schedule
from codegen.specs import TensorSpec
from codegen.target import Target
from passes.opcount import OpCount

Progress = Callable[..., None]
_CALLS = ("relax.call_tir", "relax.call_tir_inplace")


@dataclass(frozen=True)
class KernelInfo:
    """One kernel: who scheduled it ("" nobody, "tuned", or a rule), its operations, its calls.

    `ops` are those of one call; None where they can not be counted.
    """

    name: str
    scheduled_by: str
    ops: OpCount | None = None
    count: int = 1

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "ops": None if self.ops is None else self.ops.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KernelInfo:
        """Inverse of `to_json`."""
        ops = data["ops"]
        return cls(**{**data, "ops": None if ops is None else OpCount.from_json(ops)})


@dataclass(frozen=True)
class Lowered:
    """Scheduled code before it is built. "main" takes (inputs..., weights...).

    `unscheduled` is the module as it was before any kernel was scheduled (for tuning). With a
    kernel cache, `key` names the code there, and where it was found `code` is the built library
    and `mod` is None: nothing was scheduled.
    """

    mod: Any
    weights: dict[str, NDArray[Any]]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    kernels: list[KernelInfo]
    notes: tuple[str, ...] = ()
    unscheduled: Any = field(default=None, repr=False)
    key: str = ""
    code: bytes | None = field(default=None, repr=False)
    crashes: tuple[str, ...] = ()
    memory: Memory | None = None

    def facts(self) -> dict[str, Any]:
        """What the kernel cache keeps beside the code."""
        return {
            "kernels": [k.to_json() for k in self.kernels],
            "crashes": list(self.crashes),
            "memory": None if self.memory is None else self.memory.to_json(),
        }


def lower(
    imported: Imported,
    target: Target,
    *,
    tuned: Tuned | None = None,
    allow_unscheduled: bool = False,
    progress: Progress | None = None,
    cache: KernelCache | None = None,
    precision: str = "fp32",
) -> Lowered:
    """Lower to scheduled TensorIR, products with weights in `precision` (codegen/precision.py).

    Softmax attention is in bfloat16 where `attention_pairs` says so.

    `tuned(func, target)` is asked first for every kernel and returns a schedule or None. What is
    found in `cache` is taken from there; tuned kernels are looked up as they were scheduled,
    because a record is applied only if it is faster now.

    Raises:
        LoweringError: a kernel no rule takes, unless `allow_unscheduled`.
        UsageError: the target has no code for `precision`.
    """
    require(precision, target)
    with tvm_env.lowering_for(target):
        mod, weights = fuse(imported.mod, target, precision)
        key = ""
        if cache is not None and tuned is None:
            key = key_of(mod, target, allow_unscheduled=allow_unscheduled)
            if (known := cache.get(key)) is not None:
                return _found(imported, mod, weights, key, known)
        outcomes = _schedule_all(mod, target, tuned, progress)
        if not allow_unscheduled:
            refuse({name: o for name, o in outcomes.items() if not o.rule})
        kernels = _kernels(mod, outcomes)
        replaced = _replaced(mod, outcomes)
        code = None
        if cache is not None and tuned is not None:
            key = key_of(replaced, target, tuned=True)
            known = cache.get(key)
            code = None if known is None else known.code
        scheduled = _finish(replaced)
    crashes = tuple(f"{name}: rule {c}" for name, o in outcomes.items() for c in o.crashes)
    return Lowered(
        scheduled,
        weights,
        imported.inputs,
        imported.outputs,
        kernels,
        (*imported.notes, *crashes),
        mod,
        key,
        code,
        crashes,
        planned(scheduled, weights),
    )


def _found(imported: Imported, mod: Any, weights: Any, key: str, known: Entry) -> Lowered:
    """What the cache holds, with the weights and specs of this model."""
    crashes = tuple(known.facts["crashes"])
    return Lowered(
        None,
        weights,
        imported.inputs,
        imported.outputs,
        [KernelInfo.from_json(k) for k in known.facts["kernels"]],
        (*imported.notes, *crashes),
        mod,
        key,
        known.code,
        crashes,
        Memory.from_json(known.facts["memory"]),
    )


def fuse(mod: Any, target: Target, precision: str = "fp32") -> tuple[Any, dict[str, NDArray[Any]]]:
    """The module with packed products, lowered and fused operators; and the lifted weights.

    Call it inside `lowering_for(target)`.
    """
    legalize.install()
    t = relax.transform
    mod = channels_last(t.DecomposeOpsForInference()(mod), target)
    mod = row_chains(mod, target, precision)
    mod = attention_pairs(prepack(mod, target, precision), target, precision)
    before = [
        t.CanonicalizeBindings(),
        relax.backend.DispatchSampling(),
        relax.backend.DispatchSortScan(),
        t.LegalizeOps(),
        t.FoldConstant(),
        t.DeadCodeElimination(),
    ]
    mod, weights = lift_constants(tvm.transform.Sequential(before)(mod))
    after = [
        t.AnnotateTIROpPattern(),
        t.FuseOps(),
        t.FuseTIR(),
        # While kernels still look like reshapes: those become views and cost nothing.
        t.RewriteDataflowReshape(),
        t.DeadCodeElimination(),
    ]
    return tvm.transform.Sequential(after)(mod), weights


def _primfuncs(mod: Any) -> dict[str, Any]:
    found = {gv.name_hint: f for gv, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)}
    return dict(sorted(found.items()))


def _schedule_all(
    mod: Any, target: Target, tuned: Tuned | None, progress: Progress | None
) -> dict[str, Outcome]:
    funcs = _primfuncs(mod)
    outcomes = {}
    for done, (name, func) in enumerate(funcs.items()):
        if progress is not None:
            progress(f"schedule {name}", done, len(funcs))
        outcomes[name] = schedule(func, target, tuned)
    return outcomes


def _replaced(mod: Any, outcomes: dict[str, Outcome]) -> Any:
    scheduled = mod.clone()
    for name, outcome in outcomes.items():
        if outcome.rule:
            scheduled.update_func(mod.get_global_var(name), outcome.func)
    return scheduled


def _finish(mod: Any) -> Any:
    t = relax.transform
    return tvm.transform.Sequential(
        [
            t.ToNonDataflow(),
            t.RemovePurityChecking(),
            t.CallTIRRewrite(),
            t.StaticPlanBlockMemory(),
        ]
    )(mod)


def _kernels(mod: Any, outcomes: dict[str, Outcome]) -> list[KernelInfo]:
    calls: Counter[str] = Counter()

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.Call) and getattr(expr.op, "name", "") in _CALLS:
            calls[expr.args[0].name_hint] += 1

    relax.analysis.post_order_visit(mod["main"], visit)
    funcs = _primfuncs(mod)
    return [
        KernelInfo(name, outcome.rule, _count(funcs[name]), calls[name])
        for name, outcome in outcomes.items()
        if calls[name]
    ]


def _count(func: Any) -> OpCount | None:
    try:
        from codegen.count import count
    except ImportError:
        return None
    try:
        counted: OpCount = count(func)
    except (ValueError, TypeError, NotImplementedError):
        return None
    return counted


def example_inputs(lowered: Lowered, seed: int = 0) -> list[NDArray[Any]]:
    """Random inputs that fit the specs, for checks and timings."""
    rng = np.random.default_rng(seed)
    made = []
    for spec in lowered.inputs:
        if spec.dtype.startswith("float"):
            made.append(rng.standard_normal(spec.shape).astype(spec.dtype))
        else:
            high = 1 if spec.high is None else spec.high
            made.append(rng.integers(0, high + 1, spec.shape).astype(spec.dtype))
    return made

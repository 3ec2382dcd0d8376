"""Which schedules of a kernel are tried: MetaSchedule's search over its space and over ours.

Two design spaces take turns: what MetaSchedule's own rules for processors make, bred by its
evolutionary search; and the schedule of the rule in codegen/schedules/ with every exact split
turned into a sampled one, which starts from what is already good. The second is bred here, because
MetaSchedule's search stops with an internal error when a sampled size changes how many loops the
rule meets afterwards.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import tvm
import tvm.s_tir as st
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule import _ffi_api

from codegen import tvm_env
from codegen.schedule import rules, schedule, workload_key
from codegen.target import Target

_MARK = "rewriter.loop"
# A sampled register tile may be at most so many times the rule's: code size grows with it.
_GROWTH = 2
_PARENTS, _ATTEMPTS, _BATCH = 6, 40, 4
# How often a variant also exchanges two loops of the rule's order.
_SWAPS = 0.3


def plain(value: Any) -> Any:
    """TVM's containers as Python's: a trace that json can write."""
    if isinstance(value, str) or value is None:
        return None if value is None else str(value)
    if isinstance(value, bool | int | float):
        return value
    if hasattr(value, "value") and not isinstance(value, Iterable):
        return value.value
    if hasattr(value, "items"):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value]


def trace_json(sch: Any) -> Any:
    """A schedule's trace as plain data."""
    return plain(sch.trace.as_json())


def trace_name(trace: Any) -> str:
    """A short name that equal traces share."""
    return hashlib.sha256(json.dumps(trace, sort_keys=True).encode()).hexdigest()[:16]


def replay(func: Any, trace: Any, seed: int | None = None) -> Any:
    """The schedule a trace makes of `func`; raises what TVM raises if it does not fit.

    Decisions the trace lacks are sampled with `seed`.
    """
    sch = st.Schedule(workload(func), seed=seed)
    st.Trace.apply_json_to_schedule(trace, sch)
    return sch


def workload(func: Any) -> Any:
    """`func` as the module MetaSchedule works on: one function called main.

    A deep copy: a trace that starts with an annotation would otherwise be written into `func`.
    """
    bare = st.renew_defs(func).with_attr("global_symbol", "main").with_attr("tirx.noalias", True)
    return tvm.IRModule({"main": bare})


def default_trace(func: Any, target: Target) -> Any | None:
    """The trace of the rule that schedules `func` by default.

    None where the rule writes a kernel anew instead of transforming the one it is given.
    """
    with tvm_env.lowering_for(target):
        name = schedule(func, target).rule
        rule = next((r for r in rules() if r.name == name), None)
        sch = rule.apply(workload(func)["main"], target) if rule is not None else None
    if sch is None or getattr(sch, "trace", None) is None:
        return None
    trace = trace_json(sch)
    same = workload_key(replay(func, trace).mod["main"]) == workload_key(sch.mod["main"])
    return trace if same else None


def sampled(func: Any, trace: Any) -> Any | None:
    """`trace` with its exact splits sampled (decided as they were); None if it has none.

    Splits that leave a rest stay as they are.
    """
    insts, decisions = trace
    made: list[Any] = []
    moved: dict[int, int] = {}
    chosen: list[Any] = []
    for at, inst in enumerate(insts):
        factors = _factors(func, trace, at) if inst[0] == "Split" else None
        if factors is not None:
            names = [f"v{10_000 + 10 * at + i}" for i in range(len(factors))]
            made.append(["SamplePerfectTile", [inst[1][0]], [len(factors), _most(inst, factors)],
                         names])  # fmt: skip
            chosen.append([len(made) - 1, factors])
            inst = [inst[0], [inst[1][0], *names], *inst[2:]]
        moved[at] = len(made)
        made.append(inst)
    if not chosen:
        return None
    kept = [[moved[int(at)], value] for at, value in decisions]
    return [made, sorted([*kept, *chosen], key=lambda d: int(d[0]))]


def _most(inst: Any, factors: Sequence[int]) -> int:
    """How long the innermost loop may get."""
    free = str(inst[1][-1]) == "None"
    return math.prod(factors) if free else _GROWTH * factors[-1]


def _factors(func: Any, trace: Any, at: int) -> list[int] | None:
    """The factors of a split, the open one worked out; None if they are not exact."""
    loop, *given = trace[0][at][1]
    extent = _extent(func, trace, at, loop)
    known = [int(f) for f in given if isinstance(f, int)]
    if len(known) < len(given) - 1 or not extent or extent % math.prod(known):
        return None
    rest = extent // math.prod(known)
    factors = [int(f) if isinstance(f, int) else rest for f in given]
    return factors if math.prod(factors) == extent and extent > 1 else None


def _extent(func: Any, trace: Any, at: int, loop: str) -> int:
    """The extent of the loop a split takes, read off the schedule just before it."""
    prefix = [*trace[0][:at], ["Annotate", [loop, 1], [_MARK], []]]
    decisions = [d for d in trace[1] if int(d[0]) < at]
    sch = replay(func, [prefix, decisions])
    return next((int(n.extent) for n in _loops(sch) if _MARK in (n.annotations or {})), 0)


def _loops(sch: Any) -> list[Any]:
    """Every loop of a schedule."""
    found: list[Any] = []
    blocks = list(sch.get_child_blocks(sch.get_sblock("root")))
    while blocks:
        block = blocks.pop()
        found += [sch.get(loop) for loop in sch.get_loops(block)]
        blocks += list(sch.get_child_blocks(block))
    return found


def outputs_of(func: Any) -> list[int]:
    """Positions of the parameters a PrimFunc writes."""
    sch = st.Schedule(workload(func))
    params = list(sch.mod["main"].params)
    written: list[Any] = []
    blocks = list(sch.get_child_blocks(sch.get_sblock("root")))
    while blocks:
        block = blocks.pop()
        written += [region.source for region in sch.get(block).writes]
        blocks += list(sch.get_child_blocks(block))
    return [i for i, p in enumerate(params) if any(w.same_as(p) for w in written)]


class OwnSpace:
    """Random and bred variants of the default rule's schedule: tile sizes and loop orders."""

    def __init__(self, func: Any, target: Target, seed: int) -> None:
        self._func, self._rng, self._lanes = func, random.Random(seed), target.lanes
        self.default = default_trace(func, target)
        self._trace = sampled(func, self.default) if self.default is not None else None
        self._parents = [(1.0, self._trace)] if self._trace is not None else []

    def tell(self, trace: Any, ratio: float) -> None:
        """A variant that ran."""
        self._parents = sorted([*self._parents, (ratio, trace)], key=lambda p: p[0])[:_PARENTS]

    def next(self, seen: set[str]) -> Any | None:
        """A variant not in `seen`; None if none was found."""
        if self._trace is None:
            return None
        for attempt in range(_ATTEMPTS):
            made = self._variant(attempt)
            if made is not None and trace_name(made) not in seen:
                return made
        return None

    def _variant(self, attempt: int) -> Any | None:
        """Some decisions of a parent kept, the others (absent here) sampled when replayed."""
        _, (insts, decisions) = self._rng.choice(self._parents)
        kept = 0.7 if attempt < _ATTEMPTS // 2 else 0.3
        if self._rng.random() < _SWAPS:
            insts = self._swapped(insts)
        decisions = [d for d in decisions if self._rng.random() < kept]
        try:
            sch = replay(self._func, [insts, decisions], self._rng.randrange(1, 1 << 30))
        # Not every size fits what the rule does next; TVM raises several types for that.
        except Exception:
            return None
        made = trace_json(sch)
        return made if self._worth_trying(made) else None

    def _swapped(self, insts: list[Any]) -> list[Any]:
        """The same steps with two neighbours of one loop order exchanged."""
        orders = [i for i, inst in enumerate(insts) if inst[0] == "Reorder"]
        if not orders:
            return insts
        at = self._rng.choice(orders)
        loops = list(insts[at][1])
        first = self._rng.randrange(len(loops) - 1)
        loops[first : first + 2] = loops[first + 1], loops[first]
        return [*insts[:at], [insts[at][0], loops, *insts[at][2:]], *insts[at + 1 :]]

    def _worth_trying(self, trace: Any) -> bool:
        """Not the default again, and vectors stay (half) vectors."""
        assert self._trace is not None
        half = max(1, self._lanes // 2)
        return trace != self._trace and all(
            was[-1] % self._lanes or now[-1] % half == 0
            for (_, was), (_, now) in zip(self._trace[1], trace[1], strict=True)
            if isinstance(was, list)
        )


class BroadSpace:
    """MetaSchedule's evolutionary search over what its own rules for processors make."""

    def __init__(self, func: Any, target: Target, seed: int) -> None:
        self._func, self._mod = func, workload(func)
        self._target = tvm_env.tvm_target(target)
        self._database = ms.database.MemoryDatabase()
        self._work = self._database.commit_workload(self._mod)
        self._args = ms.arg_info.ArgInfo.from_prim_func(self._mod["main"])
        self._context = self._new_context(seed)
        self._waiting: list[Any] = []
        self._started = self._ended = False

    def _new_context(self, seed: int) -> Any:
        space = ms.space_generator.PostOrderApply(
            sch_rules="llvm", postprocs="llvm", mutator_probs="llvm"
        )
        strategy = ms.search_strategy.EvolutionarySearch(
            population_size=24,
            init_measured_ratio=0.4,
            init_min_unmeasured=12,
            genetic_num_iters=2,
            eps_greedy=0.25,
        )
        # The Python constructor imports every tensor intrinsic, which takes 17 seconds.
        context = _ffi_api.TuneContext(
            self._mod, self._target, space, strategy, "kernel", 1, seed, _silent
        )
        _ffi_api.TuneContextInitialize(context)
        return context

    def tell(self, trace: Any, seconds: float) -> None:
        """A candidate that ran: parents are taken from these."""
        sch = replay(self._func, trace)
        self._database.commit_tuning_record(
            ms.database.TuningRecord(sch.trace, self._work, [seconds], self._target, self._args)
        )

    def next(self, seen: set[str]) -> Any | None:
        """A candidate not in `seen`; None when there is nothing new."""
        for _ in range(3):
            while self._waiting:
                trace = self._waiting.pop(0)
                if trace_name(trace) not in seen:
                    return trace
            self._waiting = self._more()
        return None

    def _more(self) -> list[Any]:
        if self._ended:
            return []
        try:
            if not self._started:
                spaces = self._context.generate_design_space()
                self._context.pre_tuning(
                    1 << 30, _BATCH, spaces, self._database, ms.cost_model.RandomModel()
                )
                self._started = True
            candidates = self._context.generate_measure_candidates()
        # MetaSchedule gives up on some kernels with internal errors; ours is still searched.
        except Exception:
            candidates = None
        self._ended = not candidates
        return [trace_json(c.sch) for c in candidates or ()]


class Search:
    """Candidates for one kernel, from both spaces in turn; `tell` it how each one went."""

    def __init__(self, func: Any, target: Target, *, seed: int) -> None:
        self.own, self.broad = OwnSpace(func, target, seed), BroadSpace(func, target, seed)
        self._seen = {trace_name(self.own.default)} if self.own.default is not None else set()
        self._turn = 0

    def tell(self, trace: Any, seconds: float | None, ratio: float | None) -> None:
        """A trial that ended: it is never proposed again, and bred from if it ran."""
        self._seen.add(trace_name(trace))
        if seconds is None or ratio is None:
            return
        if from_metaschedule(trace):
            self.broad.tell(trace, seconds)
        else:
            self.own.tell(trace, ratio)

    def next(self) -> Any | None:
        """The trace of the next candidate, or None when there is nothing new to try."""
        self._turn += 1
        order: list[OwnSpace | BroadSpace] = [self.own, self.broad]
        # Measured: the rules' own schedules win more often, so two turns of three are theirs.
        for space in order if self._turn % 3 else reversed(order):
            made = space.next(self._seen)
            if made is not None:
                return made
        return None


def from_metaschedule(trace: Any) -> bool:
    """Whether a trace came from MetaSchedule's own rules (they mark where postprocessing began)."""
    return any(inst[0] == "EnterPostproc" for inst in trace[0])


def _silent(*_args: Any) -> None:
    """MetaSchedule's log goes nowhere."""

"""A session's winners applied while a model is lowered: each replayed, checked and timed again."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx

from codegen.schedule import workload_key
from codegen.target import Target
from codegen.trace_store import Best, KernelStore, Store
from codegen.tune import NOTHING, require_tunable, session_key
from codegen.tune_client import Client, Refused, WorkerDied
from codegen.tune_space import replay

HIT, KEPT, MISS = "hit", "default kept", "miss"
# Seeds unlike those the winner was chosen on.
_SEEDS, _ROUNDS, _TIMEOUT = [11, 12], 15, 60.0


@dataclass(frozen=True)
class Applied:
    """What became of one kernel: "hit", "default kept" or "miss", why, and time over default."""

    key: str
    name: str
    outcome: str
    why: str
    ratio: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))


class Tuned:
    """`tuned(func, target)` for `codegen.lower.lower`: the tuned function, or None.

    A winner is used only if its trace fits the kernel, its outputs agree with the default's on
    fresh random inputs, and it is faster than the default now, measured in turns. Anything else
    leaves the default, and `rows` says why.

    Raises:
        TuningError: the session was made for another target or TVM.
    """

    def __init__(self, store: Store, target: Target) -> None:
        store.require(session_key(target))
        require_tunable(target)
        self.store, self.target = store, target
        self.rows: dict[str, Applied] = {}
        self._client = Client(target)
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, func: Any, target: Target) -> Any | None:
        """The scheduled PrimFunc of a kernel, or None."""
        key = workload_key(func)
        with self._lock:
            if key not in self.rows:
                self.rows[key] = self._look(key, func)
            return self._made.get(key)

    def _look(self, key: str, func: Any) -> Applied:
        known = self.store.kernels.get(key)
        if known is None:
            return Applied(key, _first_blocks(func), MISS, "the session does not have this kernel")
        name, files = str(known["name"]), self.store.kernel(key)
        try:
            best = files.best()
        except (ValueError, TypeError) as error:
            return Applied(key, name, MISS, f"its record can not be trusted: {error}")
        if best is None:
            return self._without_winner(key, name, files)
        return self._apply(Applied(key, name, HIT, ""), func, files, best)

    def _without_winner(self, key: str, name: str, files: KernelStore) -> Applied:
        trials = files.trials()
        tried = sum(t.trace is not None for t in trials)
        if tried:
            return Applied(key, name, KEPT, f"nothing faster and right in {tried} trials")
        if any(t.error == NOTHING for t in trials):
            return Applied(key, name, KEPT, NOTHING)
        return Applied(key, name, MISS, "no schedule was tried yet")

    def _apply(self, row: Applied, func: Any, files: KernelStore, best: Best) -> Applied:
        def other(outcome: str, why: str, ratio: float | None = None) -> Applied:
            return Applied(row.key, row.name, outcome, why, ratio)

        try:
            made = replay(func, best.trace).mod["main"]
        # A trace that does not fit may raise any of TVM's types.
        except Exception as error:
            return other(MISS, f"its trace does not fit ({type(error).__name__})")
        try:
            found = self._measure(row.key, files, best)
        except (Refused, WorkerDied, ValueError) as error:
            return other(MISS, f"it did not pass the check: {error}")
        ratio = found["ratio"]
        if ratio >= 1.0:
            return other(KEPT, f"measured again, the default is faster ({ratio:.2f})", ratio)
        self._made[row.key] = made.without_attr("global_symbol")
        return other(HIT, f"{1 / ratio:.2f}x the default's speed", ratio)

    def _measure(self, key: str, files: KernelStore, best: Best) -> Any:
        text = files.func_json()
        if workload_key(tvm.ir.load_json(text)) != key:
            raise ValueError("the stored kernel was altered")
        self._client.open(text, _TIMEOUT)
        for _ in range(2):  # once more where other load on the machine may have spoken
            found = self._client.trial(best.trace, seeds=_SEEDS, rounds=_ROUNDS, timeout=_TIMEOUT)
            if found["ratio"] < 1.0:
                break
        return found

    def name_all(self, unscheduled: Any) -> None:
        """Give kernels the names they have in a lowered module (`Lowered.unscheduled`)."""
        for gv, func in unscheduled.functions_items():
            if isinstance(func, tirx.PrimFunc) and (row := self.rows.get(workload_key(func))):
                self.rows[row.key] = Applied(**{**row.to_json(), "name": gv.name_hint})

    def summary(self) -> str:
        """One sentence: hits with their gain, defaults kept, misses with the reason."""
        parts = []
        for outcome, word in ((HIT, "hit(s)"), (KEPT, "default(s) kept"), (MISS, "miss(es)")):
            mine = [r for r in self._sorted() if r.outcome == outcome]
            by_why: dict[str, list[str]] = {}
            for row in mine:
                by_why.setdefault(row.why, []).append(row.name)
            told = [f"{', '.join(names)} ({why})" for why, names in by_why.items()]
            parts.append(f"{len(mine)} {word}" + (f": {', '.join(told)}" if told else ""))
        return f"tuning session {self.store.folder}: " + "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """{"session", "hits", "kept", "misses": numbers, "kernels": rows}."""
        counts = {o: sum(r.outcome == o for r in self.rows.values()) for o in (HIT, KEPT, MISS)}
        return {
            "session": str(self.store.folder),
            "hits": counts[HIT],
            "kept": counts[KEPT],
            "misses": counts[MISS],
            "kernels": [r.to_json() for r in self._sorted()],
        }

    def _sorted(self) -> list[Applied]:
        return sorted(self.rows.values(), key=lambda r: r.name)

    def close(self) -> None:
        """Stop the process that measured."""
        self._client.close()


def _first_blocks(func: Any) -> str:
    """A name for a kernel that has none: its blocks."""
    import tvm.s_tir as st

    sch = st.Schedule(func)
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    return "+".join(str(sch.get(b).name_hint) for b in list(blocks)[:4])

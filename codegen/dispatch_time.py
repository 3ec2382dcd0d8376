"""How long the two experts of a layer take on this machine, by the kernel that is compiled for it.

The kernel of codegen/kernels/dispatch.py is run on random weights and inputs, once with all tokens
sent to the first expert and once with all sent to the second. The two take turns, so that whatever
else the machine does meets both alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tvm

from codegen import tvm_env, workers
from codegen.host import this_host, why_foreign
from codegen.kernels import dispatch
from codegen.schedules._common import threads
from codegen.target import Target
from passes.linear_forms._codes import PANEL, CodeSpec

Timer = Callable[[Callable[[], None], Callable[[], None]], tuple[float, float]]
ROUNDS = 25
SECONDS = 0.5  # at most, for the rounds of one layer


def why_not_timed(target: Target) -> str:
    """Why code for `target` can not be timed on this machine; "" where it can."""
    if target.kind == "gpu":
        return f"{target.name} has no kernel for layers of two experts"
    return why_foreign(target.to_json(), target.features, this_host())


def expert_seconds(
    target: Target,
    codes: CodeSpec,
    shape: tuple[int, int, int],
    *,
    bias: bool = True,
    timer: Timer | None = None,
) -> tuple[float, float]:
    """Seconds of one call with all tokens at (the multiply, the shift expert).

    Args:
        target: one that runs here (`why_not_timed`).
        codes: of the shift expert.
        shape: (tokens, inputs, outputs) of the layer.
        timer: called with two functions that run the kernel; gives the seconds of each.
    """
    rows, depth, columns = shape
    groups, panels = -(-depth // codes.per), -(-columns // PANEL)
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.random((rows, depth), np.float32),
        "multiply": rng.random((panels, depth, PANEL), np.float32),
        "words": rng.integers(0, 2**31, (panels, groups, PANEL), np.int32),
        "scale": np.ones(columns, np.float32),
        "router": np.ones((2, depth), np.float32),
    }
    if bias:
        arrays["bias"] = np.zeros(columns, np.float32)
    facts = dispatch.DispatchFacts(codes, bias, gate=False, workers=threads(target))
    shapes = {name: (a.shape, str(a.dtype)) for name, a in arrays.items()}
    shapes["out"] = ((rows, columns), "float32")
    with tvm_env.lowering_for(target):
        func = dispatch.dispatch(facts, shapes, target).with_attr("global_symbol", "main")
        built = tvm.compile(tvm.IRModule({"main": func}), target=tvm_env.tvm_target(target))
    out = np.empty((rows, columns), np.float32)
    chosen, pool = timer or by_turns, workers.pool_of(threads(target))
    seconds: tuple[float, float] = pool.call(
        lambda _: chosen(*(_sent(built["main"], arrays, out, expert) for expert in (0, 1)))
    )
    return seconds


def _sent(main: Any, arrays: Mapping[str, Any], out: Any, expert: int) -> Callable[[], None]:
    """What runs the kernel with all tokens at `expert`."""
    router = arrays["router"].copy()
    router[1 - expert] = -1.0  # inputs are positive: the other logit is smaller
    args = [tvm.runtime.tensor(a) for a in ({**arrays, "router": router}).values()]
    args.append(tvm.runtime.tensor(out))
    return lambda: main(*args)


def by_turns(first: Callable[[], None], second: Callable[[], None]) -> tuple[float, float]:
    """The least seconds of each over some rounds in which they take turns.

    Each turn is long enough (some calls) for the clock.
    """
    least = [float("inf"), float("inf")]
    calls = max(1, int(2e-4 / max(_seconds(first, 2), 1e-9)))
    end = time.perf_counter() + SECONDS
    for done in range(ROUNDS):
        for at, run in enumerate((first, second)):
            least[at] = min(least[at], _seconds(run, calls))
        if done >= 2 and time.perf_counter() > end:
            break
    return least[0], least[1]


def _seconds(run: Callable[[], None], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls

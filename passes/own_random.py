"""Random numbers of our own: the proofs draw many, and the user's sequence must not notice."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def own_random(function: Callable[P, R]) -> Callable[P, R]:
    """`function` drawing from a fixed seed; torch's global generator is as before afterwards."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        before = torch.random.get_rng_state()
        torch.default_generator.manual_seed(0)
        try:
            return function(*args, **kwargs)
        finally:
            torch.random.set_rng_state(before)

    return run

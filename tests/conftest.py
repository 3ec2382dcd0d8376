"""Every test compiles anew, leaves nothing in the user's cache, and draws by the run's seed."""

from __future__ import annotations

import os

os.environ["REWRITER_CACHE_DIR"] = "off"

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

_default_rng = np.random.default_rng
_drawn: list[np.random.SeedSequence] = []


def _draw_by(config: pytest.Config, what: str) -> None:
    """torch's numbers and numpy's unseeded generators follow from the run's seed and a name.

    pytest-randomly prints the seed, takes it, and seeds `random` and numpy's global state."""
    seed = np.random.SeedSequence([int(config.getoption("randomly_seed", 0)), *what.encode()])
    torch.manual_seed(int(seed.generate_state(1)[0]))
    _drawn[:] = [seed]


def _generator(seed: Any = None) -> np.random.Generator:
    return _default_rng(_drawn[0].spawn(1)[0] if seed is None and _drawn else seed)


np.random.default_rng = _generator


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _draw_by(item.config, item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Iterator[None]:
    """What tests share is drawn by its own name, whichever test comes first."""
    if fixturedef.scope == "function":
        return (yield)
    node, index = request.node, getattr(request, "param_index", 0)
    _draw_by(request.config, f"{node.nodeid} {fixturedef.argname} {index}")
    try:
        return (yield)
    finally:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (setup)")
        _draw_by(request.config, test)

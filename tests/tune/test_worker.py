"""What a candidate is held against: outputs, poison, time; and what a broken one costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from codegen.target import target_named
from codegen.tune_client import Client, Refused, WorkerDied
from codegen.tune_worker import Kernel, Mismatch, Server, difference
from tests.tune import kernels

TARGET = target_named("cpu")


@pytest.fixture(scope="module")
def product() -> Kernel:
    return Kernel(kernels.product_json(), TARGET)


def test_difference_allows_rounding_only() -> None:
    rng = np.random.default_rng()
    wanted = rng.standard_normal((50, 7)).astype("float32")
    assert difference(wanted.copy(), wanted) == 0.0
    assert 0 < difference(wanted + np.float32(1e-6), wanted) < 1e-5
    wrong = wanted.copy()
    wrong[3, 2] += 0.01
    with pytest.raises(Mismatch, match=r"differ by 0\.0"):
        difference(wrong, wanted)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_difference_wants_special_values_where_they_belong(bad: float) -> None:
    plain = np.ones(9, "float32")
    special = plain.copy()
    special[4] = bad
    with pytest.raises(Mismatch):
        difference(special, plain)
    with pytest.raises(Mismatch):
        difference(plain, special)
    assert difference(special.copy(), special) == 0.0


def test_difference_of_integers_is_exact() -> None:
    wanted = np.arange(10)
    assert difference(wanted.copy(), wanted) == 0.0
    with pytest.raises(Mismatch, match="1 of 10"):
        difference(np.where(wanted == 3, 4, wanted), wanted)


def test_right_candidate_is_timed_against_the_default(product: Kernel) -> None:
    found = product.trial(kernels.naive_trace(), seeds=[0, 1, 2], rounds=3)
    assert found["seconds"] > 0
    assert found["default_seconds"] > 0
    assert found["max_abs_error"] < 1e-4


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_candidate_with_other_outputs_is_caught(product: Kernel, seed: int) -> None:
    with pytest.raises(Mismatch, match="differ"):
        product.trial(kernels.half_precision_trace(), seeds=[seed], rounds=3)


def test_candidate_that_writes_nothing_is_caught(product: Kernel) -> None:
    silent: dict[str, Any] = {"main": lambda *_: None}
    for seed in (0, 1):
        with pytest.raises(Mismatch):
            product._check(silent, seed)


def test_server_turns_every_failure_into_an_answer() -> None:
    server = Server()
    assert "no kernel is open" in server.answer({"do": "trial"})["error"]
    target = TARGET.to_json()
    assert "error" in server.answer({"do": "open", "func": "no json", "target": target})
    opened = server.answer({"do": "open", "func": kernels.product_json(), "target": target})
    assert opened["ok"]["seconds"] > 0
    request = {"do": "trial", "trace": [[["Nonsense", [], [], []]], []], "seeds": [0], "rounds": 1}
    assert "error" in server.answer(request)


def test_dead_and_hanging_workers_cost_one_candidate() -> None:
    trace = kernels.naive_trace()
    with Client(TARGET) as client:
        client.open(kernels.product_json(), timeout=60)
        assert client._process is not None
        client._process.kill()
        with pytest.raises(WorkerDied, match="ended"):
            client.trial(trace, seeds=[0], rounds=1, timeout=60)
        assert client.trial(trace, seeds=[0], rounds=1, timeout=60)["ratio"] > 0
        with pytest.raises(WorkerDied, match="no answer in 0 s"):
            client.trial(trace, seeds=list(range(200)), rounds=100, timeout=0)
        with pytest.raises(Refused, match="Mismatch"):
            client.trial(kernels.half_precision_trace(), seeds=[0], rounds=1, timeout=60)

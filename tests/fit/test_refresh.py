"""Hashes learned again while fine-tuning: when, from what, and that a killed run repeats it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from passes.errors import FitError, UsageError
from passes.form import form_named
from rewriter.refresh import Refresh
from rewriter.supervised import Rates, fine_tune
from tests.fit.models import batches, encoder, rewritten


def labelled(count: int, seed: int) -> list[dict[str, Tensor]]:
    return [{**b, "label": (b["input_ids"][:, 0] < 30).long()} for b in batches(count, seed)]


def loss(outputs: Any, batch: Any) -> Tensor:
    return F.cross_entropy(outputs[:, 0, :2], batch["label"])


def hashes(made: Any) -> dict[str, Tensor]:
    names = Refresh(made, batches(1, 1), 1, 0).params
    return {n: p.detach().clone() for n, p in names.items()}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_a_hash_is_learned_first_and_then_every_few_epochs(monkeypatch: Any) -> None:
    made, seen = rewritten(form="hamming"), batches(5, 3)
    fresh, plan = hashes(made), Refresh(made, seen, 2, seed=4)
    changed = []
    for step in range(22):
        before = hashes(made)
        plan.before(step)
        now = hashes(made)
        moved = {n.rpartition(".")[2] for n in now if not torch.equal(now[n], before[n])}
        if moved:
            changed.append((step, moved))
        with torch.no_grad():  # a model that trains
            for block in (0, 1):
                weight = made.module.get_parameter(f"blocks.{block}.q.weight")
                weight.add_(0.2 * torch.randn_like(weight))
    assert changed == [
        (0, {"anchors", "centre", "mix", "rate"}), (10, {"mix"}), (20, {"mix"}),
    ]  # fmt: skip
    assert all(not torch.equal(p, fresh[n]) for n, p in hashes(made).items())


def test_a_learned_hash_is_not_thrown_away_at_the_start() -> None:
    made, seen = rewritten(form="hamming"), batches(4, 3)
    Refresh(made, seen, 1, seed=0).before(0)
    before = hashes(made)
    Refresh(made, seen, 1, seed=9).before(0)
    assert all(torch.equal(p, before[n]) for n, p in hashes(made).items())


def test_without_a_refresh_hashes_stay() -> None:
    made = rewritten(form="hamming")
    before = hashes(made)
    fine_tune(made, labelled(3, 1), loss, seconds=300, rates=Rates(steps=8))
    assert all(torch.equal(p, before[n]) for n, p in hashes(made).items())


def test_forms_without_a_hash_have_nothing_to_learn() -> None:
    assert not Refresh(rewritten(form="hedgehog"), batches(2, 1), 1, 0).params


@pytest.mark.parametrize("form", ["hamming", "shiftadd"])
def test_a_killed_run_learns_the_same_hashes(form: str, tmp_path: Path) -> None:
    """Killed after one refresh and before the next; the best state has its own hashes."""
    rates, data, held = Rates(steps=12), labelled(4, 1), labelled(2, 2)
    small = form_named(form, {"bits": 4, "anchors": 6})

    def go(folder: Path, stop_at: int | None) -> Any:
        made = rewritten(form=small)

        def progress(stage: str, site: str, step: int, *rest: Any) -> None:
            if step == stop_at:
                raise KeyboardInterrupt

        done = fine_tune(
            made, data, loss, seconds=600, rates=rates, validation=held, refresh=1,
            state_dir=folder, progress=progress,
        )  # fmt: skip
        with torch.no_grad():
            names = ("input_ids", "attention_mask")
            now = [float(loss(made.module(**{n: b[n] for n in names}), b)) for b in held]
        assert sum(now) / len(now) == pytest.approx(done.loss_after, rel=1e-4)
        return made

    whole = go(tmp_path / "a", None)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "b", 6)
    again = go(tmp_path / "b", None)
    wanted = dict(whole.module.named_parameters())
    for name, value in again.module.named_parameters():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(FitError, match="another"):
        fine_tune(rewritten(form=small), data, loss, seconds=9, state_dir=tmp_path / "b")


@pytest.mark.parametrize("every", [-1, 1.5])
def test_a_wrong_interval_is_refused(every: Any) -> None:
    with pytest.raises(UsageError, match="refresh: a whole number of epochs"):
        fine_tune(rewritten(encoder(), "hamming"), labelled(2, 1), loss, seconds=1, refresh=every)

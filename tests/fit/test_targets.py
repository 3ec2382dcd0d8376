"""What the large stages keep of the original: float16 where it fits, up to a limit of bytes."""

from __future__ import annotations

import math

import pytest
import torch

from rewriter.fit_model import Teacher, half, room, teacher_of
from tests.fit.models import batches, rewritten


def test_values_are_narrowed_where_float16_holds_them() -> None:
    x = torch.randn(3, 5)
    assert half(x).dtype is torch.float16
    torch.testing.assert_close(half(x).float(), x, rtol=1e-3, atol=1e-7)
    assert half(torch.tensor([65504.0, -65504.0])).dtype is torch.float16
    for large in (7e4, -7e4, math.inf, math.nan):
        assert half(torch.tensor([1.0, large])).dtype is torch.float32


def test_room_counts_two_bytes_a_value() -> None:
    assert room([torch.zeros(3, 2), torch.zeros(4, dtype=torch.bool), 7]) == 16


@pytest.mark.parametrize("most", [0, 1 << 20])
def test_batches_are_kept_only_where_there_is_room(most: int) -> None:
    data = batches(2, int(torch.randint(1000, ())))
    teacher = Teacher(teacher_of(rewritten()), data, most)
    (outputs, hidden), again = teacher(1), teacher(1)
    wanted = torch.float16 if most else torch.float32
    assert all(h.dtype is wanted for h in hidden)
    assert bool(teacher.kept) == bool(teacher.held) == bool(most)
    assert teacher.held <= most
    for first, second in zip(outputs + hidden, again[0] + again[1], strict=True):
        torch.testing.assert_close(first, second)

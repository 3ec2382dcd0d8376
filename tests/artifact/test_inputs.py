"""What a user may and may not give an artifact."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codegen.input_check import check_inputs
from codegen.runtime import Artifact, load
from codegen.specs import TensorSpec
from passes.errors import InputError
from tests.artifact.conftest import IDS, ROWS, VOCABULARY, WIDTH, Small


@pytest.fixture(scope="module")
def artifact(small_file: Path) -> Artifact:
    return load(small_file)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda g: g.pop("ids"), "missing input 'ids'; expected: x, ids"),
    "unknown": (lambda g: g.update(idz=1), "unknown input 'idz'; did you mean ids?"),
    "shape": (
        lambda g: g.update(x=g["x"][:, :-1]),
        f"input 'x': shape [{ROWS}, {WIDTH - 1}] given, [{ROWS}, {WIDTH}] expected",
    ),
    "rank": (lambda g: g.update(x=g["x"][None]), f"shape [1, {ROWS}, {WIDTH}] given"),
    "scalar": (lambda g: g.update(x=np.float32(1)), "input 'x': shape [] given"),
    "empty": (lambda g: g.update(x=np.empty((0, WIDTH), "f4")), f"shape [0, {WIDTH}] given"),
    "float64": (lambda g: g.update(x=g["x"].astype("f8")), "dtype float64 given, float32 expected"),
    "float16": (lambda g: g.update(x=g["x"].astype("f2")), "dtype float16 given, float32 expected"),
    "int for float": (lambda g: g.update(x=g["x"].astype("i4")), "dtype int32 given, float32"),
    "float for int": (lambda g: g.update(ids=g["ids"] * 1.0), "dtype float64 given, int64"),
    "uint64": (lambda g: g.update(ids=g["ids"].astype("u8")), "dtype uint64 given, int64"),
    "complex": (lambda g: g.update(x=g["x"] + 0j), "dtype complex"),
    "object": (lambda g: g.update(x=g["x"].astype(object)), "input 'x': ndarray of dtype object"),
    "text": (lambda g: g.update(x="hello"), "input 'x': str of dtype <U5 given"),
    "none": (lambda g: g.update(x=None), "input 'x': NoneType of dtype object given"),
    "ragged": (lambda g: g.update(ids=[[1], [1, 2]]), "input 'ids': list given, which is no array"),
    "dates": (lambda g: g.update(ids=g["ids"].astype("M8[s]")), "dtype datetime64[s] given"),
    "record": (lambda g: g.update(x=np.zeros(3, "f4,i4")), "input 'x': ndarray of dtype"),
    "id high": (
        lambda g: g["ids"].__setitem__(3, VOCABULARY),
        f"input 'ids': value {VOCABULARY} at [3] is out of range; allowed are 0 to "
        f"{VOCABULARY - 1}",
    ),
    "id low": (lambda g: g["ids"].__setitem__(0, -1), "value -1 at [0] is out of range"),
    "id huge": (lambda g: g["ids"].__setitem__(slice(5), 2**40), "at [0] (and 4 more) is out of"),
    "not text": (lambda g: g.update({7: 1}), "unknown input '7'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs(artifact: Artifact, small: Small, case: str) -> None:
    change, message = WRONG[case]
    given = small.inputs(0)
    change(given)
    with pytest.raises(InputError, match=re.escape(message)):
        artifact.run(given)
    good = small.inputs(1)
    small.assert_right(artifact.run(good), good)


def test_wrong_calls(artifact: Artifact, small: Small) -> None:
    x, ids = small.inputs(0).values()
    with pytest.raises(InputError, match="3 inputs given, expected: x, ids"):
        artifact(x, ids, ids)
    with pytest.raises(InputError, match="'x' is given twice"):
        artifact(x, x=x, ids=ids)
    with pytest.raises(InputError, match="missing input 'x', 'ids'"):
        artifact()


class Exploding:
    def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
        raise RuntimeError("requires grad")


def test_an_object_that_will_not_be_an_array(artifact: Artifact, small: Small) -> None:
    with pytest.raises(InputError, match=r"Exploding given.*requires grad"):
        artifact.run({**small.inputs(0), "x": Exploding()})


FINE: dict[str, Callable[[np.ndarray], Any]] = {
    "as it is": lambda a: a,
    "fortran order": np.asfortranarray,
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "reversed": lambda a: a[..., ::-1].copy()[..., ::-1],
    "big endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "masked array": np.ma.masked_array,
    "misaligned": lambda a: np.frombuffer(b"\0" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
}


@pytest.mark.parametrize("case", FINE)
def test_any_layout_gives_the_same(artifact: Artifact, small: Small, case: str) -> None:
    inputs = small.inputs(3)
    given = {name: FINE[case](array) for name, array in inputs.items()}
    small.assert_right(artifact.run(given), inputs)


def test_read_only_arrays_are_fine_and_stay_as_they_are(artifact: Artifact, small: Small) -> None:
    inputs = small.inputs(4)
    before = {name: array.copy() for name, array in inputs.items()}
    for array in inputs.values():
        array.flags.writeable = False
    small.assert_right(artifact.run(inputs), before)
    for name, array in inputs.items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "uint32"])
def test_integers_are_widened(artifact: Artifact, small: Small, dtype: str) -> None:
    inputs = small.inputs(5)
    small.assert_right(artifact.run({**inputs, "ids": inputs["ids"].astype(dtype)}), inputs)


def test_lists_and_bools(artifact: Artifact, small: Small) -> None:
    inputs = small.inputs(6)
    small.assert_right(artifact.run({**inputs, "ids": inputs["ids"].tolist()}), inputs)
    flags = np.arange(IDS) % 2 == 0
    small.assert_right(artifact.run({**inputs, "ids": flags}), {**inputs, "ids": flags.astype(int)})


def test_nan_and_infinity_pass_through(artifact: Artifact, small: Small) -> None:
    inputs = small.inputs(7)
    inputs["x"][2, 3], inputs["x"][4, 0] = np.nan, np.inf
    given = artifact.run(inputs)
    np.testing.assert_array_equal(given["same"], inputs["x"])
    rows = [0, 1, 3]
    np.testing.assert_allclose(
        given["y"][rows], small.expected(inputs)["y"][rows], rtol=1e-5, atol=1e-5
    )


def test_range_of_a_float_lets_nan_through() -> None:
    spec = TensorSpec("p", (3,), "float32", 0, 1)
    fine = np.array([0, np.nan, 1], np.float32)
    np.testing.assert_array_equal(check_inputs([spec], [fine], {})[0], fine)
    with pytest.raises(InputError, match=r"value 1\.5 at \[1\]"):
        check_inputs([spec], [np.array([0, 1.5, np.nan], np.float32)], {})


def test_one_sided_range() -> None:
    spec = TensorSpec("n", (2,), "int64", low=1)
    check_inputs([spec], [np.array([1, 2**62])], {})
    with pytest.raises(InputError, match="value 0 at"):
        check_inputs([spec], [np.array([5, 0])], {})


def test_what_compiled_code_gets_is_aligned_writable_and_exact() -> None:
    spec = TensorSpec("x", (3, 5), "float32")
    room = np.zeros(100, np.uint8)
    for start in range(0, 16, 4):
        x = room[start : start + 60].view(np.float32).reshape(3, 5)
        (got,) = check_inputs([spec], [x], {})
        assert got.ctypes.data % 64 == 0
        assert got.flags.c_contiguous
        assert got.flags.writeable
        assert got.dtype == np.float32
    (same,) = check_inputs([spec], [got], {})
    assert same is got

"""A small compiled model, built once per test process: y = relu(x @ w + b), n = ids' sum."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codegen.container import write_artifact
from codegen.host import this_host
from codegen.manifest import Manifest, make_manifest
from codegen.specs import TensorSpec
from codegen.target import Target

ROWS, WIDTH, OUT, IDS, VOCABULARY = 5, 48, 32, 7, 11


def library_bytes(folder: Path) -> bytes:
    """main(x [5, 48] f32, ids [7] i64, w [48, 32], b [32], table [11, 3]) -> (y, rows, x)."""
    import tvm
    from tvm import relax

    builder = relax.BlockBuilder()

    def var(name: str, shape: tuple[int, ...], dtype: str) -> Any:
        return relax.Var(name, relax.TensorType(shape, dtype))

    x, ids = var("x", (ROWS, WIDTH), "float32"), var("ids", (IDS,), "int64")
    w, b = var("w", (WIDTH, OUT), "float32"), var("b", (OUT,), "float32")
    table = var("table", (VOCABULARY, 3), "float32")
    with builder.function("main", [x, ids, w, b, table]):
        with builder.dataflow():
            product = builder.emit(relax.op.matmul(x, w))
            y = builder.emit(relax.op.nn.relu(relax.op.add(product, b)))
            rows = builder.emit(relax.op.take(table, ids, axis=0, mode="clip"))
            result = builder.emit_output(relax.Tuple([y, rows, x]))
        builder.emit_func_output(result)
    target = tvm.target.Target({"kind": "llvm", "mtriple": f"{this_host().arch}-linux-gnu"})
    built = tvm.compile(builder.get(), target=target)
    path = folder / "library.so"
    built.export_library(str(path))
    return path.read_bytes()


@dataclass(frozen=True)
class Small:
    """The model's parts, and a reference."""

    code: bytes
    weights: dict[str, np.ndarray]
    manifest: Manifest

    def write(self, path: Path) -> Path:
        write_artifact(path, self.manifest, self.code, self.weights, {"made": "for a test"})
        return path

    def inputs(self, seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
        return {"x": x, "ids": rng.integers(0, VOCABULARY, IDS)}

    def expected(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        w = {name: array.astype(np.float64) for name, array in self.weights.items()}
        y = np.maximum(inputs["x"].astype(np.float64) @ w["w"] + w["b"], 0)
        return {"y": y, "rows": w["table"][inputs["ids"]], "same": inputs["x"]}

    def assert_right(self, outputs: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> None:
        assert list(outputs) == ["y", "rows", "same"]
        for name, wanted in self.expected(inputs).items():
            np.testing.assert_allclose(outputs[name], wanted, rtol=1e-5, atol=1e-5)


def host_target(**changes: Any) -> Target:
    host = this_host()
    fields = {"name": "cpu", "kind": "cpu", "triple": f"{host.arch}-linux-gnu", "tvm": {}}
    return Target(**{**fields, **changes})


def manifest_for(target: Target) -> Manifest:
    inputs = [
        TensorSpec("x", (ROWS, WIDTH), "float32"),
        TensorSpec("ids", (IDS,), "int64", 0, VOCABULARY - 1),
    ]
    outputs = [
        TensorSpec("y", (ROWS, OUT), "float32"),
        TensorSpec("rows", (IDS, 3), "float32"),
        TensorSpec("same", (ROWS, WIDTH), "float32"),
    ]
    plan = {"schema": 1, "sites": {}}
    return make_manifest("small", target, inputs, outputs, ["w", "b", "table"], plan=plan)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    rng = np.random.default_rng()
    weights = {
        "w": rng.standard_normal((WIDTH, OUT)).astype(np.float32),
        "b": rng.standard_normal(OUT).astype(np.float32),
        "table": rng.standard_normal((VOCABULARY, 3)).astype(np.float32),
    }
    code = library_bytes(tmp_path_factory.mktemp("library"))
    return Small(code, weights, manifest_for(host_target()))


@pytest.fixture(scope="session")
def small_file(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as an artifact; tests must not change the file."""
    return small.write(tmp_path_factory.mktemp("artifact") / "small.rwa")

"""A device with its own memory: the copies there and back, tried with the host as the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from codegen import runtime
from codegen.devices import CPU, HostDevice, OtherMemory, device_for
from codegen.host import cuda_devices
from codegen.runtime import load
from passes.errors import ArtifactError
from tests.artifact.conftest import Small


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8", "bool", "float16"])
@pytest.mark.parametrize("device", [HostDevice(), OtherMemory(CPU)])
def test_there_and_back(device: HostDevice | OtherMemory, dtype: str) -> None:
    for shape in [(3, 5), (1,), (), (64, 48)]:
        array = np.asarray(np.random.default_rng().standard_normal(shape) * 9).astype(dtype)
        back = device.array(device.tensor(array))
        assert (back.dtype, back.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(back, array)
        assert not np.shares_memory(back, array)


def test_a_model_with_copies(
    small: Small, small_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "device_for", lambda kind: OtherMemory(CPU))
    artifact = load(small_file)
    for seed in range(3):
        inputs = small.inputs(seed)
        small.assert_right(artifact.run(inputs), inputs)


@pytest.mark.skipif(bool(cuda_devices()), reason="this machine has a GPU")
def test_cuda_runtime_without_a_driver() -> None:
    with pytest.raises(ArtifactError, match=r"CUDA runtime can not be loaded"):
        device_for("gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_devices(), reason="no CUDA GPU on this machine")
def test_there_and_back_on_a_gpu() -> None:
    device = device_for("gpu")
    array = np.random.default_rng().standard_normal((64, 48)).astype(np.float32)
    np.testing.assert_array_equal(device.array(device.tensor(array)), array)

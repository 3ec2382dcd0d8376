"""Where an artifact's tensors live: in the host's memory, or in a GPU's with copies both ways."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.input_check import aligned_copy
from codegen.tvm_runtime import load_cuda, load_ffi
from codegen.weights_file import ALIGN

CPU, CUDA = 1, 2  # DLDeviceType
_POOLED = 2  # AllocatorType::kPooled of TVM


@dataclass(frozen=True)
class HostDevice:
    """The processor: TVM works on numpy's memory."""

    def machine(self, executable: Any) -> Any:
        """`executable` made ready to run here."""
        executable["vm_initialization"](CPU, 0, _POOLED)
        return executable

    def tensor(self, array: NDArray[Any]) -> Any:
        """A TVM tensor over `array` (C order, writable), which is copied only if misaligned."""
        if array.__array_interface__["data"][0] % ALIGN:
            array = aligned_copy(array, array.dtype)
        return load_ffi().from_dlpack(array)

    def array(self, tensor: Any) -> NDArray[Any]:
        """A copy: TVM may hand out an input or a weight as an output."""
        return np.array(np.from_dlpack(tensor))


@dataclass(frozen=True)
class OtherMemory:
    """A device with memory of its own; every tensor is copied there, every output back."""

    kind: int = CUDA
    index: int = 0

    def machine(self, executable: Any) -> Any:
        """`executable` made ready to run there; shapes are computed on the host."""
        executable["vm_initialization"](self.kind, self.index, _POOLED, CPU, 0, _POOLED)
        return executable

    def tensor(self, array: NDArray[Any]) -> Any:
        """A TVM tensor on the device with the values of `array` (C order)."""
        ffi = load_ffi()
        empty = ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        device = ffi.device(_NAMES[self.kind], self.index)
        made = empty(ffi.Shape(array.shape), ffi.dtype(array.dtype.name), device, None)
        fill = ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        fill(made, array.ctypes.data_as(ctypes.c_void_p), array.nbytes)
        return made

    def array(self, tensor: Any) -> NDArray[Any]:
        """The values of a tensor on the device (or, for a constant, on the host)."""
        made = np.empty(tuple(int(n) for n in tensor.shape), np.dtype(str(tensor.dtype)))
        read = load_ffi().get_global_func("runtime.TVMTensorCopyToBytes")
        read(tensor, made.ctypes.data_as(ctypes.c_void_p), made.nbytes)
        return made


_NAMES = {CPU: "cpu", CUDA: "cuda"}
Device = HostDevice | OtherMemory


def device_for(kind: str) -> Device:
    """The device for a target's kind; loads what TVM needs for it."""
    if kind != "gpu":
        return HostDevice()
    load_cuda()
    return OtherMemory()

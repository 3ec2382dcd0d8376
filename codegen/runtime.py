"""Run an artifact with numpy and TVM's runtime alone: no torch, no compiler."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Collection, Mapping
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen import workers
from codegen.archive import Opened, open_artifact
from codegen.devices import device_for
from codegen.host import Host, this_host, why_foreign
from codegen.input_check import check_inputs
from codegen.manifest import Manifest, why_other_version
from codegen.specs import TensorSpec
from codegen.target import usable_cores
from codegen.tvm_runtime import load_ffi, load_library
from passes.errors import ArtifactError, UsageError

_keys = count()


def load(path: str | Path, *, threads: int | None = None) -> Artifact:
    """The artifact in the file at `path`, ready to run.

    Every byte of the file, its target and the processor features it needs are checked before any
    of its code is loaded: `ArtifactError` if it is damaged, made for another machine or for
    another TVM. `threads` (default: TVM_NUM_THREADS, else the target's number, else all) is
    limited to the cores this process may use.

    The weights are mapped from the file, not copied: replace the file by a rename (as compile
    does) while it is in use, never overwrite it in place.
    """
    opened = open_artifact(path)
    check_host(opened.manifest, str(path), this_host())
    return Artifact(opened, _threads(threads, opened.manifest))


def check_host(manifest: Manifest, where: str, host: Host) -> None:
    """`ArtifactError` naming `where` unless code with this manifest can run on `host`."""
    reason = why_foreign(manifest.target, manifest.features, host) or why_other_version(manifest)
    if reason:
        made_for = manifest.target.get("name", "?")
        raise ArtifactError(f"{where}: made for {made_for}; {reason}")


def _threads(asked: int | None, manifest: Manifest) -> int:
    cores = usable_cores()
    if asked is None:
        variable = os.environ.get("TVM_NUM_THREADS", "")
        preset = int(variable) if variable.isdecimal() else 0
        return min(preset or int(manifest.target.get("threads") or 0) or cores, cores)
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise UsageError(f"threads: {asked!r} given, a whole number from 1 expected")
    if asked > cores:
        warnings.warn(
            f"threads={asked}: this process may use {cores} cores; {cores} threads are used",
            stacklevel=3,
        )
    return min(asked, cores)


class Artifact:
    """Compiled code with its weights. Made by `load`; may be called from any number of threads.

    A call takes arrays by position or by name and returns new arrays by name:
    `artifact(input_ids=ids, attention_mask=mask)["last_hidden_state"]`.
    """

    def __init__(self, opened: Opened, threads: int) -> None:
        """For `load`: `opened` is checked, and its code is fit for this machine."""
        self.path, self.manifest, self.report = opened.path, opened.manifest, opened.report
        self.threads = threads
        self._key = next(_keys)
        self._open = True
        self._device = device_for(str(self.manifest.target.get("kind")))
        try:
            self._library: Any = load_library(opened.code)
        except RuntimeError as error:
            raise ArtifactError(f"{self.path}: its code can not be loaded ({error})") from error
        self._weights: Any = self._tensors(opened)
        self._finalizer = weakref.finalize(self, workers.forget, threads, self._key)
        workers.pool_of(threads).call(self._check_entry)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, shape, dtype and range of each input, in order."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Name, shape and dtype of each output, in order."""
        return self.manifest.outputs

    def __call__(self, /, *args: Any, **kwargs: Any) -> dict[str, NDArray[Any]]:
        """Run on arrays given by position or by name; see `run`."""
        self.require_open()
        if self.manifest.decode:
            raise UsageError(
                f"{self.path}: this artifact generates tokens; use artifact.generate(tokens, "
                "max_new), or rewriter run --generate"
            )
        arrays = check_inputs(self.inputs, args, kwargs)
        outputs = workers.pool_of(self.threads).call(lambda worker: self._run(worker, arrays))
        return {s.name: a for s, a in zip(self.outputs, outputs, strict=True)}

    def run(self, inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Name -> array of each output; the arrays are the caller's own.

        `InputError` for a wrong name, shape, dtype or value; `ArtifactError` if the code fails.
        """
        return self(**{str(name): value for name, value in inputs.items()})

    def generate(
        self, tokens: Any, max_new: int, *, stop: int | Collection[int] = ()
    ) -> NDArray[np.int64]:
        """New tokens [B, m] that follow `tokens` [B, n] greedily; see codegen/decoding.py.

        For an artifact compiled to generate: `UsageError` for any other, `InputError` for tokens
        it can not take. `Decoder` gives tokens one by one and goes on from a state.
        """
        from codegen.decoding import Decoder

        return Decoder(self).generate(tokens, max_new, stop=stop)

    def require_open(self) -> None:
        """`ArtifactError` once it is closed."""
        if not self._open:
            raise ArtifactError(f"{self.path}: the artifact is closed")

    def close(self) -> None:
        """Release code and weights; calls under way end first, later ones are refused."""
        self._open = False
        self._finalizer()
        self._library = self._weights = None

    def __enter__(self) -> Artifact:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        target = self.manifest.target.get("name", "?")
        return f"<Artifact {self.manifest.name} for {target}, {self.threads} threads: {self.path}>"

    def _tensors(self, opened: Opened) -> list[Any]:
        """The weights as TVM tensors, over the mapping where it is aligned; equal ones shared."""
        made: dict[str, Any] = {}
        tensors = []
        for name, array in opened.arrays().items():
            stored = self.manifest.aliases.get(name, name)
            if stored not in made:
                made[stored] = self._device.tensor(array)
            tensors.append(made[stored])
        return tensors

    def _machine(self, worker: workers.Worker) -> Any:
        """This worker's virtual machine: one must not be shared by two threads."""
        machine = worker.state.get(self._key)
        if machine is None:
            machine = worker.state[self._key] = self.new_machine()
        return machine

    def new_machine(self) -> Any:
        """A virtual machine of its own, for the thread that asks (profiling)."""
        if self._library is None:
            raise ArtifactError(f"{self.path}: the artifact is closed")
        return self._device.machine(self._library["vm_load_executable"]())

    def bound(self, machine: Any, arrays: list[NDArray[Any]]) -> Any:
        """A call without arguments: the code in `machine` on `arrays` and the weights."""
        tensors = [*map(self._device.tensor, arrays), *(self._weights or ())]
        entry = machine[self.manifest.entry]
        return lambda: entry(*tensors)

    def _check_entry(self, worker: workers.Worker) -> None:
        """The code must have the entry its manifest names, with as many arguments."""
        entry = self.manifest.entry
        try:
            arity = int(self._machine(worker)["get_function_arity"](entry))
        except (RuntimeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{self.path}: its code has no function {entry!r}") from error
        wanted = len(self.inputs) + len(self._weights)
        if arity != wanted:
            raise ArtifactError(
                f"{self.path}: its code takes {arity} arguments; the manifest names {wanted}"
            )

    def _run(self, worker: workers.Worker, arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
        try:
            machine, weights = self._machine(worker), self._weights
            if weights is None:
                raise ArtifactError(f"{self.path}: the artifact is closed")
            found = _flat(self._call(machine, arrays, weights), load_ffi().Tensor)
        finally:
            if not self._open:  # closed meanwhile: keep nothing
                worker.state.pop(self._key, None)
        if len(found) != len(self.outputs):
            raise ArtifactError(
                f"{self.path}: its code gave {len(found)} outputs; the manifest names "
                f"{len(self.outputs)}"
            )
        return [self._device.array(tensor) for tensor in found]

    def _call(self, machine: Any, arrays: list[NDArray[Any]], weights: list[Any]) -> Any:
        try:
            return machine[self.manifest.entry](*map(self._device.tensor, arrays), *weights)
        except Exception as error:  # TVM raises many kinds
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ArtifactError(f"{self.path}: its code failed ({lines[-1]})") from error


def _flat(result: Any, tensor: type) -> list[Any]:
    return [result] if isinstance(result, tensor) else [t for r in result for t in _flat(r, tensor)]

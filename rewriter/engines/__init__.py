"""Engines: what can run a model and be timed. One file per engine, found by discovery.

Each file has ``ENGINES``, a tuple of `Engine`. Importing this package imports no engine.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passes.errors import UnknownName

Array = NDArray[Any]
Call = Callable[[], Sequence[Array]]
_HELPERS = {"worker", "process", "onnx_file"}


@dataclass(frozen=True)
class Job:
    """What an engine is to run: `model` is a MODEL (or, for ours, the path of an artifact).

    `options` are the keyword arguments of `rewriter.models.load_model`, `folder` is a scratch
    folder shared by the engines of one bench, `inputs` the arrays by name.
    """

    model: str
    inputs: Mapping[str, Array]
    threads: int
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Engine:
    """One engine. `prepare` loads and compiles, and returns the call that is timed.

    `needs` are the modules it imports (a missing one skips the engine), `group` a second name
    that several variants share.
    """

    name: str
    label: str
    prepare: Callable[[Job], Call]
    needs: tuple[str, ...] = ()
    group: str = ""
    extra: str = ""

    def missing(self) -> str:
        """Why the engine can not run here, or ""."""
        lacking = [m for m in self.needs if importlib.util.find_spec(m) is None]
        if not lacking:
            return ""
        hint = f"; pip install 'attention-rewriter[{self.extra}]'" if self.extra else ""
        return f"{', '.join(lacking)} not installed{hint}"


def engines() -> dict[str, Engine]:
    """All engines by name: ours first, then the others in the order of their names."""
    package = importlib.import_module("rewriter.engines")
    found: dict[str, Engine] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if info.name not in _HELPERS:
            module = importlib.import_module(f"rewriter.engines.{info.name}")
            found.update({engine.name: engine for engine in module.ENGINES})
    return dict(sorted(found.items(), key=lambda item: (item[0] != "ours", item[0])))


def select(names: Iterable[str]) -> list[Engine]:
    """The engines with these names or groups, each once; `UnknownName` for another name."""
    known = engines()
    chosen: dict[str, Engine] = {}
    for name in names:
        hits = [e for e in known.values() if name in (e.name, e.group)]
        if not hits:
            groups = {e.group for e in known.values() if e.group}
            raise UnknownName("engine", name, {*known, *groups})
        chosen.update({e.name: e for e in hits})
    return list(chosen.values())


def load_module(job: Job) -> tuple[Any, dict[str, Any]]:
    """The job's model in eval mode and its inputs as torch tensors, with torch's threads set."""
    import torch

    from rewriter.models import load_model

    torch.set_num_threads(job.threads)
    loaded = load_model(job.model, **dict(job.options))
    tensors = {}
    for name, array in job.inputs.items():
        tensor = torch.from_numpy(np.array(array))
        example = loaded.example_inputs.get(name)
        tensors[name] = tensor if example is None else tensor.to(example.dtype)
    return loaded.model.eval(), tensors

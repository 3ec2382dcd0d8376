"""The folder a killed fit goes on from: state.json and tensors-<n>.safetensors, never pickles.

The tensors are written first under a new name, then the JSON that names them is renamed into
place: at every moment the folder holds one complete state.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from passes.errors import FitError
from passes.plan import Plan

SCHEMA = 1
RECORD = "state.json"


@dataclass
class FitState:
    """Where a fit stands.

    `done` names finished tasks; `task`, `step` and `task_seconds` the one in work; `used` all
    seconds of fitting so far; `records` what the report will say; `tensors` parameters ("now/..",
    "best/..") and Adam's moments ("adam/..").
    """

    done: list[str] = field(default_factory=list)
    task: str = ""
    step: int = 0
    task_seconds: float = 0.0
    used: float = 0.0
    cpu: float = 0.0
    resumed: int = 0
    best: float | None = None
    lr_factor: float = 1.0
    loss_before: float | None = None
    skipped: int = 0
    records: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


_FIELDS = [f for f in FitState.__dataclass_fields__ if f != "tensors"]


class StateFolder:
    """Reads and writes `FitState` in one folder that belongs to one fit."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.number = 0

    def load(self) -> FitState | None:
        """The saved state, or None if nothing was saved here yet.

        Raises:
            FitError: the folder belongs to another fit, holds something else, or is damaged.
        """
        if not self.folder.exists():
            return None
        if not self.folder.is_dir():
            raise FitError(f"state folder {self.folder}: is a file; name a folder")
        record = self.folder / RECORD
        if not record.exists():
            self._check_empty()
            return None
        data = self._record(record)
        self.number = int(data["number"])
        tensors = self._tensors(str(data["file"]), str(data["sha256"]))
        return FitState(**data["state"], tensors=tensors)

    def save(self, state: FitState) -> None:
        """Write beside, then rename; the older tensors go last. `FitError` if it can not."""
        name = f"tensors-{self.number + 1}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / f"{name}.part"
            # not save_file: its errors are not OSErrors
            part.write_bytes(save({k: v.detach().contiguous() for k, v in state.tensors.items()}))
            digest = _sha256(part)
            part.replace(self.folder / name)
            data = {
                "schema": SCHEMA,
                "key": self.key,
                "number": self.number + 1,
                "file": name,
                "sha256": digest,
                "state": {f: getattr(state, f) for f in _FIELDS},
            }
            beside = self.folder / f"{RECORD}.part"
            beside.write_text(json.dumps(data))
            os.replace(beside, self.folder / RECORD)
            self.number += 1
            for old in self.folder.glob("tensors-*"):
                if old.name != name:
                    old.unlink(missing_ok=True)
        except OSError as error:
            with contextlib.suppress(OSError):
                (self.folder / f"{name}.part").unlink()
            told = error.strerror or error
            raise FitError(f"state folder {self.folder}: can not be written ({told})") from error

    @torch.no_grad()
    def put_back(self, module: nn.Module, state: FitState) -> None:
        """Copy the saved parameters into `module`; `FitError` before any, if one does not fit."""
        named = dict(module.named_parameters())
        saved = {
            key.removeprefix("now/"): value
            for key, value in state.tensors.items()
            if key.startswith("now/")
        }
        for name, value in saved.items():
            if name not in named or named[name].shape != value.shape:
                raise FitError(f"state folder {self.folder}: {name!r} does not fit")
        for name, value in saved.items():
            named[name].copy_(value)

    def _check_empty(self) -> None:
        foreign = [p.name for p in self.folder.iterdir() if not p.name.startswith("tensors-")]
        foreign = [n for n in foreign if n != f"{RECORD}.part"]
        if foreign:
            raise FitError(
                f"state folder {self.folder}: holds other files ({', '.join(sorted(foreign)[:3])});"
                " name an empty folder"
            )

    def _record(self, path: Path) -> dict[str, Any]:
        damaged = (
            f"state folder {self.folder}: {RECORD} is damaged; delete the folder to start anew"
        )
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise FitError(damaged) from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise FitError(damaged)
        if data.get("key") != self.key:
            raise FitError(
                f"state folder {self.folder}: belongs to another fit (other model, plan, seed, "
                "recipe or data); name another folder, or delete it to start anew"
            )
        state = data.get("state")
        if not isinstance(state, dict) or set(state) != set(_FIELDS) or "sha256" not in data:
            raise FitError(damaged)
        return data

    def _tensors(self, name: str, digest: str) -> dict[str, Tensor]:
        path = self.folder / Path(name).name
        try:
            if _sha256(path) != digest:
                raise FitError(
                    f"state folder {self.folder}: {name} is damaged; "
                    "delete the folder to start anew"
                )
            loaded: dict[str, Tensor] = load_file(path)
        except OSError as error:
            raise FitError(f"state folder {self.folder}: {name} is missing") from error
        return loaded


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fit_key(
    module: nn.Module,
    plan: Plan,
    seed: int,
    recipe: Mapping[str, Any],
    batches: Sequence[Mapping[str, Tensor]],
) -> str:
    """What makes two fits the same: weights, plan, seed, recipe and data, as a sha256."""
    digest = hashlib.sha256()
    digest.update(json.dumps([plan.to_json(), seed, dict(recipe)], sort_keys=True).encode())
    for name, value in sorted(module.state_dict().items()):
        _feed(digest, name, value)
    for batch in batches:
        for name in sorted(batch):
            _feed(digest, name, batch[name])
    return digest.hexdigest()


def _feed(digest: Any, name: str, value: Tensor) -> None:
    flat = value.detach().cpu().contiguous().flatten()
    digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().tobytes())

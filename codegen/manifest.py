"""Manifest: what an artifact says about itself; the member manifest.json of a .rwa file."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from codegen.specs import TensorSpec
from codegen.target import Target
from passes.errors import ArtifactError

SCHEMA = 1
_DISTRIBUTIONS = ("attention-rewriter", "apache-tvm", "apache-tvm-ffi")


@dataclass(frozen=True)
class Member:
    """Size in bytes and sha256 (hex) of one member of the file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything needed to decide whether and how to run an artifact.

    `target` is a Target as plain data, `features` the processor features its code needs,
    `entry` the function that takes the inputs and then the weights. `weights` are the weights'
    names in the order the code takes them; `aliases` maps those stored under another name (equal
    tensors are stored once). `peak_memory` is in bytes, None where unknown. `decode` is empty but
    for an artifact that generates tokens (codegen/decoding.py). `members` is filled in when the
    file is written.
    """

    name: str
    target: Mapping[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[str, ...]
    features: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "float32"
    peak_memory: int | None = None
    entry: str = "main"
    created: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    members: Mapping[str, Member] = field(default_factory=dict)
    decode: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def with_members(self, members: Mapping[str, Member]) -> Manifest:
        """The same manifest for a file with these members."""
        return replace(self, members=dict(members))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        data: dict[str, Any] = {"schema": self.schema}
        for key in ("name", "created", "entry", "precision", "peak_memory"):
            data[key] = getattr(self, key)
        for key in ("target", "versions", "aliases", "plan"):
            data[key] = dict(getattr(self, key))
        if self.decode:
            data["decode"] = dict(self.decode)
        data["features"], data["weights"] = list(self.features), list(self.weights)
        data["inputs"] = [spec.to_json() for spec in self.inputs]
        data["outputs"] = [spec.to_json() for spec in self.outputs]
        data["members"] = {
            name: {"size": m.size, "sha256": m.sha256} for name, m in self.members.items()
        }
        return data

    @classmethod
    def from_json(cls, data: Any, where: str) -> Manifest:
        """Inverse of `to_json`; `ArtifactError` naming `where` if it is not a manifest."""
        if not isinstance(data, Mapping) or not isinstance(data.get("schema"), int):
            raise ArtifactError(f"{where}: its manifest is not one of this tool's")
        if data["schema"] != SCHEMA:
            raise ArtifactError(
                f"{where}: made with format {data['schema']}, this version reads format {SCHEMA}; "
                "compile the model again or use the matching version of attention-rewriter"
            )
        try:
            manifest = cls(**_fields(data))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{where}: its manifest is damaged ({error!r})") from error
        _check(manifest, where)
        return manifest


def _fields(data: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        key: str(data[key]) for key in ("name", "created", "entry", "precision")
    }
    fields |= {key: dict(data[key]) for key in ("target", "versions", "aliases", "plan")}
    fields |= {key: tuple(str(v) for v in data[key]) for key in ("features", "weights")}
    for key in ("inputs", "outputs"):
        fields[key] = tuple(TensorSpec.from_json(spec) for spec in data[key])
    fields["decode"] = dict(data.get("decode") or {})
    peak = data["peak_memory"]
    fields["peak_memory"] = None if peak is None else int(peak)
    fields["members"] = {
        str(name): Member(int(m["size"]), str(m["sha256"])) for name, m in data["members"].items()
    }
    return fields


def _check(manifest: Manifest, where: str) -> None:
    names = [spec.name for spec in manifest.inputs]
    if len(set(names)) != len(names):
        raise ArtifactError(f"{where}: two inputs have one name: {', '.join(names)}")
    for spec in (*manifest.inputs, *manifest.outputs):
        try:
            known = np.dtype(spec.dtype).kind in "biuf" and min(spec.shape, default=0) >= 0
        except TypeError:
            known = False
        if not known:
            raise ArtifactError(f"{where}: tensor {spec.name!r} is of no kind this version knows")
    if not manifest.outputs:
        raise ArtifactError(f"{where}: its manifest names no output")


def make_manifest(
    name: str,
    target: Target,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    weights: Sequence[str],
    *,
    plan: Mapping[str, Any] | None = None,
    precision: str = "float32",
    peak_memory: int | None = None,
    entry: str = "main",
) -> Manifest:
    """A manifest made now, by the versions installed here; `weights` in the order of the code."""
    return Manifest(
        name=name,
        target=_as_read(target.to_json()),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        weights=tuple(weights),
        features=tuple(target.features),
        plan=_as_read(plan or {}),
        precision=precision,
        peak_memory=peak_memory,
        entry=entry,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=installed_versions(),
    )


def _as_read(data: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back (lists for tuples), so that a manifest equals itself read again."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(data)))
    return plain


def installed_versions() -> dict[str, str]:
    """Versions that decide whether an artifact runs; "" for one that is not installed."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def why_other_version(manifest: Manifest) -> str:
    """Why the TVM installed here can not run it ("" when it can): 0.27 code needs a 0.27 runtime.

    A TVM that is not installed as a package (a bare runtime library) is taken on trust.
    """
    installed = installed_versions()
    for name in ("apache-tvm", "apache-tvm-ffi"):
        made, here = manifest.versions.get(name, ""), installed[name]
        if made and here and made.split(".")[:2] != here.split(".")[:2]:
            return f"it was compiled with {name} {made} and {here} is installed; compile it again"
    return ""

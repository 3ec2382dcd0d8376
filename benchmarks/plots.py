"""Plots of the results as SVG: time against tokens, and what each kernel reaches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Results = Mapping[str, Mapping[str, Any]]
SHOWN = 10  # kernels in a plot


def draw(results: Results, folder: Path) -> list[Path]:
    """Write the plots there is data for; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [_against_tokens(model, results, folder) for model in sorted(_models(results))]
    made += [_kernels(name, result, folder) for name, result in sorted(results.items())]
    return [path for path in made if path is not None]


def _models(results: Results) -> set[str]:
    return {str(r["model"]) for r in results.values()}


def _points(model: str, results: Results) -> dict[str, list[tuple[int, float]]]:
    """(tokens, median ms) by engine, single samples only."""
    found: dict[str, list[tuple[int, float]]] = {}
    for result in results.values():
        if result["model"] != model or result["options"].get("batch", 1) != 1:
            continue
        for row in result["engines"]:
            if row.get("median_ms"):
                point = (int(result["tokens"]), float(row["median_ms"]))
                found.setdefault(row["engine"], []).append(point)
    return {name: sorted(points) for name, points in found.items()}


def _against_tokens(model: str, results: Results, folder: Path) -> Path | None:
    points = _points(model, results)
    if max((len({t for t, _ in p}) for p in points.values()), default=0) < 2:
        return None
    figure, axes = _figure(7.0, 4.6)
    for name, line in sorted(points.items(), key=lambda item: not item[0].startswith("ours")):
        ours = name.startswith("ours")
        axes.plot(
            *zip(*line, strict=True), marker="o", label=name, linewidth=2.2 if ours else 1.2,
            linestyle="-" if ours else "--",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds a call (median)")
    axes.set_title(f"{model}: time against tokens")
    axes.grid(which="major", linewidth=0.4)
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, folder / f"time-{model.replace('_', '-')}.svg")


def _kernels(name: str, result: Mapping[str, Any], folder: Path) -> Path | None:
    rows = [k for k in result.get("profile", {}).get("kernels", ()) if k.get("gflops") is not None]
    if not rows:
        return None
    peak, rows = float(result["peaks"]["gflops"]), rows[:SHOWN]
    figure, axes = _figure(7.0, 1.0 + 0.34 * len(rows))
    labels = [f"{k['name']} ({k['rule']}, {k['share']:.0%} of time)" for k in rows]
    axes.barh(range(len(rows)), [100 * k["gflops"] / peak for k in rows], color="#3465a4")
    axes.set_yticks(range(len(rows)), labels=labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(f"% of the measured peak ({peak:.0f} GFLOP/s)")
    axes.set_title(f"{name}: share of the peak per kernel")
    return _save(figure, folder / f"kernels-{name.replace('_', '-')}.svg")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> Path:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})
    return path

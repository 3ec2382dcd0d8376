"""The demo: a real sentence encoder through the whole line, explained in a page.

MiniLM (six attentions, real weights from an installed package) is traced, its attentions are
replaced by linear ones and fitted on real sentences, everything is compiled for this processor,
verified, and timed against PyTorch in the same session.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewriter.report import RewriteReport
    from rewriter.timings import BenchResult

Progress = Callable[..., None]
Bars = Callable[[str], Any]


@dataclass(frozen=True)
class DemoResult:
    """What the demo made: the report of the rewritten model, timings of both, and the files."""

    report: RewriteReport
    rewritten: BenchResult
    exact: BenchResult
    files: dict[str, Path]

    def to_json(self) -> dict[str, Any]:
        """Plain data: the report's fields, with the timings of both artifacts."""
        return {
            **self.report.to_json(),
            "bench": {"rewritten": self.rewritten.to_json(), "exact": self.exact.to_json()},
            "files": {name: str(path) for name, path in self.files.items()},
        }


def demo(
    folder: Path,
    *,
    model: str = "minilm",
    form: str = "hedgehog",
    tokens: int = 512,
    fit_seconds: float = 170.0,
    peers: tuple[str, ...] = ("eager",),
    threads: int | None = None,
    bars: Bars,
) -> DemoResult:
    """Run the whole line on `model` and leave artifacts, rewritten model and report in `folder`.

    `bars(title)` is a context manager that gives a progress callable.
    """
    from passes.form import form_named
    from rewriter.api import compile as compile_artifact
    from rewriter.api import rewrite
    from rewriter.bench import bench
    from rewriter.folder import save_rewritten
    from rewriter.models import load_model
    from rewriter.outputs import make_folder
    from rewriter.samples import samples_for

    form_named(form)
    make_folder(folder, "--output")
    loaded = load_model(model, tokens=tokens)
    fit_on, held_out = samples_for(loaded, None, dynamic=True)
    files = {
        "rewritten": folder / f"{model}-{form}.rwa",
        "exact": folder / f"{model}-exact.rwa",
        "model": folder / f"{model}-{form}",
        "page": folder / "report.html",
        "report": folder / "report.json",
    }
    with bars("fit") as progress:
        result = rewrite(
            loaded.model,
            loaded.example_inputs,
            form=form,
            fit_seconds=fit_seconds,
            data=fit_on,
            held_out=held_out,
            dynamic_shapes="auto",
            name=loaded.name,
            progress=progress,
        )
    with bars("compile") as progress:
        compile_artifact(result, path=files["rewritten"], threads=threads, progress=progress)
        compile_artifact(
            loaded.model,
            loaded.example_inputs,
            path=files["exact"],
            form="exact",
            name=loaded.name,
            threads=threads,
            progress=progress,
        )
    timed = {}
    for kind in ("rewritten", "exact"):
        with bars(f"time the {kind} artifact") as progress:
            timed[kind] = bench(
                files[kind], model=model, engines=peers, threads=threads, progress=progress
            )
    report = result.report.with_timings(timed["rewritten"])
    exact_ratio = _against_eager(timed["exact"])
    if exact_ratio is not None:
        report = report.with_notes(
            f"The same model compiled with every attention exact took {exact_ratio:.2f} of eager "
            "PyTorch's time in the same session."
        )
    result.report = report
    report.save(files["report"])
    report.save_html(files["page"])
    save_rewritten(result, files["model"])
    return DemoResult(report, timed["rewritten"], timed["exact"], files)


def _against_eager(timings: BenchResult) -> float | None:
    """Our median by eager's; None where one of them did not run."""
    medians = {row.engine: row.median_ms for row in timings.engines}
    ours, eager = medians.get("ours"), medians.get("eager")
    return ours / eager if ours and eager else None

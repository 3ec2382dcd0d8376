"""Pages of docs/ that are made from a record in ``rewriter/records/``, where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

RECORDS = Path(__file__).parent / "records"
RECALL, BREAK_EVEN = RECORDS / "recall.json", RECORDS / "break_even.json"
RECALL_IMAGE, BREAK_EVEN_IMAGE = "images/recall.png", "images/break-even.png"


def measured_pages() -> dict[str, Callable[[], str]]:
    """By file name, what makes the text of each page whose record is there."""
    pages = {"recall.md": (RECALL, recall_page), "break-even.md": (BREAK_EVEN, break_even_page)}
    return {name: page for name, (record, page) in pages.items() if record.exists()}


def recall_page() -> str:
    """docs/recall.md."""
    from rewriter.recall import Cell
    from rewriter.recall_view import page
    from rewriter.record import read_record

    data, cells = read_record(RECALL, "cells", lambda row: Cell(**row))
    return page(data, cells, RECALL_IMAGE)


def break_even_page() -> str:
    """docs/break-even.md."""
    from rewriter.break_even import Curve
    from rewriter.break_even_view import page
    from rewriter.record import read_record

    data, curves = read_record(BREAK_EVEN, "curves", Curve.from_json)
    return page(data, curves, BREAK_EVEN_IMAGE)


def draw_pictures(docs: Path) -> None:
    """The pictures of those pages below `docs`."""
    from rewriter import break_even_view, recall_view
    from rewriter.break_even import Curve
    from rewriter.recall import Cell
    from rewriter.record import read_record

    if RECALL.exists():
        _, cells = read_record(RECALL, "cells", lambda row: Cell(**row))
        recall_view.picture(cells, docs / RECALL_IMAGE)
    if BREAK_EVEN.exists():
        _, curves = read_record(BREAK_EVEN, "curves", Curve.from_json)
        break_even_view.picture(curves, docs / BREAK_EVEN_IMAGE)

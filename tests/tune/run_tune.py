"""`python -m tests.tune.run_tune FOLDER MINUTES`: tunes the small model, for tests that kill it."""

from __future__ import annotations

import sys
from pathlib import Path

from rewriter.api import tune
from tests.tune.models import two

if __name__ == "__main__":
    model, inputs = two()
    tune(model, inputs, session=Path(sys.argv[1]), minutes=float(sys.argv[2]), on_noop="ok")

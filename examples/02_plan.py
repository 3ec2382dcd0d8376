"""Choose forms by module path, save the plan, edit it, and apply it to a new trace."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rewriter import Plan, rewrite
from rewriter.models import load_model


def main() -> None:
    loaded = load_model("vit-tiny")
    rules = {"layers.[0-3].*": "hedgehog", "layers.[4-7].*": "elu"}
    result = rewrite(loaded.model, loaded.example_inputs, rules=rules)
    print(result.report.summary())

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        result.plan.save(path)
        text = path.read_text().replace('"elu"', '"exact"')  # as by hand
        path.write_text(text)
        again = rewrite(loaded.model, loaded.example_inputs, plan=Plan.load(path))
    for site, choice in again.plan.choices.items():
        print(f"{site}: {choice.form} ({choice.status}, {choice.why})")


if __name__ == "__main__":
    main()

"""doctor: it finds what is wrong, and finds nothing wrong where nothing is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rewriter import doctor

GOOD_VERSIONS = {
    name: {"installed": "1.0", "tested": "1.0"}
    for name in doctor.WATCHED
    if name != "apache-tvm-ffi"
} | {"apache-tvm-ffi": {"installed": "0.1.14.post1", "tested": "0.1.14.post1"}}


def good() -> dict[str, Any]:
    places = dict.fromkeys(doctor.PACKAGES, "/home/project/x")
    tools = {"gcc": {"path": "/usr/bin/gcc", "version": "12", "use": "links"}}
    return {"versions": dict(GOOD_VERSIONS), "packages": places, "tools": tools, "tvm": {}}


def whats(facts: dict[str, Any], level: str) -> list[str]:
    return [f["what"] for f in doctor.findings(facts) if f["level"] == level]


def test_nothing_wrong_is_nothing_found() -> None:
    assert doctor.findings(good()) == []


@pytest.mark.parametrize("version", ["0.1.15", "0.1.15.post2", "0.1.16.dev1", "0.2.0", "1.0"])
def test_the_ffi_that_crashes_is_an_error(version: str) -> None:
    facts = good()
    facts["versions"]["apache-tvm-ffi"] = {"installed": version, "tested": None}
    assert any("crashes" in what for what in whats(facts, "error"))


def test_untested_versions_warn_and_local_parts_do_not() -> None:
    facts = good()
    facts["versions"]["torch"] = {"installed": "2.13.0+cpu", "tested": "2.13.0"}
    assert doctor.findings(facts) == []
    facts["versions"]["torch"] = {"installed": "2.14.1", "tested": "2.13.0"}
    assert whats(facts, "warning") == ["torch 2.14.1 is not the tested 2.13.0"]


def test_missing_distributions_matter_only_where_they_are_needed() -> None:
    facts = good()
    facts["versions"]["openvino"] = {"installed": None, "tested": "2026.4.1"}
    assert doctor.findings(facts) == []
    facts["versions"]["torch"] = {"installed": None, "tested": "2.13.0"}
    assert whats(facts, "error") == ["torch is not installed"]


def test_a_shadowing_package_is_an_error() -> None:
    facts = good()
    facts["packages"] = {"rewriter": "/a/rewriter", "passes": "/b/passes", "codegen": "/a/codegen"}
    assert whats(facts, "error") == ["package passes comes from /b/passes, rewriter from /a"]
    facts["packages"]["codegen"] = ""
    assert "package codegen is not found" in whats(facts, "error")


def test_no_linker_and_broken_tvm_are_errors_and_come_first() -> None:
    facts = good()
    facts["tools"] = {"gcc": {"path": None, "version": None, "use": "links"}}
    facts["tvm"] = {"error": "OSError: libtvm.so"}
    facts["versions"]["numpy"] = {"installed": "2", "tested": "1"}
    found = doctor.findings(facts)
    assert [f["level"] for f in found] == ["error", "error", "warning"]
    assert all(f["do"] for f in found)


def test_pins_are_read_from_the_constraints_file(tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("# a comment\ntorch==2.13.0\nJinja2==3.1.6  # why\nnumpy>=1\n\n")
    assert doctor.pins(path) == {"torch": "2.13.0", "jinja2": "3.1.6"}
    assert doctor.pins(tmp_path / "none") == {}
    assert doctor.pins()["apache-tvm-ffi"].startswith("0.1.14")


def test_this_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = doctor.diagnose()
    json.dumps(facts, allow_nan=False)
    root = Path(doctor.__file__).parent.parent
    assert {Path(p).parent for p in facts["packages"].values()} == {root}
    assert "llvm" in facts["tvm"]["enabled"]
    assert facts["cpu"]["usable_cores"] >= 1
    assert facts["targets"]["cpu"] == "" or "features" in facts["targets"]["cpu"]
    assert set(facts["engines"]) >= {"ours", "eager"}
    assert facts["ok"] is not any(f["level"] == "error" for f in facts["findings"])
    console = Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(doctor.render(facts))
    shown = console.export_text()
    for words in ("apache-tvm-ffi", "engine eager", "target cpu", str(root / "passes")):
        assert words in shown


def test_tvm_that_can_not_be_imported_is_reported_not_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import codegen.tvm_facts

    def broken() -> dict[str, Any]:
        raise OSError("libtvm.so: cannot open shared object file")

    monkeypatch.setattr(codegen.tvm_facts, "tvm_facts", broken)
    assert "cannot open" in doctor._tvm()["error"]


def test_findings_are_shown_with_what_to_do() -> None:
    facts = doctor.diagnose()
    facts["findings"] = [{"level": "error", "what": "[red]odd[/red]", "do": "do this"}]
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(doctor.render(facts))
    assert "error: [red]odd[/red]; do this" in console.export_text()

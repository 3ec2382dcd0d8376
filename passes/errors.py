"""Every error a user can meet, as a small tree. Importing this imports nothing heavy.

A message names the argument, says what was wrong and what to do. The command line shows the
message alone (no traceback) and turns `exit_code` into the process's exit status.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RewriterError(Exception):
    """Base of all errors meant for a user. `exit_code` 1: the work failed; 2: wrong use."""

    exit_code = 1


class UsageError(RewriterError):
    """The call itself was wrong: a bad argument, a name that does not exist, a bad file."""

    exit_code = 2


class UnknownName(UsageError):
    """A form, target, model, pass or engine name that does not exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        options = sorted(known)
        near = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(options)}."
        super().__init__(f"unknown {kind} {name!r}; {hint}")
        self.kind, self.name, self.near = kind, name, near


class ModelError(UsageError):
    """MODEL could not be turned into a module with example inputs."""


class TraceError(RewriterError):
    """The model could not be traced; carries torch's own suggestion where it gives one."""


class PlanError(UsageError):
    """A plan that can not be read or does not fit the model."""


class UnmatchedRule(PlanError):
    """A rule or site name of the user's that matches no site."""


class NothingRewritten(RewriterError):
    """The whole work would have changed nothing; the message says why for every site."""


class FormError(RewriterError):
    """A form was asked to do something it refuses (the verdict is in the message)."""


class FitError(RewriterError):
    """Fitting could not go on (empty or non-finite calibration data, a foreign state folder)."""


class LoweringError(RewriterError):
    """The graph could not be lowered, scheduled or compiled for the target."""


class ArtifactError(RewriterError):
    """An artifact file that is damaged, altered, foreign to this machine or not writable."""


class PathError(UsageError, ArtifactError):
    """A path the call names: an artifact that is not there, an output that can not be written."""


class InputError(UsageError):
    """An input of an artifact or model: wrong name, shape, dtype or value."""


class TuningError(RewriterError):
    """A tuning session that can not be opened or continued."""


class VerifyError(RewriterError):
    """The compiled code does not agree with the model it was compiled from."""

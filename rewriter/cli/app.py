"""The typer application: discovers the verbs and turns errors into messages and exit codes."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import typer

from passes.errors import RewriterError
from rewriter.cli.output import errors

# In the order of `rewriter --help`; each module has a function `verb`.
VERBS = (
    "sites", "explain", "forms", "targets", "models", "rewrite", "fit", "compile", "tune",
    "run", "verify", "bench", "energy", "recall", "report", "doctor", "demo",
)  # fmt: skip

# typer brings its own copy of click since 0.27: its base of all wrong use is found by name.
WrongUse: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

EPILOG = (
    "MODEL is a local Hugging Face folder, a hub id, a .pt2 file, package.module:factory, or a "
    "name listed by `rewriter models`. Add --debug to any command for tracebacks."
)


def build_app() -> typer.Typer:
    """The application with every verb."""
    app = typer.Typer(
        help="Rewrite the attention of trained PyTorch models and compile the result with TVM.",
        epilog=EPILOG,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    for name in VERBS:
        verb = importlib.import_module(f"rewriter.cli.{name}_verb").verb
        app.command(name, no_args_is_help=name not in _NO_ARGUMENTS)(_interruptible(verb))
    return app


class Interrupted(Exception):
    """A Ctrl-C with what it left behind: typer turns a KeyboardInterrupt into a bare exit code."""


def _interruptible(verb: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except KeyboardInterrupt as stop:
            raise Interrupted(str(stop)) from stop

    return run


_NO_ARGUMENTS = {"forms", "recall", "targets", "models", "doctor", "demo"}


def guarded(app: typer.Typer, argv: list[str], debug: bool) -> int:
    """Run `app`; a user's mistake becomes one line on stderr and an exit code."""
    if not debug:
        _quiet()
    with _watched_interrupts() as pressed:
        return _run(app, argv, debug, pressed)


def _run(app: typer.Typer, argv: list[str], debug: bool, pressed: list[int]) -> int:
    try:
        return _invoke(app, argv)
    except (KeyboardInterrupt, Interrupted) as stop:
        if debug:
            raise
        return _interrupted(str(stop))
    except RewriterError as error:
        if debug:
            raise
        _say(str(error))
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        if debug:
            raise
        if pressed:
            return _interrupted("")
        _say(f"{type(error).__name__}: {error} (unexpected: run again with --debug and report it)")
        return 1


def _interrupted(told: str) -> int:
    errors.print(f"interrupted. {told}".strip(), style="yellow", markup=False, highlight=False)
    return 130


@contextlib.contextmanager
def _watched_interrupts() -> Iterator[list[int]]:
    """A list that gets an entry at every Ctrl-C: the compiler's own code may turn one that comes
    while it calls back into Python into an error of another kind."""
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: nobody can press here
        yield pressed
        return
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _say(message: str) -> None:
    errors.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)


def _invoke(app: typer.Typer, argv: list[str]) -> int:
    command: Any = typer.main.get_command(app)
    try:
        code = command.main(args=argv, prog_name="rewriter", standalone_mode=False)
    except typer.Exit as done:
        return int(done.exit_code)
    except typer.Abort as stop:
        raise KeyboardInterrupt from stop
    except WrongUse as wrong:
        wrong.show()
        return 2
    return code if isinstance(code, int) else 0


def _quiet() -> None:
    """Libraries' warnings are for their developers; our own notes are in the report."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("torch", "transformers", "torch.export", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)

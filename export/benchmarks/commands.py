"""`latte-flow bench`: every subject measures its sides in turns, in one run, and prints the machine."""

from __future__ import annotations

from importlib import import_module

import typer

from export.benchmarks.report import app
from runtime.errors import missing_extra

__all__ = ["app"]

SUBJECTS = {
    "ablations": "export",
    "batch": "export,cpu,batch",
    "calls": "export,cpu",
    "gateway": "export,cpu,gateway",
    "generation": "export,cpu",
    "int8": "export,cpu",
    "memory": "export,cpu",
    "precision": "export,cpu",
    "provider": "export,cpu",
    "scale-out": "export",
    "serving": "export,cpu,triton",
    "soak": "export,cpu,triton",
    "stages": "export,cpu",
    "steps": "export,cpu",
    "understanding": "export,cpu",
}
"""The extras that each needs. One whose extras are not installed says so, and the others run."""

ANY_ARGUMENTS = {"ignore_unknown_options": True, "allow_extra_args": True}


def _add(subject: str, extra: str) -> None:
    try:
        if "triton" in extra:
            import_module("tritonclient")  # which these subjects import when they need it, in the middle of a run
        import_module(f"export.benchmarks.{subject.replace('-', '_')}")  # registers its command
    except ModuleNotFoundError as error:
        missing = missing_extra(f"bench {subject}", error, extra)

        @app.command(subject, help=str(missing), no_args_is_help=False, context_settings=ANY_ARGUMENTS)
        def not_installed(context: typer.Context) -> None:
            raise missing


for _subject, _extra in SUBJECTS.items():
    _add(_subject, _extra)

"""`latte-flow bench`: every subject measures its sides in turns, in one run, and prints the machine."""

from __future__ import annotations

from importlib import import_module

from export.benchmarks.report import app
from runtime.errors import missing_extra

__all__ = ["app"]

SUBJECTS = {
    "ablations": "export",
    "batch": "export,cpu,batch,ray",
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


def _add(subject: str, extra: str) -> None:
    try:
        import_module(f"export.benchmarks.{subject.replace('-', '_')}")  # registers its command
    except ModuleNotFoundError as error:
        missing = missing_extra(f"bench {subject}", error, extra)

        @app.command(subject, help=f"Not installed: {missing}", no_args_is_help=False)
        def not_installed() -> None:
            raise missing


for _subject, _extra in SUBJECTS.items():
    _add(_subject, _extra)

"""The command `latte-flow build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import TaskID
from rich.table import Table

from export.plans.build import BuildOptions, Decision, HardwareCompatibility, build_plans
from export.plans.profiles import axes_of, parse_choices
from runtime.console import progress_bar, stdout
from runtime.manifest import Manifest, PlanBackend, load_manifest


def build(
    bundle: Annotated[Path, typer.Argument(help="Folder that `latte-flow export` wrote.")],
    backend: Annotated[PlanBackend, typer.Option(help="tensorrt-rtx builds without a GPU.")] = "tensorrt",
    engines: Annotated[list[str] | None, typer.Option(help="Build this one alone; may be repeated.")] = None,
    minimum: Annotated[list[str] | None, typer.Option("--min", metavar="AXIS=N", help="Smallest size.")] = None,
    optimum: Annotated[list[str] | None, typer.Option("--opt", metavar="AXIS=N", help="Size to be fastest at.")] = None,
    maximum: Annotated[list[str] | None, typer.Option("--max", metavar="AXIS=N", help="Largest size.")] = None,
    optimization_level: Annotated[int | None, typer.Option(help="Builder's effort.", min=0, max=5)] = None,
    workspace: Annotated[int, typer.Option(help="Limit of scratch memory, MiB.", min=1)] = 4096,
    timing_cache: Annotated[Path | None, typer.Option(help="Read and written, so that builds get quicker.")] = None,
    version_compatible: Annotated[bool, typer.Option("--version-compatible", help="For later TensorRTs too.")] = False,
    hardware_compatibility: Annotated[HardwareCompatibility, typer.Option(help="For other GPUs too.")] = "none",
    compute_capability: Annotated[list[str] | None, typer.Option(help="8.9, …, or current; tensorrt-rtx.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say what would be built and why, and stop.")] = False,
) -> None:
    """Build TensorRT plans from a bundle's graphs; those that are up to date are kept.

    Shapes follow from the bundle's named axes. An axis is static where --min, --opt and --max are equal;
    N,N,… makes several profiles.

    \b
    Examples:
      latte-flow build bundle
      latte-flow build bundle --max rows=32 --opt rows=8 --engines expert_0 --engines expert_1
      latte-flow build bundle --backend tensorrt-rtx --compute-capability 8.9 --explain
    """
    options = BuildOptions(
        backend=backend,
        optimization_level=optimization_level,
        workspace_mib=workspace,
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        hardware_compatibility=hardware_compatibility,
        compute_capabilities=tuple(compute_capability or ()),
    )
    manifest = load_manifest(bundle)
    chosen = [manifest.engine(name) for name in engines or ()] or manifest.engines
    asked = {"minimum": minimum or (), "optimum": optimum or (), "maximum": maximum or ()}
    choices = parse_choices(asked, axes_of(chosen))
    with progress_bar() as progress:
        tasks: dict[str, TaskID] = {}

        def on_progress(engine: str, phase: str, done: int, total: int) -> None:
            if engine not in tasks:
                tasks[engine] = progress.add_task(engine)
            progress.update(tasks[engine], description=f"{engine}: {phase.lower()}", completed=done, total=total)

        report = build_plans(bundle, options, engines or (), choices, dry_run=explain, on_progress=on_progress)
        for engine, task in tasks.items():
            progress.update(task, description=engine, completed=1, total=1)
    stdout.print(_explained(report.decisions) if explain else _built(report.decisions, report.manifest, backend))


def _explained(decisions: tuple[Decision, ...]) -> Table:
    table = Table("engine", "", "because")
    for decision in decisions:
        table.add_row(decision.engine, "build" if decision.build else "keep", decision.reason)
    return table


def _built(decisions: tuple[Decision, ...], manifest: Manifest, backend: PlanBackend) -> Table:
    table = Table("engine", "", "seconds", "peak MB", "plan MB", "profiles", "inspected")
    for decision in decisions:
        plan = manifest.engine(decision.engine).plan(backend)
        assert plan is not None
        table.title = f"{backend} {plan.version}, for {', '.join(plan.architectures)}"
        table.add_row(
            decision.engine,
            "built" if decision.build else "kept",
            f"{plan.build_seconds:.1f}",
            f"{plan.build_peak_bytes / 1e6:.0f}",
            f"{plan.file.size / 1e6:.1f}",
            str(len(plan.profiles)),
            "yes" if plan.inspected else "no driver",
        )
    return table

"""The command `latte-flow build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import TaskID
from rich.table import Table

from export.plans.build import BuildOptions, Decision, HardwareCompatibility, build_plans
from export.plans.profiles import axes_of, parse_choices
from runtime.console import progress_bar, renamed_option, stdout
from runtime.manifest import Manifest, PlanProvider, load_manifest


def build(
    bundle: Annotated[Path, typer.Argument(help="Folder that `latte-flow export` wrote.")],
    provider: Annotated[
        PlanProvider, typer.Option(help="TensorRT to build with; tensorrt-rtx needs no GPU.")
    ] = "tensorrt",
    engine: Annotated[list[str] | None, typer.Option(help="Build only this engine; may be repeated.")] = None,
    minimum: Annotated[list[str] | None, typer.Option("--min", metavar="AXIS=N", help="Smallest size.")] = None,
    optimum: Annotated[list[str] | None, typer.Option("--opt", metavar="AXIS=N", help="Size to optimise for.")] = None,
    maximum: Annotated[list[str] | None, typer.Option("--max", metavar="AXIS=N", help="Largest size.")] = None,
    optimization_level: Annotated[int | None, typer.Option(help="Effort of the builder.", min=0, max=5)] = None,
    workspace: Annotated[int, typer.Option(help="Limit of scratch memory in MiB.", min=1)] = 4096,
    timing_cache: Annotated[Path | None, typer.Option(help="File that makes later builds faster.")] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Build plans that later TensorRT versions can run.")
    ] = False,
    hardware_compatibility: Annotated[
        HardwareCompatibility, typer.Option(help="Build plans that other GPUs can run.")
    ] = "none",
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="GPU to build for with tensorrt-rtx: 8.9, …, or current; may be repeated.")
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Build plans whose weights can be replaced; experts are built once.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be built, and why.")] = False,
    backend: Annotated[PlanProvider | None, typer.Option(hidden=True)] = None,
    engines: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
    explain: Annotated[bool | None, typer.Option("--explain", hidden=True)] = None,
) -> None:
    """Build TensorRT plans from a bundle's graphs. Plans that are up to date are kept.

    Shapes follow from the bundle's named axes. An axis is static if --min, --opt and --max are equal; N,N,… makes
    several profiles.

    \b
    Examples:
      latte-flow build bundle
      latte-flow build bundle --max rows=32 --opt rows=8 --engine expert_0 --engine expert_1
      latte-flow build bundle --provider tensorrt-rtx --compute-capability 8.9 --dry-run
    """
    provider = renamed_option("--backend", backend, "--provider", provider, "tensorrt")
    engine = renamed_option("--engines", engines, "--engine", engine)
    dry_run = renamed_option("--explain", explain, "--dry-run", dry_run, False)
    options = BuildOptions(
        provider=provider,
        optimization_level=optimization_level,
        workspace_mib=workspace,
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        hardware_compatibility=hardware_compatibility,
        compute_capabilities=tuple(compute_capability or ()),
        refit=refit,
    )
    manifest = load_manifest(bundle)
    chosen = [manifest.engine(name) for name in engine or ()] or manifest.engines
    asked = {"minimum": minimum or (), "optimum": optimum or (), "maximum": maximum or ()}
    choices = parse_choices(asked, axes_of(chosen))
    with progress_bar() as progress:
        tasks: dict[str, TaskID] = {}

        def on_progress(name: str, phase: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name)
            progress.update(tasks[name], description=f"{name}: {phase.lower()}", completed=done, total=total)

        report = build_plans(bundle, options, engine or (), choices, dry_run=dry_run, on_progress=on_progress)
        for name, task in tasks.items():
            progress.update(task, description=name, completed=1, total=1)
    stdout.print(_decided(report.decisions) if dry_run else _built(report.decisions, report.manifest, provider))


def _decided(decisions: tuple[Decision, ...]) -> Table:
    table = Table("engine", "", "because")
    for decision in decisions:
        table.add_row(decision.engine, "build" if decision.build else "keep", decision.reason)
    return table


def _built(decisions: tuple[Decision, ...], manifest: Manifest, provider: PlanProvider) -> Table:
    table = Table("engine", "", "seconds", "peak MB", "plan MB", "profiles", "inspected")
    for decision in decisions:
        plan = manifest.engine(decision.engine).plan(provider)
        assert plan is not None
        table.title = f"{provider} {plan.version}, for {', '.join(plan.architectures)}"
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

"""Which plan of an engine can run here; asked before a byte of it is deserialised."""

from __future__ import annotations

from pathlib import Path

from runtime.errors import BundleError
from runtime.manifest import EngineEntry, PlanBackend, PlanEntry


def usable_plan(
    bundle: Path, entry: EngineEntry, backend: PlanBackend, version: str, architecture: str | None
) -> PlanEntry:
    """The engine's plan.

    Args:
        version: of the TensorRT that would run it.
        architecture: of the GPU that would run it, "sm_89"; None where there is none.

    Raises:
        BundleError: there is no plan, or it is for another TensorRT or another GPU.
    """
    remedy = f"run: latte-flow build {bundle} --backend {backend}"
    plan = entry.plan(backend)
    if plan is None:
        raise BundleError(f"the bundle has no {backend} plan of {entry.name}; {remedy}")
    if not _reads(version, plan):
        raise BundleError(f"the plan of {entry.name} is of {backend} {plan.version}, this is {version}; {remedy}")
    if architecture is None:
        raise BundleError(f"the plan of {entry.name} runs on {', '.join(plan.architectures)}, and there is no GPU here")
    if not any(_covers(name, architecture) for name in plan.architectures):
        raise BundleError(
            f"the plan of {entry.name} is for {', '.join(plan.architectures)}, this GPU is {architecture}; {remedy}"
        )
    return plan


def _reads(version: str, plan: PlanEntry) -> bool:
    if version == plan.version:
        return True
    ours, its = ([int(part) for part in text.split(".") if part.isdigit()] for text in (version, plan.version))
    return plan.version_compatible and ours[:1] == its[:1] and ours >= its


def _covers(name: str, architecture: str) -> bool:
    if not name.endswith("+"):
        return name == architecture
    oldest, ours = (int(text.removeprefix("sm_").rstrip("+")) for text in (name, architecture))
    return ours >= oldest

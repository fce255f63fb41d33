"""TensorRT plans: the two libraries that build and run them, and which plan of an engine can run here.

A plan is checked before a byte of it is deserialised.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from runtime.errors import BundleError
from runtime.manifest import EngineEntry, Manifest, PlanEntry, PlanProvider

OLDEST_WITH_FLOAT8 = 89
"""The first GPU architecture with products in FP8, as in "sm_89"."""


class TensorRTLibrary(NamedTuple):
    """A library with TensorRT's API."""

    module: str
    """Its Python module."""
    extra: str
    """The extra of `latte-flow` that installs it."""
    plan_file: str
    """Name of an engine's plan in its folder."""

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f'pip install "latte-flow[{self.extra}]"'


TENSORRT: dict[PlanProvider, TensorRTLibrary] = {
    "tensorrt": TensorRTLibrary("tensorrt", "tensorrt", "model.plan"),
    "tensorrt-rtx": TensorRTLibrary("tensorrt_rtx", "rtx", "model.rtx.plan"),
}

ALL_PLANS = "triton"
"""Name of the backend whose engines run elsewhere: any plan of the bundle may be what runs them."""


def usable_plan(
    bundle: Path, entry: EngineEntry, provider: PlanProvider, version: str, architecture: str | None
) -> PlanEntry:
    """Returns the engine's plan for a provider.

    Args:
        version: version of the TensorRT that would run it.
        architecture: architecture of the GPU that would run it, such as "sm_89"; None without a GPU.

    Raises:
        BundleError: there is no plan, or it needs another TensorRT or another GPU.
    """
    remedy = f"run: latte-flow build {bundle} --provider {provider}"
    plan = entry.plan(provider)
    if plan is None:
        raise BundleError(f"the bundle has no {provider} plan of {entry.name}; {remedy}")
    if not _reads(version, plan):
        raise BundleError(
            f"the plan of {entry.name} was built with {provider} {plan.version}; this is {version}; {remedy}"
        )
    if architecture is None:
        raise BundleError(f"the plan of {entry.name} runs on {', '.join(plan.architectures)}, and there is no GPU here")
    if not any(_covers(name, architecture) for name in plan.architectures):
        raise BundleError(
            f"the plan of {entry.name} is for {', '.join(plan.architectures)}; this GPU is {architecture}; {remedy}"
        )
    return plan


def most_in_plans(manifest: Manifest, provider: str, engine: str, axis: str, **others: int) -> int | None:
    """Returns the largest size of an engine's axis that its plans' profiles allow; None where no plan runs it.

    Args:
        provider: the backend's name; only TensorRT's backends run plans.
        others: sizes of other axes; only profiles that allow them count.
    """
    entry = manifest.engine(engine)
    plans = [plan for plan in entry.plans if provider in (plan.provider, ALL_PLANS)]
    limits = [
        max(
            (
                profile.axes[axis].max
                for profile in plan.profiles
                if axis in profile.axes and all(size in profile.axes[name] for name, size in others.items())
            ),
            default=None,
        )
        for plan in plans
    ]
    return min((limit for limit in limits if limit is not None), default=None)


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

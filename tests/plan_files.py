"""Plans that no TensorRT built: files with a name in them, and their entries in a bundle's manifest."""

from __future__ import annotations

from pathlib import Path

from export.plans.profiles import AxisChoices, profiles_of
from runtime.manifest import EngineEntry, PlanEntry, PlanProfile, PlanProvider, file_entry, load_manifest, save_manifest
from runtime.plans import TENSORRT

PLAN_VERSION = "11.4.0.106"
ARCHITECTURE = "sm_90"


Sizes = tuple[int, ...]


def add_plans(bundle: Path, provider: PlanProvider, **sizes: tuple[Sizes, Sizes, Sizes]) -> None:
    """Adds a plan of every engine to a bundle, with the profiles that `latte-flow build` would choose.

    Args:
        sizes: smallest, best and largest sizes of axes that are not to have the default ones.
    """
    manifest = load_manifest(bundle)
    choices = {axis: AxisChoices(*bounds) for axis, bounds in sizes.items()}
    engines = [
        plan_file(bundle, engine, provider, profiles_of(manifest, engine, choices)) for engine in manifest.engines
    ]
    save_manifest(manifest.model_copy(update={"engines": tuple(engines)}), bundle)


def plan_file(
    bundle: Path, engine: EngineEntry, provider: PlanProvider, profiles: tuple[PlanProfile, ...]
) -> EngineEntry:
    """Writes a plan of an engine; returns the engine's entry with it."""
    path = f"{engine.name}/{TENSORRT[provider].plan_file}"
    (bundle / path).write_text(f"{provider}: a plan of {engine.name} in {bundle}")
    plan = PlanEntry(
        provider=provider,
        file=file_entry(bundle, path),
        version=PLAN_VERSION,
        version_compatible=False,
        architectures=(ARCHITECTURE,),
        profiles=profiles,
        ingredients={},
        inspected=False,
        build_seconds=0,
        build_peak_bytes=0,
    )
    return engine.model_copy(update={"plans": (plan,)})

"""`manifest.json`: what a bundle is and holds.

An export writes it into a temporary folder with the engines; the rename of that folder completes the bundle. The
schema is versioned: a reader refuses any other version. A manifest can only name files inside its bundle.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from runtime.errors import BundleError
from runtime.files import sha256_of, write_text
from runtime.flow_time import ExpertSchedule, SamplingDefaults

SCHEMA_VERSION = 7
FILE_NAME = "manifest.json"

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
PlanProvider = Literal["tensorrt", "tensorrt-rtx"]
EngineRole = Literal["vision_encoder", "vlm", "expert", "solver_step", "vae_decoder"]
Rung = Literal["input", "weights", "graph", "engine", "step", "trajectory", "image", "answer"]
DType = Literal["float32", "float16", "bfloat16", "int64", "bool", "uint8"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(_Frozen):
    """One input or output. An axis is a number, or the name of a size that may vary."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]


class FileEntry(_Frozen):
    """One file of the bundle."""

    path: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path:
            raise ValueError(f"a bundle's file must be a relative path inside it, got {path!r}")
        return path


class AxisRange(_Frozen):
    """The sizes that an axis may have in one optimisation profile. It is static where all three are equal."""

    min: int = Field(ge=0)
    opt: int
    max: int

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"expected min <= opt <= max, got {self.min}, {self.opt}, {self.max}")
        return self

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max


class PlanProfile(_Frozen):
    """One optimisation profile of a plan, over the engine's named axes."""

    name: str
    axes: dict[str, AxisRange]


class PlanEntry(_Frozen):
    """A TensorRT plan that was built from an engine's graph."""

    provider: PlanProvider
    file: FileEntry
    version: str = Field(description="version of TensorRT, or of TensorRT for RTX, that built it")
    version_compatible: bool = Field(description="whether later minor versions can read it too")
    architectures: tuple[str, ...] = Field(
        min_length=1, description='GPUs that can run it: "sm_89", or "sm_80+" for that and later ones'
    )
    profiles: tuple[PlanProfile, ...] = Field(min_length=1)
    ingredients: dict[str, str] = Field(description="everything that the plan depends on; it is stale if one differs")
    inspected: bool = Field(description="whether the built engine's layers were found to have the right precision")
    build_seconds: float
    build_peak_bytes: int = Field(description="largest resident memory of the process that built it")


class Quantization(_Frozen):
    """How an engine in 8 bits was made. Matrix products are named by their weights."""

    reduced_range: bool = Field(description="whether weights have 7 bits, for CPUs whose 8-bit products saturate")
    error: float = Field(description="relative error of what the engine is for, on runs that the choice did not see")
    quantized: tuple[str, ...]
    kept: tuple[str, ...] = Field(description="products left in fp32 because they are too sensitive")


class EngineEntry(_Frozen):
    """One engine: its ONNX graph first, then its external data."""

    name: str
    role: EngineRole
    group: int | None = Field(default=None, description="expert group; only experts have one")
    precision: Precision
    opset: int
    fused: bool = Field(description="whether it was rewritten for ONNX Runtime, so that nothing else can run it")
    files: tuple[FileEntry, ...] = Field(min_length=1)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    quantization: Quantization | None = None
    plans: tuple[PlanEntry, ...] = ()

    @property
    def axes(self) -> frozenset[str]:
        """Names of all input axes whose size may vary."""
        return frozenset(axis for spec in self.inputs for axis in spec.shape if isinstance(axis, str))

    def input(self, name: str) -> TensorSpec:
        """Returns the input of that name; raises `BundleError` if there is none."""
        for spec in self.inputs:
            if spec.name == name:
                return spec
        raise BundleError(f"engine {self.name} has no input {name!r}; export the bundle again")

    def plan(self, provider: PlanProvider) -> PlanEntry | None:
        """Returns the plan for a provider, or None if none was built."""
        return next((plan for plan in self.plans if plan.provider == provider), None)


class Geometry(_Frozen):
    """Sizes that the runtime needs."""

    latent_channels: int = Field(ge=1)
    latent_size: tuple[int, int]
    vae_scale_factor: int = Field(ge=1)
    num_hidden_layers: int
    layers_per_group: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    variant: str


class PromptFormat(_Frozen):
    """What tokenising a prompt needs besides the tokenizer's files and the chat template."""

    pad_token_id: int = Field(ge=0)
    max_tokens: int = Field(ge=1, description="largest number of tokens of a prompt in its chat template")
    special_tokens: tuple[str, ...] = Field(description="texts that a prompt or a message must not contain")


class Understanding(_Frozen):
    """What answering a question about images needs besides the tokenizer's and the image processor's files."""

    image_token_id: int = Field(ge=0, description="token that is replaced by an image's embeddings")
    eos_token_ids: tuple[int, ...] = Field(min_length=1, description="tokens that end an answer")
    patch_size: int = Field(ge=1, description="in pixels")
    spatial_merge_size: int = Field(ge=1, description="patches per token, in each direction")
    max_context_tokens: int = Field(ge=1, description="largest number of tokens of a conversation with its answer")


class ParityRow(_Frozen):
    """One measurement of a verification."""

    rung: Rung
    what: str
    group: int | None = None
    step: int | None = None
    metric: Literal["relative_error", "psnr_db", "bias_levels", "differences"]
    value: float | None = Field(description="None if it is not finite")
    tolerance: float
    passed: bool
    note: str | None = Field(default=None, description="where a value that is not finite came from, or what differs")


class Manifest(_Frozen):
    """The whole description of a bundle."""

    schema_version: int
    producer: dict[str, str] = Field(description="versions of the packages that wrote the bundle")
    checkpoint_sha256: str = Field(description="over the checkpoint's weights, configs, tokenizer and processor")
    precision: Precision
    geometry: Geometry
    schedule: ExpertSchedule
    sampling: SamplingDefaults
    prompt: PromptFormat
    understanding: Understanding
    engines: tuple[EngineEntry, ...]
    tokenizer_files: tuple[FileEntry, ...]
    parity: tuple[ParityRow, ...] | None = Field(default=None, description="None if it was not verified")

    def engine(self, name: str) -> EngineEntry:
        """Returns the engine of that name; raises `BundleError` if there is none."""
        for entry in self.engines:
            if entry.name == name:
                return entry
        raise BundleError(f"the bundle has no engine {name!r}; it has {', '.join(e.name for e in self.engines)}")

    def tokenizer_file(self, bundle: Path, name: str) -> Path:
        """Returns the path of a tokenizer or processor file.

        Raises:
            BundleError: the bundle lacks it, or it was altered.
        """
        for entry in self.tokenizer_files:
            if entry.path == name:
                return check_file(bundle, entry)
        raise BundleError(f"{bundle} contains no {name}; export the checkpoint again")

    def files(self) -> list[FileEntry]:
        """Lists all files of the export once. Plans are not among them: whoever opens a plan checks it."""
        entries = [file for engine in self.engines for file in engine.files] + list(self.tokenizer_files)
        return list({entry.path: entry for entry in entries}.values())

    def bundle_hash(self) -> str:
        """Returns a short hash of the bundle's files and of what the manifest says of the model and its engines.

        Versions, plans and reports do not change it.
        """
        described = self.model_dump_json(exclude={"producer", "parity", "engines"})
        engines = [engine.model_dump_json(exclude={"plans"}) for engine in self.engines]
        return hashlib.sha256("\n".join([described, *engines]).encode()).hexdigest()[:16]


def load_manifest(bundle: Path) -> Manifest:
    """Reads and checks `manifest.json`, and that every file it names exists with the right size.

    Raises:
        BundleError: there is no bundle, it is incomplete, or it has another schema version.
    """
    path = bundle / FILE_NAME
    if not bundle.is_dir():
        raise BundleError(f"no bundle at {bundle}: expected a folder that `latte-flow export` wrote")
    if not path.is_file():
        raise BundleError(
            f"{bundle} contains no {FILE_NAME}: it is not a bundle, or not a complete one; export the checkpoint again"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.get("schema_version") if isinstance(content, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema version {version}, this latte-flow reads {SCHEMA_VERSION}; upgrade latte-flow"
            )
        if isinstance(version, int) and version < SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema version {version}, this latte-flow reads {SCHEMA_VERSION}; export the bundle again"
            )
        manifest = Manifest.model_validate(content)
    except (ValidationError, ValueError) as error:
        detail = error.errors()[0] if isinstance(error, ValidationError) else None
        where = f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" if detail else str(error)
        raise BundleError(f"{path} is not a valid manifest: {where}; export the bundle again") from error
    for entry in manifest.files():
        file = bundle / entry.path
        if not file.is_file():
            raise BundleError(f"{bundle} is incomplete: {entry.path} is missing; export it again")
        if file.stat().st_size != entry.size:
            raise BundleError(
                f"{file} has {file.stat().st_size} bytes, the manifest says {entry.size}; export the bundle again"
            )
    return manifest


def save_manifest(manifest: Manifest, bundle: Path) -> None:
    """Writes `manifest.json` under a temporary name, then renames it."""
    write_text(bundle / FILE_NAME, manifest.model_dump_json(indent=2) + "\n")


def file_entry(bundle: Path, path: str) -> FileEntry:
    """Returns the manifest's entry for a file in the bundle."""
    file = bundle / path
    return FileEntry(path=path, sha256=sha256_of(file), size=file.stat().st_size)


def read_file(bundle: Path, entry: FileEntry) -> bytes:
    """Returns the content of a file after checking it against the manifest.

    Raises:
        BundleError: the file was altered.
    """
    content = (bundle / entry.path).read_bytes()
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise BundleError(_altered(bundle / entry.path))
    return content


def check_file(bundle: Path, entry: FileEntry) -> Path:
    """Returns the path of a file after checking its content against the manifest.

    Raises:
        BundleError: the file was altered.
    """
    path = bundle / entry.path
    if sha256_of(path) != entry.sha256:
        raise BundleError(_altered(path))
    return path


def _altered(path: Path) -> str:
    return f"{path} was altered after the export (its SHA-256 differs); export the bundle again"

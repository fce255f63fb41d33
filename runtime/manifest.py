"""`manifest.json`: what a bundle is and holds. Written last, so its presence means complete.

The schema is versioned. A reader refuses what is newer than itself, and a manifest can only name
files inside its bundle.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from runtime.errors import BundleError
from runtime.files import write_text
from runtime.schedule import ExpertSchedule

SCHEMA_VERSION = 4
FILE_NAME = "manifest.json"

Precision = Literal["fp32", "fp16", "bf16", "int8"]
PlanBackend = Literal["tensorrt", "tensorrt-rtx"]
DType = Literal["float32", "float16", "bfloat16", "int64", "bool", "uint8"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(_Frozen):
    """One input or output: an axis is a number, or the name of a symbolic size."""

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
    """What an axis may be in one optimisation profile; static where all three are equal."""

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

    backend: PlanBackend
    file: FileEntry
    version: str = Field(description="of TensorRT, or of TensorRT for RTX; no other reads the plan")
    version_compatible: bool = Field(description="a later minor version may read it too")
    architectures: tuple[str, ...] = Field(
        min_length=1, description='GPUs that run it: "sm_89", or "sm_80+" for that and later ones'
    )
    profiles: tuple[PlanProfile, ...] = Field(min_length=1)
    ingredients: dict[str, str] = Field(description="all that the plan depends on; it is stale when one differs")
    inspected: bool = Field(description="whether the built engine's layers were seen to have the precision asked for")
    build_seconds: float
    build_peak_bytes: int = Field(description="largest resident memory of the process that built it")


class Quantization(_Frozen):
    """How an int8 engine was made from its fp32 form. Products are named by their weights."""

    reduced_range: bool = Field(description="weights have 7 bits, for CPUs whose 8-bit products saturate")
    error: float = Field(description="relative, that it makes in the engine's outputs on the runs it was measured on")
    quantized: tuple[str, ...]
    kept: tuple[str, ...] = Field(description="too sensitive, left in fp32")


class EngineEntry(_Frozen):
    """One engine: its ONNX graph first, then its external data."""

    name: str
    group: int | None = Field(default=None, description="expert group, for experts")
    precision: Precision
    opset: int
    fused: bool = Field(description="rewritten by ONNX Runtime's optimisers, so it runs on ONNX Runtime only")
    files: tuple[FileEntry, ...] = Field(min_length=1)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    quantization: Quantization | None = None
    plans: tuple[PlanEntry, ...] = ()

    def plan(self, backend: PlanBackend) -> PlanEntry | None:
        """The plan for a backend, if one was built."""
        return next((plan for plan in self.plans if plan.backend == backend), None)


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
    """The VLM's chat template around one user turn: the prompt stands between `before` and `after`."""

    before: str
    after: str
    pad_token_id: int = Field(ge=0)
    max_tokens: int = Field(ge=1, description="limit of the prompt with the template, in tokens")
    special_tokens: tuple[str, ...] = Field(description="refused inside a prompt")


class Understanding(_Frozen):
    """What answering a question about images needs beside the tokenizer's and the image processor's files."""

    image_token_id: int = Field(ge=0, description="stands where an image's embeddings go")
    eos_token_ids: tuple[int, ...] = Field(min_length=1, description="each ends an answer")
    patch_size: int = Field(ge=1, description="pixels")
    spatial_merge_size: int = Field(ge=1, description="patches of a token, in each direction")
    max_context_tokens: int = Field(ge=1, description="limit of a conversation with its images and its answer")


class ParityRow(_Frozen):
    """One measurement of the verification."""

    rung: Literal["engine", "step", "trajectory", "image", "answer"]
    what: str
    group: int | None = None
    step: int | None = None
    metric: Literal["relative_error", "psnr_db"]
    value: float | None = Field(description="None: not finite")
    tolerance: float
    passed: bool
    note: str | None = Field(default=None, description="where a value that is not finite came from")


class Manifest(_Frozen):
    """The whole description of a bundle."""

    schema_version: int
    producer: dict[str, str] = Field(description="versions that wrote the bundle")
    checkpoint_sha256: str = Field(description="over the checkpoint's weights and config")
    precision: Precision
    geometry: Geometry
    schedule: ExpertSchedule
    prompt: PromptFormat
    understanding: Understanding
    engines: tuple[EngineEntry, ...]
    tokenizer_files: tuple[FileEntry, ...]
    parity: tuple[ParityRow, ...] | None = Field(default=None, description="None: exported without verification")

    def engine(self, name: str) -> EngineEntry:
        """The engine of that name."""
        for entry in self.engines:
            if entry.name == name:
                return entry
        raise BundleError(f"the bundle has no engine {name!r}; it has {', '.join(e.name for e in self.engines)}")

    def files(self) -> list[FileEntry]:
        """All files of the export, each once. Plans come and go; whoever opens one checks it."""
        entries = [file for engine in self.engines for file in engine.files] + list(self.tokenizer_files)
        return list({entry.path: entry for entry in entries}.values())

    def bundle_hash(self) -> str:
        """Short name of the bundle's content: of all file hashes, not of dates or reports."""
        digest = hashlib.sha256("".join(sorted(entry.sha256 for entry in self.files())).encode())
        return digest.hexdigest()[:16]


def load_manifest(bundle: Path) -> Manifest:
    """Reads and checks `manifest.json`, and that every file it names is there in its size.

    Raises:
        BundleError: no bundle, an incomplete one, or one of another schema.
    """
    path = bundle / FILE_NAME
    if not bundle.is_dir():
        raise BundleError(f"no bundle at {bundle}: expected a folder that `latte-flow export` wrote")
    if not path.is_file():
        raise BundleError(
            f"{bundle} holds no {FILE_NAME}: it is no bundle, or its export did not finish; export it again"
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
    """The entry of a file that lies in the bundle."""
    file = bundle / path
    return FileEntry(path=path, sha256=sha256_of(file), size=file.stat().st_size)


def check_file(bundle: Path, entry: FileEntry) -> Path:
    """The path of a file, once its content is known to be what the manifest says.

    Raises:
        BundleError: it was altered.
    """
    path = bundle / entry.path
    if sha256_of(path) != entry.sha256:
        raise BundleError(f"{path} was altered after the export (its SHA-256 differs); export the bundle again")
    return path


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""What a training run would need, from the shapes of its tensors: nothing is loaded, and no memory is taken.

Parameters, floating-point operations and activations are counted on fake tensors, which have shapes and no data. Only
the time is an estimate: operations divided by a rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from latte.checkpoint import load_config, own_state, share_with_vlm
from latte.config import LatteFlowConfig
from latte.model import FlowTransformer, group_of_weight
from latte.paper import PAPER, vae_config_of, vlm_config_of
from latte.training.optimizers import is_inner
from latte.training.run import frozen_dtype
from latte.training.settings import TrainSettings
from latte.training.states import rows_of_a_step
from runtime.console import stdout
from runtime.errors import InputError

PAPER_NAME = "paper"
"""The name of the paper's sizes, of which there is no checkpoint."""
PROMPT_TOKENS = 32
"""Tokens of a prompt in its chat template, such as "a photo of a golden retriever"."""
TFLOPS = 989.0
"""Peak of an H100 in bf16 without sparsity, in TFLOP/s."""
UTILISATION = 0.4
"""Share of the peak that training reaches."""
GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """The configs of a model's three parts."""

    flow: LatteFlowConfig
    vlm: Qwen2VLConfig
    vae: dict[str, Any]

    @classmethod
    def of(cls, checkpoint: str | Path) -> Sizes:
        """Reads the configs of a checkpoint, whose weights need not be there, or returns the paper's for `paper`."""
        if str(checkpoint) == PAPER_NAME:
            return cls(PAPER, vlm_config_of(PAPER), vae_config_of(PAPER.latent_channels))
        path = Path(checkpoint)
        vlm = Qwen2VLConfig.from_pretrained(path / "vlm", local_files_only=True)
        return cls(load_config(path), vlm, AutoencoderDC.load_config(path / "vae", local_files_only=True))

    def at(self, height: int, width: int) -> Sizes:
        """Returns the configs for images of another size in pixels.

        Raises:
            InputError: it is no multiple of the autoencoder's factor.
        """
        factor = self.flow.vae_scale_factor
        if height % factor or width % factor:
            raise InputError(f"--resolution must be multiples of {factor} pixels, got {height}x{width}")
        latent_size = (height // factor, width // factor)
        return replace(self, flow=self.flow.model_copy(update={"latent_size": latent_size}))


@dataclass(frozen=True)
class Needs:
    """What a run needs. Memory is in bytes for one process."""

    trained_parameters: int
    active_parameters: int
    """Parameters of the flow layers that a sampling step uses."""
    frozen_parameters: int
    weights: int
    """fp32."""
    optimizer: int
    """The moments: two of AdamW, one of Muon."""
    average: int
    gradients: int
    """Of one group, since a step trains one."""
    frozen: int
    """The VLM, in bf16 with mixed precision, and the autoencoder, in fp32."""
    prefix: int
    """Keys and values of the prompts, for all groups."""
    activations: int
    """What a forward pass keeps for the backward pass."""
    flops: int
    """Floating-point operations of a step on one process, of which those of encoding count once for all groups."""
    seconds: float
    """Time of a step at `UTILISATION` of `TFLOPS`."""
    rows: int
    """Rows of a step over all processes."""

    @property
    def memory(self) -> int:
        """Bytes of one process, all together."""
        kept = self.weights + self.optimizer + self.average + self.gradients
        return kept + self.frozen + self.prefix + self.activations


def needs_of(sizes: Sizes, settings: TrainSettings, num_processes: int, groups: Sequence[int] | None = None) -> Needs:
    """Counts what a training of the flow layers needs.

    Args:
        groups: the groups to train; all by default.
    """
    config = sizes.flow
    trained_groups = list(range(config.schedule.num_groups)) if groups is None else list(groups)
    bf16 = settings.mixed_precision == "bf16"
    with FakeTensorMode():
        flow = FlowTransformer(config)
        dtype = frozen_dtype(config, settings)
        vlm = Qwen2VLForConditionalGeneration._from_config(sizes.vlm, attn_implementation="eager", dtype=dtype)
        vae = AutoencoderDC.from_config(sizes.vae)
        for part in (vlm, vae):
            part.requires_grad_(False)
        if config.variant == "blend":
            share_with_vlm(flow, vlm)
        flow.gradient_checkpointing = settings.gradient_checkpointing
        own = own_state(flow)
        trained = _of_groups(own, config, trained_groups)
        inner = {name: p for name, p in trained.items() if settings.optimizer == "muon" and is_inner(name, p)}
        encoding, prefix = _encoding(config, vlm, vae, settings.train_batch_size)
        step, activations = _step(config, flow, trained_groups[0], settings.train_batch_size, bf16)
        sizes_of_frozen = [(p.numel(), p.element_size()) for part in (vlm, vae) for p in part.parameters()]
        active = _of_groups(own, config, trained_groups[:1])
    passes = settings.gradient_accumulation_steps
    flops = passes * (step + encoding // len(trained_groups))
    parts = num_processes if settings.sharding == "fsdp2" else 1
    return Needs(
        trained_parameters=_count(trained),
        active_parameters=_count(active),
        frozen_parameters=sum(count for count, _ in sizes_of_frozen),
        weights=4 * _count(own) // parts,
        optimizer=(8 * _count(trained) - 4 * _count(inner)) // parts,
        average=4 * _count(trained) // parts if settings.ema_decay else 0,
        gradients=4 * _count(active) // parts,
        frozen=sum(count * size for count, size in sizes_of_frozen),
        prefix=prefix * passes,
        activations=activations,
        flops=flops,
        seconds=flops / (UTILISATION * TFLOPS * 1e12),
        rows=rows_of_a_step(settings, num_processes),
    )


def _of_groups(parameters: Mapping[str, Tensor], config: LatteFlowConfig, groups: Sequence[int]) -> dict[str, Tensor]:
    """Returns the parameters of some groups, and those that all groups share."""
    return {name: p for name, p in parameters.items() if group_of_weight(name, config) in (None, *groups)}


def _count(parameters: Mapping[str, Tensor]) -> int:
    return sum(p.numel() for p in parameters.values())


def _encoding(
    config: LatteFlowConfig, vlm: Qwen2VLForConditionalGeneration, vae: AutoencoderDC, rows: int
) -> tuple[int, int]:
    """Returns the operations of encoding a batch, and the bytes of its prefix."""
    height, width = (config.vae_scale_factor * side for side in config.latent_size)
    dtype = vlm.dtype
    ids = torch.zeros(rows, PROMPT_TOKENS, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vlm.model.language_model(input_ids=ids, use_cache=False)
        vae.encode(torch.zeros(rows, 3, height, width))
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return counter.get_total_flops(), rows * PROMPT_TOKENS * token * dtype.itemsize


def _step(config: LatteFlowConfig, flow: FlowTransformer, group: int, rows: int, bf16: bool) -> tuple[int, int]:
    """Returns the operations of a forward and a backward pass, and the bytes that wait for the latter."""
    shape = (config.layers_per_group, 2, rows, config.num_key_value_heads, PROMPT_TOKENS, config.head_dim)
    prefix = torch.zeros(shape, dtype=torch.bfloat16 if bf16 else torch.float32)
    latents = torch.zeros(rows, config.latent_channels, *config.latent_size)
    mask = torch.ones(rows, PROMPT_TOKENS, dtype=torch.bool)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False),
        ):
            velocity = flow(latents, torch.zeros(rows), prefix, mask, group)
        velocity.float().square().mean().backward()
    weights = {p.untyped_storage()._cdata for p in flow.parameters()}
    activations = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
    return counter.get_total_flops(), activations


def print_needs(name: str, needs: Needs, settings: TrainSettings, num_processes: int) -> None:
    """Prints what a run needs, as a table."""
    rows = {
        "trained parameters": f"{needs.trained_parameters / 1e6:,.1f} M",
        "parameters of flow layers in a sampling step": f"{needs.active_parameters / 1e6:,.1f} M",
        "frozen parameters": f"{needs.frozen_parameters / 1e6:,.1f} M",
        "rows of a step": f"{needs.rows:,}",
        "FLOPs of a step and process": f"{needs.flops / 1e12:,.2f} T",
        f"time of a step at {UTILISATION:.0%} of {TFLOPS:g} TFLOP/s": f"{needs.seconds:.3f} s",
        f"time of {settings.max_train_steps:,} steps": f"{needs.seconds * settings.max_train_steps / 3600:,.1f} h",
    }
    table = Table("", name, title=f"Training on {num_processes} process(es)")
    for label, value in rows.items():
        table.add_row(label, value, end_section=label.startswith(("rows", "time of a")))
    table.add_section()
    for label in ("weights", "optimizer", "average", "gradients", "frozen", "prefix", "activations", "memory"):
        table.add_row(f"{label}, a process", f"{getattr(needs, label) / GIB:,.2f} GiB")
    stdout.print(table)


def as_dict(needs: Needs) -> dict[str, Any]:
    """Returns needs for JSON."""
    return {**asdict(needs), "memory": needs.memory}

"""The distillation of guidance and of steps into the flow layers, expert group by expert group.

A student starts as its teacher. The teacher goes through a group's interval in many guided steps, two rows each; the
student learns to go from the same start to the same end in one step or a few, with one row each: straight, as in
PeRFlow (arXiv 2405.07510), whose windows of flow time are the experts' intervals here. The loss is a squared error.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latte.model import LatteFlow, Prefix
from latte.sampling import guided
from latte.training.flow import Batches, FlowBatch, FlowStage, ImagesAndPrompts
from latte.training.stage import Rows, row_noise
from runtime.errors import InputError
from runtime.flow_time import SamplingDefaults


@dataclass(frozen=True)
class Distillation:
    """What to distil."""

    steps: tuple[int, ...]
    """Numbers of sampling steps that the student is for, the default first; each a multiple of the number of groups."""
    guidance_scale: float
    """The teacher's guidance scale, which the student has built in."""
    teacher_steps: int
    """Number of sampling steps of the teacher."""

    def sampling(self) -> SamplingDefaults:
        """Returns how the student is sampled."""
        return SamplingDefaults(
            num_inference_steps=self.steps[0],
            guidance_scale=self.guidance_scale,
            guidance_distilled=True,
            allowed_steps=tuple(sorted(self.steps)),
        )


@dataclass(frozen=True)
class DistillationBatch(FlowBatch):
    """The batch of one round on a device, of B rows."""

    empty: Prefix
    """The encoded empty prompt, of B rows."""


class DistillationStage(FlowStage):
    """Trains a student, the model's flow layers, to go through each group's interval as their former self does.

    Starts are, row by row in turn, where the student's own steps before the interval lead from noise, so that it
    learns to go on from its own errors, and data with noise, x_a = a·x₁ + (1 − a)·x₀.

    Raises:
        InputError: a number of steps cannot be split over the groups.
    """

    def __init__(self, model: LatteFlow, batches: Batches, how: Distillation) -> None:
        super().__init__(model, batches)
        groups = model.config.schedule.num_groups
        if wrong := [steps for steps in how.steps if steps < 1 or steps % groups]:
            raise InputError(f"--steps must be a multiple of the number of expert groups, {groups}; got {wrong[0]}")
        if model.config.sampling.guidance_distilled:
            raise InputError("the checkpoint is distilled already; give the one that it was made from")
        self.how = how
        counts = ", ".join(map(str, how.steps))
        self.name = f"flow in {counts} steps with guidance {how.guidance_scale:g} of {how.teacher_steps}"
        self._sampling_of_teacher = model.config.sampling
        self.teacher = copy.deepcopy(model.flow).requires_grad_(False).eval()
        self.autocast = False
        """Whether the teacher computes in bf16; the loop says so when it prepares a batch."""
        model.config = model.config.model_copy(update={"sampling": how.sampling()})

    @property
    def frozen(self) -> Sequence[nn.Module]:
        return (*super().frozen, self.teacher)

    def prepare(self, batch: ImagesAndPrompts, device: torch.device) -> DistillationBatch:
        self.autocast = torch.is_autocast_enabled(device.type)
        plain = super().prepare(batch, device)
        empty = self.model.encode_prompts([""]).rows([0] * len(plain.data))
        return DistillationBatch(plain.data, plain.prefix, empty)

    def prepare_to_validate(self, batch: ImagesAndPrompts, device: torch.device) -> DistillationBatch:
        return self.prepare(batch, device)

    def losses(
        self,
        module: nn.Module,
        prepared: DistillationBatch,  # type: ignore[override]
        step: int,
        rows: Rows,
    ) -> dict[str, Tensor]:
        group = self.groups[step % len(self.groups)]
        times = self._step_starts(group)
        time = times[step // len(self.groups) % len(times)]
        noise = row_noise(rows.generators(1, step), prepared.data.shape[1:], prepared.data.device)
        return {f"group_{group}": self.error_at(module, prepared, group, time, noise).square().mean()}

    def validation_times(self, group: int) -> list[float]:
        return sorted(set(self._step_starts(group)))

    def error_at(
        self,
        module: nn.Module,
        prepared: DistillationBatch,  # type: ignore[override]
        group: int,
        time: float | Tensor,
        noise: Tensor,
    ) -> Tensor:
        """Returns v(x_t, t) − (x_b − x_t)/(b − t), `[B, C, H, W]` float32.

        Args:
            time: t, the start of one of the student's steps in the group's interval [a, b).
            noise: x₀, `[B, C, H, W]` float32.
        """
        assert isinstance(time, float)
        _, end = self.model.config.schedule.interval(group)
        with torch.no_grad():
            x = self._starts(module, prepared, group, noise)  # x_a, [B, C, H, W]
            target = self._teach(prepared, group, x)  # x_b
            for t, t_next in self._student_steps(group, time):
                x = x + (t_next - t) * self._student(module, prepared, group, t, x)  # x_t in the end
        return self._student(module, prepared, group, time, x) - (target - x) / (end - time)

    def _step_starts(self, group: int) -> list[float]:
        """Returns the times at which the student's steps start in a group's interval, for each number of steps."""
        return [time for steps in self.how.steps for time in self._grid(group, steps)[:-1]]

    def _student_steps(self, group: int, time: float) -> list[tuple[float, float]]:
        """Returns the fewest steps of the student from the start of a group's interval to a time in it."""
        for steps in sorted(self.how.steps):
            grid = self._grid(group, steps)
            if time in grid[:-1]:
                return list(itertools.pairwise(grid[: grid.index(time) + 1]))
        raise ValueError(f"no step of {self.how.steps} starts at {time}")

    def _grid(self, group: int, steps: int) -> list[float]:
        """Returns the times of a group's interval when all groups together make this number of steps of the student."""
        return equal_parts(self.model.config.schedule.interval(group), steps // self.model.config.schedule.num_groups)

    def _starts(self, module: nn.Module, prepared: DistillationBatch, group: int, noise: Tensor) -> Tensor:
        """Returns where each row starts in a group's interval, `[B, C, H, W]`."""
        start, _ = self.model.config.schedule.interval(group)
        x = start * prepared.data + (1 - start) * noise
        led = range(0, len(noise), 2)
        own = noise[led]
        part = DistillationBatch(prepared.data[led], prepared.prefix.rows(led), prepared.empty.rows(led))
        for before in range(group):
            if before in self.groups:
                t, t_next = self.model.config.schedule.interval(before)
                own = own + (t_next - t) * self._student(module, part, before, t, own)
            else:  # another run trains it, or nobody
                own = self._teach(part, before, own)
        x[led] = own
        return x

    def _student(self, module: nn.Module, prepared: DistillationBatch, group: int, time: float, x: Tensor) -> Tensor:
        t = x.new_full((len(x),), time)
        v: Tensor = module(x, t, prepared.prefix.kv[group], prepared.prefix.mask, group)
        return v.float()

    def _teach(self, prepared: DistillationBatch, group: int, x: Tensor) -> Tensor:
        """Returns where the teacher leads from the start of a group's interval to its end, `[B, C, H, W]`."""
        start, end = self.model.config.schedule.interval(group)
        count = max(1, round(self.how.teacher_steps * (end - start)))
        rows = range(len(x))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False):
            for time in equal_parts((start, end), count)[:-1]:
                t = x.new_full((len(x),), time)
                scales = x.new_full((len(x),), self._sampling_of_teacher.row_scale(self.how.guidance_scale, time))
                conditional, unconditional = (
                    self.teacher(x, t, prefix.kv[group], prefix.mask, group).float()
                    for prefix in (prepared.prefix, prepared.empty)
                )
                x = x + (end - start) / count * guided(conditional, unconditional, rows, scales)
        return x


def equal_parts(interval: tuple[float, float], count: int) -> list[float]:
    """Returns the `count + 1` times that divide an interval of flow time into equal parts."""
    start, end = interval
    return [start + (end - start) * i / count for i in range(count + 1)]

"""The training loop of all stages, on Hugging Face accelerate: one process or many, DDP or FSDP2.

The loop is the same whatever the number of processes: rows of a step are numbered over all of them (see
`latte.training.stage`), and the gradient is that of the mean over all rows.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    ProjectConfiguration,
)
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latte.training.average import averaged, update_average
from latte.training.log import LOG, RunLog
from latte.training.optimizers import make_optimizers
from latte.training.settings import TrainSettings
from latte.training.stage import Rows, Stage
from latte.training.states import (
    Trained,
    hash_of_frozen,
    load_state,
    newest_state,
    put_aside_after,
    rows_of_a_step,
    save_state,
    whole,
)
from runtime.console import stderr
from runtime.errors import InputError, TrainingError
from runtime.files import make_writable_folder

SHARDED_LAYER = "FlowLayer"
"""The class of which FSDP2 shards every instance as a unit."""


@dataclass(frozen=True)
class Validation:
    """What to do every so many steps, and at the last, with the averaged weights in place."""

    every: int
    run: Callable[[int], dict[str, float]]
    """Takes the number of steps done; returns figures for the log. All processes call it."""


def make_accelerator(
    settings: TrainSettings, run_dir: Path | None = None, report_to: tuple[str, ...] = ()
) -> Accelerator:
    """Returns the accelerator for a run.

    Args:
        run_dir: where trackers write.
        report_to: accelerate's trackers, such as "tensorboard" or "wandb".

    Raises:
        InputError: a tracker is not installed, or the weights are to be split over a single process.
    """
    # Accelerate keeps one global state; the stages of a run may differ in precision.
    AcceleratorState._reset_state()
    plugin = None
    if settings.sharding == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[SHARDED_LAYER],
            cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT",
        )
    try:
        accelerator = Accelerator(
            # Without this, accelerate takes processes on a machine that has no accelerator for runs of their own.
            cpu=settings.cpu or not torch.accelerator.is_available(),
            mixed_precision=settings.mixed_precision,
            fsdp_plugin=plugin,
            log_with=list(report_to) or None,
            project_config=ProjectConfiguration(project_dir=str(run_dir), logging_dir=str(run_dir / "logs"))
            if run_dir
            else None,
            kwargs_handlers=[
                # A step uses one expert group, so most parameters have no gradient.
                DistributedDataParallelKwargs(find_unused_parameters=True),
                # A bf16 copy of a weight that no-grad code cached would be reused without gradients.
                AutocastKwargs(cache_enabled=False),
            ],
        )
    except (ImportError, ValueError) as error:
        raise InputError(f"training cannot be set up: {error}") from error
    if plugin is not None and accelerator.num_processes == 1:
        raise InputError(
            "--sharding fsdp2 splits the weights over processes, and there is one; start several with torchrun"
        )
    return accelerator


def train(
    stage: Stage,
    settings: TrainSettings,
    run_dir: Path,
    accelerator: Accelerator | None = None,
    validation: Validation | None = None,
    resume_from: Path | None = None,
    identity: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Trains a stage for `settings.max_train_steps` steps, resuming from the newest state in `run_dir` if there is one.

    More steps than before extend a run. Writes into `run_dir`: `checkpoint-<step>/`, states; and `log.jsonl`. On
    SIGTERM and Ctrl-C it saves a state before it ends.

    Args:
        accelerator: see `make_accelerator`.
        resume_from: a state to start from instead of the newest; states after it are put aside, as `left-<step>`.
        identity: what else a resumed run must not change, by name.

    Returns:
        the trained parameters by name, whole and on the CPU: the average with `ema_decay`. The stage's module has them
        too.

    Raises:
        CheckpointError: the state was written with other settings or other frozen parts, has other parameters, or
            cannot be read.
        TrainingError: a loss or a gradient is not finite. The parameters are those of the step before.
        KeyboardInterrupt: the run was stopped; its state is saved.
    """
    make_writable_folder(run_dir)
    accelerator = accelerator or make_accelerator(settings)
    return _Run(stage, settings, run_dir, accelerator, validation, identity or {}).finish(resume_from)


class _Run:
    """A run in progress."""

    def __init__(
        self,
        stage: Stage,
        settings: TrainSettings,
        run_dir: Path,
        accelerator: Accelerator,
        validation: Validation | None,
        identity: Mapping[str, str],
    ) -> None:
        self.identity = identity
        self.stage, self.settings, self.run_dir = stage, settings, run_dir
        self.accelerator, self.validation = accelerator, validation
        self.device: torch.device = accelerator.device
        self.frozen_hash = hash_of_frozen(stage.module, stage.frozen)
        for part in stage.frozen:
            part.to(self.device)
        trainable = {name: p for name, p in stage.module.named_parameters() if p.requires_grad}
        self.module, *self.optimizers = accelerator.prepare(stage.module, *make_optimizers(trainable, settings))
        inner = accelerator.unwrap_model(self.module)
        self.parameters = {name: p for name, p in inner.named_parameters() if p.requires_grad}
        average = {name: p.detach().clone() for name, p in self.parameters.items()} if settings.ema_decay else {}
        self.trained = Trained(self.parameters, average, [optimizer.optimizer for optimizer in self.optimizers])
        self.rows = _rows_of_passes(settings, accelerator.num_processes, accelerator.process_index)
        self.step, self.seconds_before = 0, 0.0
        self.started = time.monotonic()
        self.saved_step = -1
        self.stopping = False

    def finish(self, resume_from: Path | None) -> dict[str, Tensor]:
        settings, accelerator = self.settings, self.accelerator
        if (state := resume_from or newest_state(self.run_dir)) is not None:
            self.step, self.seconds_before = load_state(
                state,
                self.trained,
                self.stage.name,
                settings,
                accelerator.num_processes,
                self.frozen_hash,
                self.identity,
            )
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                put_aside_after(self.run_dir, self.step)
            self.saved_step = self.step
        log = RunLog(self.run_dir / LOG, self.step) if accelerator.is_main_process else None
        last_save = time.monotonic()
        with self._stopped_by_signals(), self._progress() as progress:
            for batches in self._batches():
                prepared = [self._prepare(batch) for batch in batches]
                for _ in range(self._steps_left_of_batch()):
                    overdue = time.monotonic() - last_save > settings.checkpointing_seconds
                    values, norm, save, stop = self._one_step(prepared, overdue)
                    self.step += 1
                    if log is not None:
                        log.add(values)
                    if self._is_due(settings.logging_steps):
                        self._report(log, norm, progress)
                    if save or stop or self.step % settings.checkpointing_steps == 0:
                        self._save()
                        last_save = time.monotonic()
                    if self.validation is not None and self._is_due(self.validation.every):
                        self._validate()
                    if stop:
                        raise KeyboardInterrupt
        self._save()
        with torch.no_grad():
            for name, value in self.trained.average.items():
                self.parameters[name].copy_(value)
        return {name: whole(p) for name, p in self.parameters.items()}

    def _batches(self) -> Iterator[list[Any]]:
        """Yields batches, one for each forward pass, that serve the next `stage.steps_per_batch` steps."""
        settings, per_batch = self.settings, self.stage.steps_per_batch
        indices = range(self.step // per_batch, -(-settings.max_train_steps // per_batch))
        parts = [(index, rows) for index in indices for rows in self.rows]
        loader: DataLoader[Any] = DataLoader(
            _Batches(self.stage),
            batch_size=None,
            sampler=parts,
            num_workers=settings.dataloader_num_workers,
            collate_fn=_as_it_is,
        )
        batches = iter(loader)
        for _ in indices:
            yield [next(batches) for _ in self.rows]

    def _is_due(self, every: int) -> bool:
        """Returns whether the step is one of every so many, or the last."""
        return self.step % every == 0 or self.step == self.settings.max_train_steps

    def _prepare(self, batch: Any) -> Any:
        with torch.no_grad(), self.accelerator.autocast():
            return self.stage.prepare(batch, self.device)

    def _steps_left_of_batch(self) -> int:
        per_batch = self.stage.steps_per_batch
        return min(per_batch - self.step % per_batch, self.settings.max_train_steps - self.step)

    def _one_step(self, prepared: list[Any], overdue: bool) -> tuple[dict[str, float], float, bool, bool]:
        """Runs one step; returns its losses, the gradient's norm, whether to save, and whether to stop."""
        settings, accelerator, step = self.settings, self.accelerator, self.step
        torch.manual_seed((settings.seed * 1_000_003 + step) * accelerator.num_processes + accelerator.process_index)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * settings.share_of_learning_rate_at(step)
            optimizer.zero_grad(set_to_none=True)
        weights = [self.stage.weight(item) for item in prepared]
        (all_weights,) = self._sum([sum(weights)])
        names: list[str] = []
        sums: list[float] = []
        for rows, item, weight in zip(self.rows, prepared, weights, strict=True):
            with nullcontext() if rows is self.rows[-1] else accelerator.no_sync(self.module):
                losses = self.stage.losses(self.module, item, step, rows)
                # Gradients are averaged over processes, so that each counts by its share of all processes' weights.
                share = weight * accelerator.num_processes / all_weights
                accelerator.backward(sum(losses.values(), start=torch.zeros((), device=self.device)) * share)
            names = list(losses)
            values = [float(loss.detach()) * weight / all_weights for loss in losses.values()]
            sums = [a + b for a, b in zip(sums or [0.0] * len(values), values, strict=True)]
        norm = self._clip()
        *means, save, stop = self._sum([*sums, float(overdue and accelerator.is_main_process), float(self.stopping)])
        if not np.isfinite([norm, *means]).all():
            shown = ", ".join(f"{name} is {value}" for name, value in zip(names, means, strict=True))
            raise TrainingError(
                f"{self.stage.name}: at step {step} {shown}, and the gradient's norm is {norm}; lower the learning rate"
            )
        for optimizer in self.optimizers:
            optimizer.step()
        update_average(self.trained.average, self.parameters, settings.ema_decay, step)
        return dict(zip(names, means, strict=True)), norm, save > 0, stop > 0

    def _clip(self) -> float:
        norm = self.accelerator.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
        return float(norm)

    def _sum(self, values: list[float]) -> list[float]:
        """Returns the sums of values over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        return [float(value) for value in self.accelerator.reduce(tensor, "sum")]

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        metadata = {
            "stage": self.stage.name,
            "step": str(self.step),
            "seconds": f"{self._seconds():.1f}",
            "settings": self.settings.model_dump_json(),
            "rows": str(rows_of_a_step(self.settings, self.accelerator.num_processes)),
            "frozen": self.frozen_hash,
            "identity": json.dumps(dict(self.identity)),
        }
        limit = self.settings.checkpoints_total_limit
        save_state(self.run_dir, self.trained, metadata, limit, self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        self.saved_step = self.step

    def _validate(self) -> None:
        assert self.validation is not None
        with torch.no_grad(), self.accelerator.autocast(), averaged(self.parameters, self.trained.average):
            figures = self.validation.run(self.step)
        self.accelerator.log(figures, step=self.step)

    def _report(self, log: RunLog | None, norm: float, progress: _Progress) -> None:
        rate = self.settings.learning_rate * self.settings.share_of_learning_rate_at(self.step - 1)
        if log is not None:
            means = log.write(self.step, self._seconds(), learning_rate=rate, gradient_norm=norm)
            self.accelerator.log({**means, "learning_rate": rate, "gradient_norm": norm}, step=self.step)
            progress(self.step, "  ".join(f"{name} {value:.4f}" for name, value in means.items()))

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    @contextmanager
    def _progress(self) -> Iterator[_Progress]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        with Progress(*columns, console=stderr, disable=not self.accelerator.is_main_process) as progress:
            total = self.settings.max_train_steps
            task = progress.add_task(f"train {self.stage.name}", total=total, completed=self.step, loss="")
            yield lambda step, shown: progress.update(task, completed=step, loss=shown)

    @contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        """Lets SIGTERM and Ctrl-C stop the run after the step in progress; a Ctrl-C after that stops it at once.

        SIGTERM may come twice, to a process and to its group.
        """

        def stop(number: int, frame: FrameType | None) -> None:
            if self.stopping and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stopping = True

        try:
            previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, which alone may handle signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


_Progress = Callable[[int, str], None]


def _as_it_is(batch: Any) -> Any:
    return batch


class _Batches(Dataset[Any]):
    """A stage's batches, for PyTorch's `DataLoader`."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __getitem__(self, part: tuple[int, Rows]) -> Any:
        return self.stage.batch(*part)


def _rows_of_passes(settings: TrainSettings, num_processes: int, process: int) -> list[Rows]:
    """Returns the rows of one process in each forward pass of a step."""
    size, total = settings.train_batch_size, rows_of_a_step(settings, num_processes)
    firsts = range(process * size, total, num_processes * size)
    return [Rows(settings.seed, range(first, first + size), total) for first in firsts]

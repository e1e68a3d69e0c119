"""The training loop: AdamW, warm-up and cosine decay, clipping, early stopping, checkpoints, progress."""

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from serve.errors import ShipyardError

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and how much in all."""

CHECKPOINT_SECONDS = 15.0


def device() -> torch.device:
    """Return where to train: the first GPU that PyTorch sees, otherwise the CPU.

    An empty CUDA_VISIBLE_DEVICES keeps training on the CPU.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Return what a record calls a device: the card's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@dataclass
class Course:
    """What a training has seen so far: the loss of each step, and validation's as (step, value), the lower the better."""

    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, Tensor] | None = None

    @property
    def best_step(self) -> int:
        """The step after which validation was best."""
        return min(self.validation, key=lambda point: point[1])[0]

    def over(self, patience: int) -> bool:
        """Say whether validation has not become better `patience` times in a row."""
        return len(self.validation) > 0 and sum(step > self.best_step for step, _ in self.validation) >= patience


@dataclass(frozen=True)
class Training:
    """One phase of training of `module`.

    `loss_of` gives the loss of a step, by its number alone. `validate` is called every `every` steps and at the end; the
    weights that were best by it are kept, and the phase ends early when it was not better `patience` times in a row;
    without `keep_best` neither is done. `after` is called after each step. A phase that is not `resumable` writes no
    checkpoints.
    """

    name: str
    module: nn.Module
    groups: Sequence[dict[str, Any]]
    steps: int
    loss_of: Callable[[int], Tensor]
    validate: Callable[[], float]
    every: int
    patience: int = 3
    after: Callable[[int], None] = lambda step: None
    resumable: bool = True
    keep_best: bool = True
    weight_decay: float = 0.01

    def run(self, out: Path, progress: Progress) -> dict[str, Any]:
        """Train in place; go on from a checkpoint in `out` when there is one, which the caller removes when it is done.

        Returns:
            Steps taken, the best step, first and last loss, curves of training and validation, seconds.

        Raises:
            ShipyardError: a loss is no finite number.
        """
        parameters = [p for group in self.groups for p in group["params"]]
        optimiser = torch.optim.AdamW(list(self.groups), weight_decay=self.weight_decay, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, self.steps))
        file = out / f"{self.name}.checkpoint.pt"
        course = Course()
        if file.exists():
            # it may have been written on another device
            state = torch.load(file, weights_only=True, map_location="cpu")
            self.module.load_state_dict(state["module"])
            optimiser.load_state_dict(state["optimiser"])
            schedule.load_state_dict(state["schedule"])
            course = Course(state["losses"], [(int(s), v) for s, v in state["validation"]], state["best"])
        began = saved = time.monotonic()
        for step in range(len(course.losses), self.steps):
            if self.keep_best and course.over(self.patience):
                break
            self.module.train()
            torch.manual_seed(step)  # dropout draws the same after a restart
            loss = self.loss_of(step)
            self._check(loss, step)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            self.after(step)
            course.losses.append(float(loss.detach()))
            told = f", validation {course.validation[-1][1]:.4f}" if course.validation else ""
            progress(f"train {self.name}, loss {np.mean(course.losses[-20:]):.3f}{told}", step + 1, self.steps)
            if (step + 1) % self.every == 0 or step + 1 == self.steps:
                self._validate(course, step + 1)
            if self.resumable and time.monotonic() - saved > CHECKPOINT_SECONDS and step + 1 < self.steps:
                state = {
                    "module": self.module.state_dict(), "optimiser": optimiser.state_dict(),
                    "schedule": schedule.state_dict(), "losses": course.losses, "validation": course.validation,
                    "best": course.best,
                }  # fmt: skip
                torch.save(state, file.with_suffix(".tmp"))
                file.with_suffix(".tmp").replace(file)
                saved = time.monotonic()
        if course.best is not None:
            self.module.load_state_dict(course.best)
        self.module.eval()
        return self._record(course, time.monotonic() - began)

    def _validate(self, course: Course, step: int) -> None:
        self.module.eval()
        with torch.inference_mode():
            value = self.validate()
        self._check(torch.tensor(value), step)
        course.validation.append((step, value))
        if self.keep_best and course.best_step == step:
            # an ordinary tensor each, for one that was made in inference mode cannot be trained on
            course.best = {name: value.detach().clone() for name, value in self.module.state_dict().items()}

    def _check(self, loss: Tensor, step: int) -> None:
        if not torch.isfinite(loss):
            raise ShipyardError(
                f"finetune: {self.name}: loss is {float(loss.detach())} at step {step}", allowed="a finite number",
                mend="look for extreme values in the data, or take smaller batches",
            )  # fmt: skip

    def _record(self, course: Course, seconds: float) -> dict[str, Any]:
        losses, tenth = course.losses, max(1, len(course.losses) // 10)
        points = min(60, len(losses))
        return {
            "steps": len(losses),
            "steps_most": self.steps,
            "best_step": course.best_step,
            "loss_first": float(np.mean(losses[:tenth])),
            "loss_last": float(np.mean(losses[-tenth:])),
            "curve": [round(float(np.mean(part)), 4) for part in np.array_split(losses, points)],
            "validation_curve": [[step, round(value, 5)] for step, value in course.validation],
            "seconds": round(seconds, 1),
        }


def rate(step: int, steps: int) -> float:
    """Return the part of the learning rate at a step: linear warm-up over a tenth, then cosine decay to 0."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def by_rate(module: nn.Module, rates: dict[str, float], default: float) -> list[dict[str, Any]]:
    """Group a module's parameters by learning rate: of the first key that is a part of the parameter's dotted name.

    A layer's own "weight" or "bias" at the end of a name is no such part.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        *parts, last = name.split(".")
        parts += [] if last in ("weight", "bias") else [last]
        kind = next((kind for kind in rates if kind in parts), None)
        groups.setdefault(default if kind is None else rates[kind], []).append(parameter)
    return [{"params": members, "lr": rate} for rate, members in groups.items()]


def save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors so that a kill leaves the old file or the new one, never a part."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak of this process's memory for a record; on a GPU also the card's, since it was last asked for."""
    found = {"memory_mb": peak_memory_mb()}
    if device.type == "cuda":
        found["gpu_memory_mb"] = round(torch.cuda.max_memory_allocated(device) / (1 << 20))
        torch.cuda.reset_peak_memory_stats(device)
    return found


def peak_memory_mb() -> int:
    """Return this process's peak of resident memory so far, in MB of 2^20 bytes.

    Linux tells it of the program (VmHWM); getrusage also counts what the parent held when it started this process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1024))

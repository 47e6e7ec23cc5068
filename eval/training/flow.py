"""What training fashion-flux and fashion-wan has in common: flow matching within a time budget, saved and resumed."""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dita.eval.pipelines import quiet
from dita.eval.task import FILE, Task
from dita.eval.training.muon import Muon


def noise_levels(count: int, generator: torch.Generator, shift: float = 1.0) -> torch.Tensor:
    """Draw noise levels in (0, 1), float [count]: logit-normal (arXiv 2403.03206), stratified, shifted.

    One level from each 1/count quantile, which lowers the variance of the loss.
    """
    quantile = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    level = torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4)).sigmoid()
    return shift * level / (1 + (shift - 1) * level)


def two_noise_levels(count: int, generator: torch.Generator, shifts: tuple[float, float]) -> torch.Tensor:
    """Draw noise levels in (0, 1), float [count]: half of them at either shift, in turn.

    What a caption asks is settled while hardly anything but noise is to be seen, where logit-normal levels alone put
    one sample in seventy: the larger shift trains that, the smaller one the details.
    """
    level = torch.empty(count)
    for first, shift in enumerate(shifts):
        level[first::2] = noise_levels(len(level[first::2]), generator, shift)
    return level


def flow_loss(prediction: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Mean squared error to the velocity noise - clean."""
    return F.mse_loss(prediction, noise - clean)


def schedule(step: int, progress: float, warmup: int, decay: float) -> float:
    """Fraction of the learning rate: a linear rise over `warmup` steps, flat, a linear fall over the last `decay`.

    Flat in between so that a longer run can take up from where a shorter one began to fall.

    Example:
        >>> [schedule(1000, progress, 100, 0.25) for progress in (0.5, 0.875, 1.0)]
        [1.0, 0.5, 0.0]
    """
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.0, 1 - progress) / decay)


def save_pipeline(pipe: Any, folder: Path, task: Task) -> None:
    """Write a pipeline as safetensors, its tokenizers under the class name that all transformers versions know."""
    with quiet():
        pipe.save_pretrained(folder)
    (folder / FILE).write_text(json.dumps(asdict(task), indent=2) + "\n")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


class FlowTraining(ABC):
    """One training run: networks, their moving average, optimizers, random state, log.

    Subclasses build a stock pipeline and compute the loss of a batch; `progress` runs from 0 to 1 over the budget.
    """

    trained: tuple[str, ...]  # names of the pipeline's components that learn
    task: Task  # how the pipeline is sampled and judged

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.pipe = self.build()
        self.nets = nn.ModuleDict({name: getattr(self.pipe, name) for name in self.trained})
        if args.init_from:
            kept: Any = self.load(Path(args.init_from))
            for name, net in self.nets.items():
                net.load_state_dict(getattr(kept, name).float().state_dict())
        self.nets.eval().requires_grad_(True)
        if not (self.out / "checkpoint.pt").is_file():
            self.prepare()
        self.ema = copy.deepcopy(self.nets).requires_grad_(False)
        self.helpers = self.build_helpers()
        self.optimizers = self._optimizers()
        self.step, self.elapsed, self.samples = 0, 0.0, 0

    @abstractmethod
    def build(self) -> Any:
        """Build the untrained pipeline."""

    def build_helpers(self) -> nn.ModuleDict:
        """Build networks that learn beside the pipeline, for its sake, and are left behind; none by default."""
        return nn.ModuleDict()

    def prepare(self) -> None:
        """Train parts of the pipeline for themselves, once, before the run begins; nothing by default."""
        return

    @abstractmethod
    def load(self, folder: Path) -> Any:
        """Load a pipeline of the same kind."""

    @abstractmethod
    def loss(self, progress: float) -> tuple[torch.Tensor, int]:
        """Draw a batch and return its loss and its number of samples."""

    @abstractmethod
    def held_out(self) -> float:
        """Loss of the averaged weights on unseen data, always the same."""

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged networks into the pipeline for the length of a block."""
        try:
            for name in self.trained:
                setattr(self.pipe, name, self.ema[name])
            yield
        finally:
            for name in self.trained:
                setattr(self.pipe, name, self.nets[name])

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        matrices, rest = [], []
        for name, parameter in self.nets.named_parameters():
            inside = "blocks." in name or ".block." in name or ".layers." in name
            (matrices if parameter.ndim == 2 and inside and "bias" not in name else rest).append(parameter)
        rest += self.helpers.parameters()
        lr = self.args.lr
        adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
        return [Muon(matrices, lr=lr), adamw] if matrices else [adamw]

    def with_average(self) -> Any:
        """The pipeline with the averaged weights in float16, as it is written to disk."""
        pipe = copy.deepcopy(self.pipe)
        for name in self.trained:
            getattr(pipe, name).load_state_dict(self.ema[name].state_dict())
        with quiet():
            return pipe.to(torch.float16)

    def save(self, name: str = "checkpoint.pt") -> None:
        """Write everything that resuming needs, and the pipeline."""
        state = {
            "nets": self.nets.state_dict(), "ema": self.ema.state_dict(), "helpers": self.helpers.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "step": self.step, "elapsed": self.elapsed, "samples": self.samples,
        }  # fmt: skip
        part = self.out / f"{name}.part"
        torch.save(state, part)
        os.replace(part, self.out / name)
        save_pipeline(self.with_average(), self.out / "pipeline", self.task)
        facts = {**vars(self.args), "minutes_trained": round(self.elapsed / 60, 1), "steps": self.step}
        facts |= {"samples": self.samples, "torch": torch.__version__}
        (self.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")

    def resume(self) -> None:
        """Take up from the checkpoint, if there is one."""
        path = self.out / "checkpoint.pt"
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        self.nets.load_state_dict(state["nets"])
        self.ema.load_state_dict(state["ema"])
        self.helpers.load_state_dict(state["helpers"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.generator.set_state(state["generator"])
        self.step, self.elapsed, self.samples = state["step"], state["elapsed"], state["samples"]
        print(f"resumed at step {self.step}, {self.elapsed / 60:.1f} minutes", flush=True)

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.args.ema, (1 + self.step) / (10 + self.step))
        for kept, new in zip(self.ema.parameters(), self.nets.parameters(), strict=True):
            kept.lerp_(new, 1 - decay)

    def run(self) -> None:
        """Train until the time budget is spent; a checkpoint is kept where the learning rate begins to fall."""
        self.resume()
        args, budget = self.args, self.args.minutes * 60
        losses: list[float] = []
        tick, saved = self._clock(), time.monotonic()
        while self.elapsed < budget:
            progress = self.elapsed / budget
            rate = args.lr * schedule(self.step, progress, args.warmup, args.decay)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
            loss, samples = self.loss(progress)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.nets.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self.samples += samples
            self._average()
            losses.append(loss.item())
            now = self._clock()
            self.elapsed, tick = self.elapsed + now - tick, now
            if self.step % args.log_every == 0:
                self._log(sum(losses) / len(losses), rate)
                losses.clear()
                tick = self._clock()
            if progress < 1 - args.decay <= self.elapsed / budget:
                self.save("checkpoint-flat.pt")
            if time.monotonic() - saved > 300:
                self.save()
                saved = time.monotonic()
        self.save()

    def _clock(self) -> float:
        # Seconds on the processor, not on the wall: the budget is spent on training, whatever else the machine does.
        return time.process_time() / self.args.threads

    def _log(self, loss: float, rate: float) -> None:
        row = {
            "step": self.step, "minutes": round(self.elapsed / 60, 2), "samples": self.samples,
            "loss": round(loss, 5), "held_out": round(self.held_out(), 5), "lr": round(rate, 7),
        }  # fmt: skip
        with (self.out / "loss.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def arguments(description: str | None, out: str, minutes: float, batch: int, lr: float) -> argparse.ArgumentParser:
    """The options that both training scripts share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=out, help="folder of the checkpoint, log and pipeline")
    parser.add_argument("--minutes", type=float, default=minutes, help="processor time per thread, with resumptions")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--warmup", type=int, default=50, help="steps")
    parser.add_argument("--decay", type=float, default=0.3, help="last part of the budget in which the rate falls")
    parser.add_argument("--ema", type=float, default=0.995, help="decay of the averaged weights, per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", default=None, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--init-from", default=None, help="pipeline folder to continue from with fresh optimizers")
    parser.add_argument("--log-every", type=int, default=50, help="steps")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser

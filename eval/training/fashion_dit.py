"""Train fashion-dit, the class-conditional pixel DiT that ships with dita.

    python -m dita.eval.training.fashion_dit --minutes 110 --out runs/fashion-dit

DiT (arXiv 2212.09748): 8 adaLN-zero blocks of width 192 over 64 tokens (patch 4 on 32x32), label dropout 0.1,
v-prediction (arXiv 2202.00512) on the cosine schedule (arXiv 2102.09672), AdamW, warm-up, then a cosine decay of the
learning rate to zero over the time budget; exponential moving average of the weights with a warmed-up decay. Training
stops at the budget, saves every few minutes and resumes from `--out`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from dita.eval.data import CLASSES, load_fashion_mnist
from dita.eval.training.identity_vae import build_identity_vae

NULL_CLASS = 1000  # DiTPipeline hard-codes ImageNet's null label


def build_transformer() -> DiTTransformer2DModel:
    """Build the untrained transformer: 7.6 M parameters, 1.5 M of them unused label rows that DiTPipeline demands."""
    model = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=8,
        sample_size=32,
        patch_size=4,
        num_embeds_ada_norm=1000,
    )
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
        if name.endswith("norm1.linear") or name in ("proj_out_1", "proj_out_2"):
            torch.nn.init.zeros_(module.weight)  # pyright: ignore[reportArgumentType]
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.zeros_(module.weight)
            used = torch.cat([module.weight.data[: len(CLASSES)], module.weight.data[NULL_CLASS:]])
            used.normal_(std=0.02)
            module.weight.data[: len(CLASSES)] = used[:-1]
            module.weight.data[NULL_CLASS] = used[-1]
    return model


def build_scheduler() -> DDIMScheduler:
    """Build the sampler: DDIM, v-prediction, cosine schedule, trailing timesteps.

    No clipping of the predicted image: under guidance it contradicts the noise estimate that DDIM keeps, and samples
    fall apart.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )


def loss_of(
    model: Callable[..., tuple[torch.Tensor, ...]],
    images: torch.Tensor,
    labels: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    alphas_cumprod: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of the v-prediction; images [B, 1, 32, 32], labels and timesteps [B]."""
    alpha = alphas_cumprod[timesteps].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - alphas_cumprod[timesteps]).sqrt().view(-1, 1, 1, 1)
    prediction = model(alpha * images + sigma * noise, timestep=timesteps, class_labels=labels, return_dict=False)[0]
    return F.mse_loss(prediction, alpha * noise - sigma * images)


def save_pipeline(transformer: DiTTransformer2DModel, folder: Path) -> None:
    """Write a stock DiTPipeline folder in float16 safetensors."""
    pipe = DiTPipeline(
        transformer=copy.deepcopy(transformer).half(),
        vae=build_identity_vae(1).half(),
        scheduler=build_scheduler(),  # pyright: ignore[reportArgumentType]  # annotated as an enum, takes any
        id2label=dict(enumerate(CLASSES)),
    )
    pipe.save_pretrained(folder)


class Run:
    """Everything that training must carry over an interruption."""

    def __init__(self, out: Path, seed: int, init_from: Path | None) -> None:
        self.out = out
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.model = build_transformer()
        if init_from is not None:
            weights = DiTTransformer2DModel.from_pretrained(init_from, subfolder="transformer")
            self.model.load_state_dict(weights.float().state_dict())
        self.model.eval()  # training mode would drop labels independently in every block
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        decay, rest = [], []
        for name, parameter in self.model.named_parameters():
            (decay if parameter.ndim > 1 and "embedding_table" not in name else rest).append(parameter)
        groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99))
        self.step, self.elapsed, self.images_seen = 0, 0.0, 0

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(), "ema": self.ema.state_dict(), "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(), "step": self.step, "elapsed": self.elapsed,
            "images_seen": self.images_seen,
        }  # fmt: skip
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.checkpoint)
        save_pipeline(self.ema, self.out / "pipeline")

    def resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step, self.elapsed, self.images_seen = state["step"], state["elapsed"], state["images_seen"]

    def update_ema(self, limit: float = 0.9995) -> None:
        decay = min(limit, (1 + self.step) / (10 + self.step))
        for kept, new in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            kept.lerp_(new, 1 - decay)


@torch.no_grad()
def held_out_loss(run: Run, images: torch.Tensor, labels: torch.Tensor, alphas_cumprod: torch.Tensor) -> float:
    """EMA loss on 256 test images with fixed noise, timesteps spread evenly."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator)
    timesteps = torch.linspace(0, 999, len(images)).long()
    return loss_of(run.ema, images, labels, timesteps, noise, alphas_cumprod).item()


def train(args: argparse.Namespace) -> None:
    """Train until the time budget is spent."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    run = Run(out, args.seed, Path(args.init_from) if args.init_from else None)
    if run.checkpoint.is_file():
        run.resume()
        print(f"resumed at step {run.step}, {run.elapsed / 60:.1f} minutes", flush=True)
    images, labels = load_fashion_mnist("train", args.data)
    test_images, test_labels = load_fashion_mnist("test", args.data)
    alphas_cumprod = build_scheduler().alphas_cumprod
    forward: Callable[..., Any] = torch.compile(run.model) if args.compile else run.model
    budget, batch = args.minutes * 60, args.batch
    losses: list[float] = []
    last_tick, last_save = time.monotonic(), time.monotonic()
    while run.elapsed < budget:
        progress = run.elapsed / budget
        rate = args.lr * min(1.0, (run.step + 1) / args.warmup) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        picked = torch.randint(len(images), (batch,), generator=run.generator)
        # Stratified timesteps: one per 1/batch of the range, which lowers the variance of the loss.
        uniform = (torch.arange(batch) + torch.rand(batch, generator=run.generator)) / batch
        timesteps = (uniform * 1000).long().clamp_(max=999)
        noise = torch.randn((batch, 1, 32, 32), generator=run.generator)
        dropped = torch.rand(batch, generator=run.generator) < 0.1
        target = torch.where(dropped, NULL_CLASS, labels[picked])
        loss = loss_of(forward, images[picked], target, timesteps, noise, alphas_cumprod)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        run.images_seen += batch
        run.update_ema()
        losses.append(loss.item())
        now = time.monotonic()
        run.elapsed, last_tick = run.elapsed + now - last_tick, now
        if run.step % 100 == 0:
            row = {
                "step": run.step, "minutes": round(run.elapsed / 60, 2), "images": run.images_seen,
                "loss": round(sum(losses) / len(losses), 5), "lr": rate,
            }  # fmt: skip
            if run.step % 500 == 0:
                row["held_out"] = round(held_out_loss(run, test_images[:256], test_labels[:256], alphas_cumprod), 5)
            losses.clear()
            with (out / "loss.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
        if now - last_save > 300:
            run.save()
            last_save = now
    run.save()
    (out / "training.json").write_text(
        json.dumps(
            {
                **vars(args),
                "minutes_trained": round(run.elapsed / 60, 1),
                "steps": run.step,
                "images": run.images_seen,
                "torch": torch.__version__,
            },
            indent=2,
        )  # fmt: skip
    )


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/fashion-dit", help="folder of the checkpoint, log and pipeline")
    parser.add_argument("--minutes", type=float, default=110, help="time budget over all resumptions")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=300, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", default=None, help="folder of the idx files")
    parser.add_argument("--init-from", default=None, help="pipeline folder to continue from with a fresh optimizer")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())


if __name__ == "__main__":
    main()

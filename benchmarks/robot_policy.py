"""A robot's diffusion policy outside diffusers: trained in a minute, accelerated in its own loop.

    python benchmarks/robot_policy.py

An arm at a point of the plane is to reach another one around an obstacle between them. A small transformer denoises
the next 16 positions, given start and goal; a loop of 20 DDIM steps calls it. `dita.accelerate_model` takes the model
and the loop's scheduler. EfficientVLA and block-wise adaptive caching (BAC), which were made for such policies, are
compared with the plain loop and with fewer steps of it, by how far the path ends from the goal and moved from the plain
one.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.models.embeddings import Timesteps
from torch import nn

import dita
from dita.adapter import Denoiser
from dita.caching import BAC, EfficientVLA

LENGTH, WIDTH, STEPS = 16, 64, 20


class PolicyBlock(nn.Module):
    """Self-attention over the path, cross-attention to what is seen, and an MLP, modulated by the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(3))
        self.self_attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, hidden_states: torch.Tensor, seen: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """[B, LENGTH, WIDTH], [B, 2, WIDTH] and [B, 1, WIDTH] to [B, LENGTH, WIDTH]."""
        shifts, gates = self.modulation(temb).chunk(2, -1)
        shift, gate = shifts.chunk(3, -1), gates.chunk(3, -1)
        read = self.norms[0](hidden_states) + shift[0]
        hidden_states = hidden_states + gate[0] * self.self_attn(read, read, read, need_weights=False)[0]
        read = self.norms[1](hidden_states) + shift[1]
        hidden_states = hidden_states + gate[1] * self.cross_attn(read, seen, seen, need_weights=False)[0]
        read = self.norms[2](hidden_states) + shift[2]
        return hidden_states + gate[2] * self.mlp(read)


class Policy(nn.Module):
    """Predicts the noise in a path [B, LENGTH, 2], given start and goal [B, 2, 2]."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.path_in, self.seen_in, self.out = nn.Linear(2, WIDTH), nn.Linear(2, WIDTH), nn.Linear(WIDTH, 2)
        self.places = nn.Parameter(torch.randn(1, LENGTH, WIDTH) / 4)
        self.kinds = nn.Parameter(torch.randn(1, 2, WIDTH) / 4)
        self.time_proj = Timesteps(WIDTH, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.layers = nn.ModuleList(PolicyBlock() for _ in range(depth))

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """The noise [B, LENGTH, 2] at timesteps [B]."""
        temb = self.time(self.time_proj(timestep))[:, None]
        hidden_states, seen = self.path_in(hidden_states) + self.places, self.seen_in(seen) + self.kinds
        for layer in self.layers:
            hidden_states = layer(hidden_states, seen, temb)
        return self.out(hidden_states)


def scenes(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts and goals [B, 2, 2], and the expert's paths [B, LENGTH, 2]: arcs around the middle, on a random side."""
    ends = torch.rand(count, 2, 2, generator=generator) * 2 - 1
    along = torch.linspace(0, 1, LENGTH)[None, :, None]
    way = ends[:, 1:] - ends[:, :1]
    side = torch.randint(0, 2, (count, 1, 1), generator=generator) * 2.0 - 1
    normal = torch.stack([-way[..., 1], way[..., 0]], -1)
    return ends, ends[:, :1] + along * way + 2 * side * along * (1 - along) * normal


def train(policy: Policy, scheduler: Any, steps: int, generator: torch.Generator) -> float:
    """Teach the policy the experts' paths; the last loss."""
    optimizer = torch.optim.AdamW(policy.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    loss = torch.zeros(())
    for _ in range(steps):
        seen, paths = scenes(64, generator)
        noise = torch.randn(paths.shape, generator=generator)
        at = torch.randint(0, 1000, (len(paths),), generator=generator)
        loss = nn.functional.mse_loss(policy(scheduler.add_noise(paths, noise, at), at, seen), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


@torch.no_grad()
def act(policy: Policy, scheduler: Any, seen: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
    """The loop: paths [B, LENGTH, 2]."""
    paths = torch.randn(len(seen), LENGTH, 2, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        paths = scheduler.step(policy(paths, timestep.expand(len(seen)), seen), timestep, paths).prev_sample
    return paths


def main() -> None:
    """Train, then compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train", type=int, default=600, help="training steps")
    count = parser.parse_args().train
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    policy, scheduler = Policy(), DDIMScheduler(clip_sample=False)
    print(f"loss {train(policy, scheduler, count, generator):.4f}")
    policy.eval()
    seen, _ = scenes(64, generator)
    plain = act(policy, scheduler, seen)

    def line(name: str, share: float, steps: int = STEPS) -> None:
        start = time.perf_counter()
        paths = act(policy, scheduler, seen, steps)
        seconds = time.perf_counter() - start
        missed, moved = (paths[:, -1] - seen[:, 1]).norm(dim=-1).mean(), (paths - plain).norm(dim=-1).mean()
        print(f"{name:<26} {1000 * seconds:6.0f} ms  computed {share:4.0%}  ends {missed:.3f} off, moved {moved:.3f}")

    line("plain", 1.0)
    for fewer in (STEPS // 2, STEPS // 3, STEPS // 4):
        line(f"{fewer} steps", fewer / STEPS, fewer)
    bac = dita.calibrate(Denoiser(policy, scheduler), BAC(), lambda _: act(policy, scheduler, seen))
    for method in (*(EfficientVLA(interval=n) for n in (2, 3, 4)), bac):
        handle = dita.accelerate_model(policy, scheduler, method)
        act(policy, scheduler, seen)
        line(f"{method.name} {method.label()}"[:26], dita.report(handle).last.computed_fraction)
        dita.restore_pipeline(handle)
    assert torch.equal(act(policy, scheduler, seen), plain)


if __name__ == "__main__":
    main()

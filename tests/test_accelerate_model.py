"""A transformer that is in no pipeline, with blocks that nothing tells but the user, in a loop of its own."""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

import dita
from dita import adapter, discovery, models, registry
from dita.anatomy import describe


class Layer(nn.Module):
    """Returns its streams the other way round, under names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

    def forward(self, seen: torch.Tensor, actions: torch.Tensor, time: torch.Tensor) -> Any:
        both = torch.cat([seen, actions], 1) + time
        both = both + self.attn(both, both, both)[0]
        both = both + self.mlp(both)
        result = both.split([seen.shape[1], actions.shape[1]], 1)
        return tuple(result) if time.numel() else (seen, actions)


class Policy(nn.Module):
    """Never loops over its layers in sight."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.out = nn.Linear(3, 16), nn.Linear(16, 3)
        self.trunk = nn.Module()
        self.trunk.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, actions: torch.Tensor, time: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        start = (seen, self.head(actions))
        layers = self.trunk.get_submodule("layers").children()
        return self.out(functools.reduce(lambda s, layer: layer(*s, time / 1000), layers, start)[1])


@pytest.fixture
def policy() -> Policy:
    torch.manual_seed(0)
    return Policy().eval()


@torch.no_grad()
def act(policy: Policy, scheduler: DDIMScheduler, steps: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    actions, seen = torch.randn(2, 8, 3, generator=generator), torch.randn(2, 4, 16, generator=generator)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        actions = scheduler.step(policy(actions, t, seen), t, actions).prev_sample  # pyright: ignore
    return actions


DECLARED: dict[str, Any] = {
    "blocks": "trunk.layers", "returns": ("encoder", "hidden"), "hidden": "actions", "encoder": "seen",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is declared here is not for other tests."""
    for name in ("MODELS", "BLOCKS"):
        own = dict(getattr(models, name))
        for module in (models, adapter, discovery):
            monkeypatch.setattr(module, name, own)


@pytest.mark.parametrize("method", ["efficientvla", "fbcache", "ab-cache"])
def test_skips_what_was_declared_and_comes_off(policy: Policy, method: str) -> None:
    scheduler = DDIMScheduler()
    plain = act(policy, scheduler)
    config = registry.get(method).forced()
    denoiser = dita.accelerate_model(policy, scheduler, config, **DECLARED)
    output, run = act(policy, scheduler), dita.report(denoiser).last
    assert 0 < run.reused < len(run.records) == 6
    assert output.isfinite().all() and not torch.equal(output, plain) and torch.equal(act(policy, scheduler), output)
    dita.restore_pipeline(denoiser)
    assert torch.equal(act(policy, scheduler), plain) and "forward" not in vars(policy)


def test_a_robot_policy_needs_no_declaration() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    robot = import_module("robot_policy")
    torch.manual_seed(0)
    policy, scheduler = robot.Policy(depth=2).eval(), DDIMScheduler(clip_sample=False)
    seen, paths = robot.scenes(3, torch.Generator().manual_seed(0))
    # The experts begin and end where they should, and leave the straight way in between.
    assert torch.equal(paths[:, 0], seen[:, 0])
    torch.testing.assert_close(paths[:, -1], seen[:, 1])
    assert (paths[:, 8] - seen.mean(1)).norm(dim=-1).min() > 0.05
    plain = robot.act(policy, scheduler, seen)
    handle = dita.accelerate_model(policy, scheduler, "efficientvla", interval=4)
    assert not torch.equal(robot.act(policy, scheduler, seen), plain)
    assert dita.report(handle).last.reused == 15
    dita.restore_pipeline(handle)
    assert torch.equal(robot.act(policy, scheduler, seen), plain)


def test_without_a_declaration_the_reason_is_given(policy: Policy) -> None:
    with pytest.raises(dita.DitaError, match="its forward loops over no list of blocks"):
        dita.accelerate_model(policy, DDIMScheduler(), "fbcache")
    dita.accelerate_model(policy, DDIMScheduler(), "fbcache", **DECLARED)
    blocks = describe(policy).blocks
    assert [b.path for b in blocks] == [f"trunk.layers.{n}" for n in range(3)] and blocks[0].entry.hidden == "actions"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": "layers"}, "no blocks at 'layers'; module lists it holds: trunk.layers"),
        ({"hidden": "x"}, "Layer takes no x; it takes seen, actions, time"),
        ({"returns": ("encoder",)}, 'expected "hidden", alone or with "encoder"'),
        ({"text": "middle"}, 'expected "first", "last" or ""'),
    ],
)
def test_a_wrong_declaration_attaches_nothing(policy: Policy, change: dict[str, Any], message: str) -> None:
    with pytest.raises(dita.DitaError, match=message):
        dita.accelerate_model(policy, DDIMScheduler(), "fbcache", **{**DECLARED, **change})
    assert "forward" not in vars(policy) and not any(__name__ in name for name in (*models.MODELS, *models.BLOCKS))
    with pytest.raises(dita.DitaError, match="int has no set_timesteps and no step"):
        dita.accelerate_model(policy, 3, "fbcache", **DECLARED)

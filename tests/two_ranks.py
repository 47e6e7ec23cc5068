"""Run by test_composition_parallel.py in a process of its own, which becomes two ranks that share one sample.

Forking after the imports and before any thread is started saves the second import of diffusers.
"""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from pipelines import TINY

import dita
from dita.caching import FirstBlockCache, TaylorSeer
from dita.caching.base import CachingMethod
from dita.caching.engine import Recipe
from dita.caching.policy import Policy, Verdict, View

STEPS = 5


@dataclass
class Contrary(Policy):
    """Each rank would compute other steps than the other one."""

    def decide(self, view: View) -> Verdict:
        return Verdict(view.position.step % 2 == dist.get_rank() % 2 and view.position.step < 4, "parity of the rank")


@dataclass(frozen=True)
class Contradicting(CachingMethod):
    name: ClassVar[str] = "contradicting"
    saves: ClassVar[bool] = False  # that it skips less than it would alone is no surprise

    def recipe(self, anatomy: Any) -> Recipe:
        return Recipe(what="trunk", when=Contrary)


def actions(pipe: Any) -> list[str]:
    return [record.action for record in dita.report(pipe).last.records]


def context_parallel(method: Any) -> dict[str, Any]:
    """Flux with its tokens split over the ranks, which hear of each other in every attention."""
    pipe = TINY["flux"].build()
    # diffusers tells ranks' devices apart by the number of accelerators, which it does not expect to be none.
    with mock.patch.object(torch.accelerator, "device_count", return_value=1):
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    plain = TINY["flux"].call(pipe, steps=STEPS)
    dita.accelerate_pipeline(pipe, method)
    output = TINY["flux"].call(pipe, steps=STEPS)
    taken = actions(pipe)
    dita.restore_pipeline(pipe)
    return {"plain": plain, "output": output, "actions": taken, "after": TINY["flux"].call(pipe, steps=STEPS)}


@torch.no_grad()
def guidance_parallel(rank: int, method: Any, shared: bool = True) -> dict[str, Any]:
    """A loop of one's own: each rank computes one guidance branch, and all step on both."""
    pipe = TINY["wan"].build()
    denoiser = dita.accelerate_model(pipe.transformer, pipe.scheduler, method)
    if shared:
        dita.share_decisions(denoiser)
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 2, 8, 8, generator=generator), torch.randn(2, 1, 6, 32, generator=generator)
    pipe.scheduler.set_timesteps(STEPS)
    for t in pipe.scheduler.timesteps:
        own = pipe.transformer(latents, timestep=t[None], encoder_hidden_states=text[rank], return_dict=False)[0]
        both = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(both, own.contiguous())
        latents = pipe.scheduler.step(both[0] + 3 * (both[1] - both[0]), t, latents, return_dict=False)[0]
    return {"output": latents, "actions": actions(denoiser)}


def run(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = {
        "interval": context_parallel(TaylorSeer(interval=2, warmup=1)),
        "gate": context_parallel(FirstBlockCache(threshold=0.5)),
        "contrary": context_parallel(Contradicting()),
        "guidance": guidance_parallel(rank, Contradicting()),
        "guidance-alone": guidance_parallel(rank, Contradicting(), shared=False),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    child = os.fork()
    code = 0
    try:
        run(int(child == 0), Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        code = 1
    if child:
        code = code or os.waitpid(child, 0)[1]
    os._exit(min(code, 1))

"""What a skipped step costs over the ideal: the same transformer with nothing in it but what the method must run.

    python benchmarks/step_ideal.py --model fashion-flux --clock process --threads 1
    python benchmarks/step_ideal.py --model flux-20x256 --clock process --threads 1

The ideal is a copy of the transformer, on the same weights, in which blocks that are skipped are taken out and modules
that are skipped hand back a tensor that lies ready: what remains are embeddings, probe blocks, norms, gates and the
output projection, and the first norms of a block whose entry the method watches. Forecasting and deciding are not in
it, so that a ratio of 1 cannot be had. What a method must also run is its arithmetic on features: weighted sums of
anchors, frequency bands, and the relative change that it decides by. The time of these is taken within the method's own
calls, and a second ratio counts it with the ideal. First a gate: the copy
with nothing taken out must give the output of the original bit for bit. Then, in one process and in turn, a run of the
pipeline under the method, and one in which the ideal stands in at the very steps that the method skipped and the model
runs at the others: after a full step caches are cold, for both. Medians over all skipped steps of all rounds but the
first. Steps on which a part of a method's sites ran have no one ideal and are left out, and so are methods that skip
the whole call: their ideal takes no time at all, for them the milliseconds count.

"flux-20x256" is a Flux of 20 blocks (6 double, 14 single) and width 256 with random weights, 256 tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from step_cost import clock
from torch import nn

import dita
from dita import registry
from dita.anatomy import Anatomy, Block, describe
from dita.eval.environment import code_version, device_name, library_versions
from dita.eval.pipelines import load_pipeline, pipeline_folder
from dita.eval.sampling import Sampling, draw
from dita.eval.task import task_of
from dita.eval.timing import pinned_threads
from dita.passage import attention_of, run_to_attention
from dita.patch import CallPatch, Patch
from dita.seams import Site

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}
BIG = "flux-20x256"
ARITHMETIC = ("weighted_sum", "low_band", "relative_l1")  # none of them calls another


class Passage(nn.Module):
    """A block that hands its streams on; it keeps the parts that the model itself looks for in a block."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = (block,)  # in a tuple, so that the block is no submodule
        for name, child in block.module.named_children():
            self.add_module(name, child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the inputs."""
        block = self.block[0]
        return block.pack(block.read(args, kwargs))


class Entry(Passage):
    """A block that runs as far as its first attention, and hands its streams on."""

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.attention = (attention_of(block),)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the inputs."""
        run_to_attention(self.block[0], self.attention[0], self.block[0].module, args, kwargs)
        return super().forward(*args, **kwargs)


class Ready(nn.Module):
    """A module whose output lies ready."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return it."""
        return self.output


def ideal(model: nn.Module, skipped: Iterable[Site], args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """Copy a transformer without what is skipped.

    Args:
        model: the transformer, not under acceleration.
        skipped: spans and modules that do not run, and entries of blocks that are read although these do not.
        args, kwargs: of one call, to find the shape of what lies ready.
    """
    slim = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    anatomy = describe(slim)
    skipped = set(skipped)
    parts = [p for p in (*anatomy.modules, *anatomy.inner, *anatomy.linears) if p.site in skipped]
    outputs = _outputs([m for p in parts for m in (p.module, *p.feeders)], slim, args, kwargs)
    _replace(slim, {module: Ready(output) for module, output in outputs.items()})
    watched = {site.first for site in skipped if site.kind == "entry"}
    gone = {n for site in skipped if site.kind == "span" for n in range(site.first, site.last + 1)}
    for name in dict.fromkeys(block.path.rsplit(".", 1)[0] for block in anatomy.blocks):
        blocks = [b for b in anatomy.blocks if b.path.rsplit(".", 1)[0] == name]
        left = [Entry(b) if b.number in watched else b.module for b in blocks if b.number not in gone - watched]
        setattr(slim, name, nn.ModuleList(left or [Passage(blocks[0])]))
    return slim


@torch.no_grad()
def _outputs(modules: list[nn.Module], model: nn.Module, args: Any, kwargs: Any) -> dict[nn.Module, Any]:
    seen: dict[nn.Module, Any] = {}
    hooks = [m.register_forward_hook(lambda module, _, output: seen.__setitem__(module, output)) for m in modules]
    model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return seen


def _replace(model: nn.Module, substitutes: dict[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in substitutes:
                setattr(parent, name, substitutes[child])


def big_flux() -> tuple[Any, dict[str, Any]]:
    """The random-weight pipeline of 20 blocks, and the arguments it is called with."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=6, num_single_layers=14, attention_head_dim=64, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    sizes: Any = {"block_out_channels": (32,) * 4, "latent_channels": 16}
    sizes |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    parts: Any = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    parts |= {"vae": AutoencoderKL(**sizes), "transformer": transformer.eval()}
    pipe: Any = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    embeds = {"prompt_embeds": torch.randn(1, 32, 64), "pooled_prompt_embeds": torch.randn(1, 32)}
    return pipe, {"height": 256, "width": 256, "output_type": "latent", **embeds}


def loaded(name: str, batch: int | None, steps: int) -> tuple[Any, Callable[[], Any]]:
    """A pipeline, and what runs it once."""
    if name == BIG:
        pipe, call = big_flux()
        return pipe, lambda: pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **call)
    pipe, task = load_pipeline(name), task_of(pipeline_folder(name))
    batch = batch or task.batch
    sampling = Sampling(batch, batch, steps, task.guidance, 0, task.prompts(batch), task.call)
    return pipe, lambda: draw(pipe, sampling, range(batch))


def bench(pipe: Any, run: Callable[[], Any], name: str, repeats: int, now: Callable[[], float]) -> dict[str, Any]:
    """Compare one method with its ideal; milliseconds of one call of the transformer."""
    model = pipe.transformer
    arguments: list[tuple[Any, Any]] = []
    hook = model.register_forward_pre_hook(lambda _, a, k: arguments.append((a, k)), with_kwargs=True)
    run()
    hook.remove()
    args, kwargs = arguments[len(arguments) // 2]
    config = registry.get(name).forced()
    if config.needs_calibration:
        config = config.calibrated(pipe, lambda _: run())
    anatomy: Anatomy = describe(model)
    handler = config.handler(anatomy)
    skipped = (*getattr(handler, "reused", ()), *(site for site in handler.sites if site.kind == "entry"))
    row: dict[str, Any] = {"method": name, "setting": config.label()}
    if any(site.kind == "model" for site in skipped):
        slim = None
    else:
        with torch.no_grad():
            whole, same = model(*args, **kwargs)[0], ideal(model, (), args, kwargs)(*args, **kwargs)[0]
        if not torch.equal(whole, same):
            return {**row, "error": "gate failed: a copy with nothing taken out differs from the model; not timed"}
        slim = ideal(model, skipped, args, kwargs)
    ours: list[float] = []
    best: list[float] = []
    own: list[float] = []
    for turn in range(repeats + 1):
        with dita.accelerated(pipe, config), _arithmetic(model, now) as spent:
            seconds = _seconds(model, run, now)
            actions = [record.action for record in dita.report(pipe).last.records]
        at = [number for number, action in enumerate(actions) if action in ("reused", "forecast")]
        mine = [seconds[number] for number in at]
        theirs = [] if slim is None else _with_ideal(model, slim, at, run, now)
        if turn:
            ours, best, own = ours + mine, best + theirs, own + [spent[number] for number in at]
    if not ours:
        return {**row, "error": "every step that was not computed ran a part of its sites: no one ideal"}
    row["skipped_step_ms"], row["calls"] = 1000 * statistics.median(ours), len(ours)
    row["arithmetic_ms"] = 1000 * statistics.median(own)
    if best:
        row["ideal_ms"] = 1000 * statistics.median(best)
        row["over_ideal"] = row["skipped_step_ms"] / row["ideal_ms"]
        row["over_ideal_with_arithmetic"] = row["skipped_step_ms"] / (row["ideal_ms"] + row["arithmetic_ms"])
    return row


def _seconds(model: nn.Module, run: Callable[[], Any], now: Callable[[], float]) -> list[float]:
    with clock(model, torch.device("cpu"), now) as seconds:
        run()
    return seconds


@contextlib.contextmanager
def _arithmetic(model: nn.Module, now: Callable[[], float]) -> Iterator[list[float]]:
    """The seconds that `ARITHMETIC` takes, for each call of the model from here on."""
    seconds: list[float] = []

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = now()
            result = original(*args, **kwargs)
            seconds[-1] += now() - start
            return result

        return run

    def counted(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        seconds.append(0.0)
        return call(*args, **kwargs)

    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("dita.caching.")]
    places = [(module, name) for module in modules for name in ARITHMETIC if hasattr(module, name)]
    held = [getattr(module, name) for module, name in places]
    patch = CallPatch(model, counted)
    patch.apply()
    try:
        for (module, name), original in zip(places, held, strict=True):
            setattr(module, name, timed(original))
        yield seconds
    finally:
        for (module, name), original in zip(places, held, strict=True):
            setattr(module, name, original)
        patch.remove()


def _with_ideal(
    model: nn.Module, slim: nn.Module, at: list[int], run: Callable[[], Any], now: Callable[[], float]
) -> list[float]:
    """Seconds of the calls `at`, in which the ideal stands in for the model."""
    count = itertools.count()

    def stand_in(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return slim(*args, **kwargs) if next(count) in at else original(*args, **kwargs)

    patch = Patch(model, "forward", stand_in)
    patch.apply()
    try:
        seconds = _seconds(model, run, now)
    finally:
        patch.remove()
    return [seconds[number] for number in at]


def main() -> None:
    """Parse the command line and print one JSON line for the machine and one per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-dit", help=f"bundled pipeline by name, a folder, or {BIG}")
    parser.add_argument("--methods", nargs="*", default=None, help="registry names; all if left out")
    parser.add_argument("--batch", type=int, default=None, help="samples a call; the pipeline's own if left out")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    pipe, run = loaded(args.model, args.batch, args.steps)
    with pinned_threads(args.threads) as threads:
        machine = {"device": device_name("cpu"), "threads": threads, "code": code_version()}
        machine |= {"versions": library_versions(), **vars(args), "threads": threads}
        print(json.dumps(machine), flush=True)
        for name in args.methods or registry.names():
            print(json.dumps(bench(pipe, run, name, args.repeats, CLOCKS[args.clock])), flush=True)


if __name__ == "__main__":
    main()

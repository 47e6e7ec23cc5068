"""Training AGD's adapters on a bundled pipeline, or any other that takes class labels or prompts.

    python -m dita.eval.training.agd --pipeline fashion-dit --runs 16 --images 4 --updates 600 --save agd.safetensors

States of guided runs are recorded once, the adapters learn on them, and the error printed is that of the model's output
against the guided one on runs that were not trained on. With `--work` both go on where an earlier call was stopped.
"""

from __future__ import annotations

import inspect
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dita.anatomy import describe
from dita.eval.pipelines import load_pipeline, pipeline_folder
from dita.eval.sampling import Sampling, draw
from dita.eval.task import task_of
from dita.schedulers.guidance.agd import AGD
from dita.schedulers.guidance.agd_states import State, record_states
from dita.schedulers.guidance.agd_training import mean_error, train_adapters
from dita.schedulers.guidance.agd_weights import AdapterSet

SEED = 3000
"""Of the first trajectory: far from those of sweeps."""
_HELD_OUT = 2  # runs


def guided(sampling: Sampling) -> Callable[[Any, float], None]:
    """A call that draws the next samples each time, at the guidance scale it is given."""
    turn = iter(sampling.batches())

    def call(pipe: Any, scale: float) -> None:
        if "true_cfg_scale" in inspect.signature(type(pipe).__call__).parameters:
            extra = {"negative_prompt": "", **sampling.call, "true_cfg_scale": scale}
            draw(pipe, replace(sampling, call=extra), next(turn))
        else:
            draw(pipe, replace(sampling, guidance=scale), next(turn))

    return call


def record(pipe: Any, sampling: Sampling, runs: int, scales: tuple[float, float], file: Path | None) -> list[State]:
    """States of guided runs, read from the file if it is there and written to it if it is not."""
    if file is not None and file.is_file():
        return [State(**state) for state in torch.load(file, weights_only=True)]
    sampling = replace(sampling, samples=runs * sampling.batch)
    states = record_states(pipe, guided(sampling), runs, scales, sampling.seed)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save([vars(state) for state in states], file)
    return states


def main(arguments: Sequence[str] | None = None) -> AGD:
    """Train on a pipeline and print the error before and after."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="fashion-dit", help="bundled name or folder")
    parser.add_argument("--save", default="agd.safetensors", help="file for the adapters")
    parser.add_argument("--work", type=Path, help="folder of the recorded states and of the training's checkpoint")
    parser.add_argument("--kind", default="auto", choices=("auto", "offset", "cross"))
    parser.add_argument("--width", type=int, default=32, help="of the embeddings in an adapter")
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--images", type=int, default=4, help="samples of each run")
    parser.add_argument("--steps", type=int, default=0, help="of each run; 0 for the task's")
    parser.add_argument("--least", type=float, default=1.0, help="guidance scale")
    parser.add_argument("--most", type=float, default=6.0, help="guidance scale")
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16, help="states of each update")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    start, task = time.process_time(), task_of(pipeline_folder(options.pipeline))
    pipe: Any = load_pipeline(options.pipeline)
    prompts = task.prompts(options.runs * options.images, SEED)
    steps, scales = options.steps or task.steps, (options.least, options.most)
    sampling = Sampling(1, options.images, steps, task.guidance, SEED, prompts, task.call)
    files = [None if options.work is None else options.work / name for name in ("states.pt", "held-out.pt")]
    states = record(pipe, sampling, options.runs, scales, files[0])
    others = replace(sampling, seed=SEED + 1, prompts=task.prompts(_HELD_OUT * options.images, SEED + 1))
    held_out = record(pipe, others, _HELD_OUT, scales, files[1])
    torch.manual_seed(SEED)
    anatomy = describe(pipe.transformer)
    adapters = AdapterSet.for_call(anatomy, states[0].arguments, options.kind, options.width, scales=scales)
    own, whole = (sum(p.numel() for p in module.parameters()) for module in (adapters, pipe.transformer))
    print(f"{adapters.kind} adapters of {own:,} parameters, {own / whole:.1%} of the model; {len(states)} states")
    before, errors = mean_error(pipe, held_out, adapters), []

    def told(update: int, error: float) -> None:
        errors.append(error)
        if (update + 1) % 50 == 0:
            recent = errors[-50:]
            minutes = (time.process_time() - start) / 60
            print(f"update {update + 1}: {sum(recent) / len(recent):.4g}, {minutes:.1f} minutes", flush=True)

    checkpoint = "" if options.work is None else options.work / "checkpoint.pt"
    train_adapters(
        pipe, states, adapters, options.updates, options.batch, options.rate, SEED, checkpoint=checkpoint, told=told
    )
    adapters.save(options.save)
    after = mean_error(pipe, held_out, adapters)
    print(f"error on {_HELD_OUT} other runs: {before:.4g} before, {after:.4g} after {options.updates} updates")
    return AGD(str(options.save))


if __name__ == "__main__":
    main()

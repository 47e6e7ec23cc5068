"""Training SLA's projections on a bundled pipeline, or any other that takes prompts.

    python -m dita.eval.training.sla --pipeline fashion-wan --frames 4 --steps 10 --density 0.1 --save sla.safetensors

The error printed is that of the model's output against dense attention, on two prompts that were not trained on.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import torch

from dita.eval.pipelines import load_pipeline, pipeline_folder
from dita.eval.task import task_of
from dita.kernels.sparse.sla import SLA
from dita.kernels.sparse.sla_training import measure_sla, train_sla


def main(arguments: Sequence[str] | None = None) -> SLA:
    """Train on a bundled pipeline, or any other with prompts of its task, and print the error before and after."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="fashion-wan", help="bundled name or folder")
    parser.add_argument("--save", default="sla.safetensors", help="file for the projections")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=0, help="of each run; 0 for the task's")
    parser.add_argument("--frames", type=int, default=0, help="of each video; 0 for the task's")
    parser.add_argument("--rate", type=float, default=3e-3)
    options = parser.parse_args(arguments)
    task = task_of(pipeline_folder(options.pipeline))
    keywords = {**task.call, "num_inference_steps": options.steps or task.steps, "guidance_scale": task.guidance}
    keywords |= {"num_frames": options.frames} if options.frames else {}
    pipe, held_out = load_pipeline(options.pipeline), 2
    pipe.set_progress_bar_config(disable=True)
    prompts = task.prompts(options.runs + held_out)
    turn = iter(prompts[held_out:])

    def judged(pipe: Any) -> None:
        for number, prompt in enumerate(prompts[:held_out]):
            pipe(prompt, output_type="latent", generator=torch.Generator().manual_seed(10_000 + number), **keywords)

    method = SLA(density=options.density, block=options.block)
    before = measure_sla(pipe, judged, method)
    trained = train_sla(
        pipe,
        lambda p: p(next(turn), output_type="latent", **keywords),
        method,
        options.save,
        options.runs,
        options.rate,
    )
    after = measure_sla(pipe, judged, trained)
    print(f"error on {held_out} other prompts: {before:.4g} before, {after:.4g} after {options.runs} runs")
    return trained


if __name__ == "__main__":
    main()

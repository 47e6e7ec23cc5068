"""Train HarmoniCa's router for fashion-dit, whose table sweeps of that pipeline use.

    python -m dita.eval.training.harmonica_router --threads 1

Every trajectory starts from noise and a class of chance; no data are read. Minutes on one core. With other settings
than the method's own, write elsewhere by `--out`: sweeps take a table only for the settings it was trained with.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import dita
from dita.caching import HarmoniCa
from dita.eval.calibrations import FOLDER
from dita.eval.data import CLASSES
from dita.eval.pipelines import load_pipeline, pipeline_folder
from dita.eval.task import task_of

MODEL = "fashion-dit"
SEED = 1000
"""Of the first trajectory: far from those of sweeps."""


def trajectory(pipe: Any) -> None:
    """Run the pipeline once, as sweeps do, on a class and noise of torch's global generator."""
    task = task_of(pipeline_folder(MODEL))
    label = int(torch.randint(len(CLASSES), (1,)))
    pipe(class_labels=[label], guidance_scale=task.guidance, num_inference_steps=task.steps, output_type="pt")


def main() -> None:
    """Parse the command line, train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER / MODEL / "harmonica.json")
    parser.add_argument("--beta", type=float, default=HarmoniCa.beta)
    parser.add_argument("--iterations", type=int, default=HarmoniCa.iterations)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.process_time()
    config = HarmoniCa(beta=args.beta, iterations=args.iterations, seed=SEED)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    trained: Any = dita.calibrate(load_pipeline(MODEL), config, trajectory, save=args.out)
    rows = torch.tensor(list(trained.table.values.values()))
    for config in HarmoniCa.ladder():
        print(f"threshold {config.threshold:g}: {(rows > config.threshold).float().mean():.1%} of the modules computed")
    print(f"{(time.process_time() - start) / 60:.1f} minutes of processor time")


if __name__ == "__main__":
    main()

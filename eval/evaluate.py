"""The numbers of a model card: does the bundled pipeline draw what it is asked for?

python -m dita.eval.evaluate fashion-dit --samples 1000 --out runs/fashion-dit.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from dita.eval.data import CLASSES
from dita.eval.environment import code_version, device_name, library_versions
from dita.eval.judge import Judge
from dita.eval.metrics import class_accuracy, fd_garment
from dita.eval.pipelines import fingerprint, load_pipeline, pipeline_folder
from dita.eval.sampling import Sampling, check_pipeline, draw
from dita.eval.timing import pinned_threads


def evaluate_pipeline(
    model: str | Path = "fashion-dit",
    samples: int = 1000,
    steps: int = 50,
    guidance: float = 3.0,
    seed: int = 0,
    batch: int = 50,
    threads: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Draw garments without acceleration and judge them.

    Args:
        model: bundled pipeline by name, or the folder of a DiTPipeline that draws 32x32 grey garments.
        samples: number of images; as many of each class as possible.
        steps: solver steps.
        guidance: scale of classifier-free guidance.
        seed: of the images.
        batch: images in one call.
        threads: CPU threads; 0 keeps torch's number.
        device: where to run.

    Returns:
        JSON values: class accuracy over all and by class, that of the real test images, FD-garment to the test set
        next to the floor of as many training images (None above 2,000), and how it was measured.

    Raises:
        DitaError: the pipeline is unknown or draws something else.

    Example:
        >>> evaluate_pipeline("fashion-dit", samples=100)["class_accuracy"]  # doctest: +SKIP
        0.93
    """
    from rich.progress import track

    folder = pipeline_folder(model)
    pipe: Any = load_pipeline(folder, device=device)
    check_pipeline(pipe)
    judge = Judge()
    sampling = Sampling(samples, batch, steps, guidance, seed)
    start = time.monotonic()
    with pinned_threads(threads) as used:
        batches = track(list(sampling.batches()), description="sampling", transient=True)
        images = torch.cat([draw(pipe, sampling, indices) for indices in batches])
        seconds = time.monotonic() - start
        accuracy = class_accuracy(images, sampling.labels(), judge.classifier)
        distance = fd_garment(images, judge.reference.test, judge.classifier) if samples > 1 else None
    floor = judge.floor(samples)
    return {
        "model": str(model),
        "weights": fingerprint(folder),
        "samples": samples,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "class_accuracy": round(accuracy.overall, 4),
        "class_accuracy_by_class": {CLASSES[i]: round(value, 4) for i, value in accuracy.per_class.items()},
        "class_accuracy_of_test_images": round(floor["class_accuracy"], 4),
        "fd_garment": distance,
        "fd_garment_floor": floor.get("fd_garment"),
        "seconds": round(seconds, 1),
        "threads": used,
        "device": device_name(device),
        "code": code_version(),
        "versions": library_versions(),
    }


def main() -> None:
    """Parse the command line, evaluate, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="fashion-dit", help="bundled pipeline by name, or a folder")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--threads", type=int, default=0, help="0 keeps torch's number")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = vars(parser.parse_args())
    out = options.pop("out")
    text = json.dumps(evaluate_pipeline(**options), indent=2)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()

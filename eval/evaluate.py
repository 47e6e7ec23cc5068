"""The numbers of a model card: does a bundled pipeline draw what it is asked for?

python -m dita.eval.evaluate fashion-flux --samples 500 --out runs/fashion-flux.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dita.errors import DitaError
from dita.eval.environment import code_version, device_name, library_versions
from dita.eval.judge import Values, make_judge
from dita.eval.pipelines import fingerprint, load_pipeline, pipeline_folder
from dita.eval.sampling import Sampling, check_pipeline, draw
from dita.eval.task import task_of
from dita.eval.timing import pinned_threads

_PLAIN_WORDS = {"a", "an", "and", "on", "the", "moving", "standing"}


def evaluate_pipeline(
    model: str | Path = "fashion-dit",
    samples: int = 1000,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch: int = 50,
    threads: int = 0,
    device: str = "cpu",
    call: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Draw samples without acceleration and judge them.

    Args:
        model: bundled pipeline by name, or a folder with a sampling.json that names a judge.
        samples: number of images or videos.
        steps: solver steps; the pipeline's own if None, as for guidance.
        guidance: scale of classifier-free guidance.
        seed: of the samples and of the captions.
        batch: samples in one call.
        threads: CPU threads; 0 keeps torch's number.
        device: where to run.
        call: further arguments of the pipeline's call, over its own.

    Returns:
        JSON values: the judge's numbers, in "real" those of as many real samples, accuracy by class or by what the
        captions ask, and how it was measured.

    Raises:
        DitaError: the pipeline is unknown, or no judge reads what it draws.

    Example:
        >>> evaluate_pipeline("fashion-dit", samples=100)["class_accuracy"]  # doctest: +SKIP
        0.93
    """
    from rich.progress import track

    folder = pipeline_folder(model)
    task = task_of(folder)
    if task.judge == "none":
        raise DitaError(f"{folder} has no sampling.json that says who judges its samples")
    pipe: Any = load_pipeline(folder, device=device)
    sampling = Sampling(
        samples,
        batch,
        steps or task.steps,
        task.guidance if guidance is None else guidance,
        seed,
        task.prompts(samples, seed),
        {**task.call, **(call or {})},
    )
    check_pipeline(pipe, sampling)
    judge = make_judge(task, False)
    observed: list[Values] = []
    start = time.monotonic()
    with pinned_threads(threads) as used:
        for indices in track(list(sampling.batches()), description="sampling", transient=True):
            observed.append(judge.observe(draw(pipe, sampling, indices), None, sampling, indices))
    joined = {name: torch.cat([values[name] for values in observed]) for name in observed[0]}
    return {
        "model": str(model),
        "weights": fingerprint(folder),
        "samples": samples,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "call": dict(sampling.call),
        "seed": seed,
        **judge.summarise(joined),
        "by_word": by_word(joined, sampling),
        "real": judge.floor(samples),
        "seconds": round(time.monotonic() - start, 1),
        "threads": used,
        "device": device_name(device),
        "code": code_version(),
        "versions": library_versions(),
    }


def by_word(joined: Values, sampling: Sampling) -> dict[str, float]:
    """Share of right samples among those whose caption holds a word: class accuracy, else semantic accuracy."""
    right = joined.get("class_accuracy", joined.get("semantic_accuracy"))
    if right is None:
        return {}
    captions = sampling.captions(range(sampling.samples))
    named = [set(text.split()) - _PLAIN_WORDS if sampling.prompts else {text} for text in captions]
    members = {word: [i for i, words in enumerate(named) if word in words] for word in sorted(set().union(*named))}
    return {word: round(right[torch.tensor(chosen)].float().mean().item(), 4) for word, chosen in members.items()}


def main() -> None:
    """Parse the command line, evaluate, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="fashion-dit", help="bundled pipeline by name, or a folder")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--threads", type=int, default=0, help="0 keeps torch's number")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--call", type=json.loads, default=None, help="further arguments of the call, as JSON")
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

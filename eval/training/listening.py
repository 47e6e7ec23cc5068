"""Which words of its captions a pipeline uses, and at what noise levels.

    python -m dita.eval.training.listening fashion-wan --samples 64

The loss on unseen renders with one word of each caption exchanged, less the loss with the right caption. Where that is
zero the word is not heard, and a sample cannot show it but by chance. What a caption asks is settled at the highest
levels; a word that is heard at low ones alone only agrees with what is there already.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from dita.errors import DitaError
from dita.eval.pipelines import load_pipeline, pipeline_folder
from dita.eval.task import task_of
from dita.eval.timing import pinned_threads
from dita.eval.training import fashion_flux, fashion_wan
from dita.eval.world import COLOURS, GARMENTS, MOTIONS, SIDE, Clip, Renderer, Scene, random_clip, random_scene

LEVELS = (0.999, 0.98, 0.95, 0.9, 0.8, 0.6)
_BATCH = 8


def _other(word: str, words: Sequence[str], generator: torch.Generator) -> str:
    left = [known for known in words if known != word]
    return left[int(torch.randint(len(left), (), generator=generator))]


def exchanged(asked: Scene | Clip, generator: torch.Generator) -> dict[str, Scene | Clip]:
    """The same with one word another: by garment, colour and motion, or of a scene's first item garment and colour.

    Of a scene, "place" puts its items on the other sides.

    Example:
        >>> found = exchanged(Clip("dress", "green", "moving left"), torch.Generator().manual_seed(0))
        >>> sorted(found), found["colour"].garment
        (['colour', 'garment', 'motion'], 'dress')
    """
    first: Any = asked if isinstance(asked, Clip) else asked.items[0]
    garment = replace(first, garment=_other(first.garment, GARMENTS, generator))
    colour = replace(first, colour=_other(first.colour, tuple(COLOURS), generator))
    if isinstance(asked, Clip):
        motion = replace(asked, motion=_other(asked.motion, tuple(MOTIONS), generator))
        return {"garment": garment, "colour": colour, "motion": motion}
    sides = {"left": "right", "right": "left", None: None}
    return {
        "garment": Scene((garment, *asked.items[1:])),
        "colour": Scene((colour, *asked.items[1:])),
        "place": Scene(tuple(replace(item, place=sides[item.place]) for item in asked.items)),
    }


@torch.no_grad()
def words_heard(
    predict: Callable[[torch.Tensor, torch.Tensor, list[str]], torch.Tensor],
    clean: torch.Tensor,
    asked: Sequence[Scene | Clip],
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
) -> list[dict[str, float]]:
    """By how much the loss rises where a word is exchanged.

    Args:
        predict: gives the velocity of noisy latents [b, ...] at noise levels [b] for captions.
        clean: latents [B, ...] that show what is asked.
        asked: what they show.
        levels: noise levels in (0, 1].
        seed: of the noise and of the words put in.

    Returns:
        for each level: "level", "loss" with the right captions, and by kind of word the rise.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(clean.shape, generator=generator)
    wrong = [exchanged(one, generator) for one in asked]
    captions = {"loss": [str(one) for one in asked]}
    captions |= {kind: [str(one[kind]) for one in wrong] for kind in wrong[0]}
    rows = []
    for level in levels:
        noisy, losses = torch.lerp(clean, noise, level), {}
        for kind, texts in captions.items():
            squares = [
                (
                    predict(noisy[part], torch.full((len(texts[part]),), level), texts[part])
                    - (noise[part] - clean[part])
                ).square().flatten(1).mean(1)
                for part in (slice(at, at + _BATCH) for at in range(0, len(texts), _BATCH))
            ]  # fmt: skip
            losses[kind] = torch.cat(squares).mean().item()
        right = losses.pop("loss")
        rows.append({"level": level, "loss": right, **{kind: loss - right for kind, loss in losses.items()}})
    return rows


def listen(
    model: str = "fashion-wan",
    samples: int = 64,
    frames: int = 5,
    levels: Sequence[float] = LEVELS,
    threads: int = 0,
) -> list[dict[str, float]]:
    """`words_heard` of a pipeline that draws the world, on renders of test garments.

    Args:
        model: bundled pipeline by name, or a folder.
        samples: renders.
        frames: of a clip.
        levels: noise levels in (0, 1].
        threads: CPU threads; 0 keeps torch's number.

    Raises:
        DitaError: the pipeline draws neither scenes nor clips.

    Example:
        >>> round(listen("fashion-flux", samples=48, levels=(0.95,))[0]["place"], 2)  # doctest: +SKIP
        0.46
    """
    folder = pipeline_folder(model)
    kind = task_of(folder).judge
    if kind not in ("scene", "clip"):
        raise DitaError(f"{folder} is judged by {kind!r}; expected a pipeline that draws scenes or clips of the world")
    pipe: Any = load_pipeline(folder)
    renderer, generator = Renderer("test"), torch.Generator().manual_seed(1)
    with pinned_threads(threads):
        if kind == "clip":
            clips = [random_clip(generator) for _ in range(samples)]
            clean = fashion_wan.latents(clips, renderer, generator, fashion_wan.Shape(frames, SIDE, samples))
            return words_heard(lambda *inputs: fashion_wan.velocity(pipe, *inputs), clean, clips, levels)
        scenes = [random_scene(generator) for _ in range(samples)]
        clean = fashion_flux.latents(pipe, scenes, renderer, generator)

        def predict(noisy: torch.Tensor, level: torch.Tensor, texts: list[str]) -> torch.Tensor:
            return fashion_flux.velocity(pipe, pipe.transformer, noisy, level, texts, torch.ones(len(texts)))

        return words_heard(predict, clean, scenes, levels)


def main() -> None:
    """Parse the command line, listen and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="fashion-wan", help="bundled pipeline by name, or a folder")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--frames", type=int, default=5, help="of a clip")
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS, help="noise levels in (0, 1]")
    parser.add_argument("--threads", type=int, default=0, help="0 keeps torch's number")
    for row in listen(**vars(parser.parse_args())):
        print("  ".join(f"{name} {value:.4f}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()

"""Image-to-image as a stream: a garment of the bundled world rests and moves, and fashion-flux draws it anew.

    python benchmarks/stream_fashion_flux.py --frames 60 --steps 8 --strength 0.5 --threads 1

First a gate, with the filter off: on a scene that does not move, every frame has to be the plain one within rounding.
Then the same film frame by frame, with the filter, with the stream batch, and with both. One JSON line for the machine,
the gate and each of them: frames a second after the first frame (with `--clock process` by the processor's time, for a
machine that has other work, and then on the CPU only), calls of the transformer and the rows in them, frames
skipped, and PSNR to the plain frames. A frame that goes into a stream batch comes out some calls later: `psnr` compares
it with the frame that went in that many calls earlier, `psnr_now` with the frame that just went in. A PSNR of null is
that of equal pixels.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxImg2ImgPipeline

import dita
from dita.errors import DitaError
from dita.eval.environment import code_version, device_name, library_versions
from dita.eval.pipelines import load_pipeline
from dita.eval.timing import pinned_threads, synchronize
from dita.eval.world import Renderer, Scene, read_caption
from dita.schedulers import Stream

REST, MOVE = 8, 12  # frames
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}
ROUNDING = 1e-4  # of 1: the same sums in another order, over all steps


@dataclass(frozen=True)
class Drawing:
    """How frames are drawn.

    Attributes:
        caption: of the scene.
        steps, strength, guidance: of the pipeline's call.
        seed: of the noise, the same for all frames.
        clock: by which frames are timed, "wall" or "process".
    """

    caption: str
    steps: int = 8
    strength: float = 0.5
    guidance: float = 5.0
    seed: int = 0
    clock: str = "wall"

    @property
    def indices(self) -> int:
        """Steps that a frame takes."""
        return self.steps - int(max(self.steps - self.steps * self.strength, 0))


@dataclass
class Film:
    """What came of a film.

    Attributes:
        frames: float32 [F, 3, 32, 64] in [0, 1].
        seconds: of each call of the pipeline.
        calls, rows: of the transformer.
        skipped: frames for which it was not called.
    """

    frames: torch.Tensor
    seconds: list[float] = field(default_factory=list)
    calls: int = 0
    rows: int = 0
    skipped: int = 0


def film(caption: str, count: int, seed: int = 0) -> torch.Tensor:
    """Render a scene whose garment moves to the right by a pixel a frame, with rests.

    Returns:
        float32 [count, 3, 32, 64] in [0, 1].

    Raises:
        DitaError: the caption cannot be read, or is that of a clip.

    Example:
        >>> film("a red bag on the left", 10).shape  # doctest: +SKIP
        torch.Size([10, 3, 32, 64])
    """
    asked = read_caption(caption)
    if not isinstance(asked, Scene):
        raise DitaError(f"{caption!r} is a clip; expected a scene, as in 'a red bag on the left'")
    scene = Renderer("test").scenes([asked], torch.Generator().manual_seed(seed))
    places = [max(0, n % (REST + MOVE) - REST) + n // (REST + MOVE) * (MOVE - 1) for n in range(count)]
    return (torch.cat([scene.roll(place, -1) for place in places]) + 1) / 2


def image_to_image(device: str = "cpu") -> Any:
    """fashion-flux as an image-to-image pipeline."""
    pipe = FluxImg2ImgPipeline(**load_pipeline("fashion-flux", device=device).components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _counted(transformer: torch.nn.Module, film: Film) -> Iterator[None]:
    """Count by a module inside the transformer: its own forward is answered by dita where a call is left out."""

    def count(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        film.calls += 1
        film.rows += output.shape[0]

    handle = transformer.get_submodule("x_embedder").register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def draw(pipe: Any, frames: torch.Tensor, drawing: Drawing) -> Film:
    """Call the pipeline once a frame.

    Args:
        pipe: see `image_to_image`; accelerated or not.
        frames: float32 [F, 3, 32, 64] in [0, 1].
        drawing: how.
    """
    drawn: list[torch.Tensor] = []
    result, now = Film(frames), CLOCKS[drawing.clock]
    with _counted(pipe.transformer, result):
        for frame in frames:
            before = result.calls
            synchronize(pipe.device)
            start = now()
            output = pipe(
                drawing.caption,
                image=frame[None],
                strength=drawing.strength,
                num_inference_steps=drawing.steps,
                guidance_scale=drawing.guidance,
                height=frame.shape[-2],
                width=frame.shape[-1],
                max_sequence_length=16,
                generator=torch.Generator().manual_seed(drawing.seed),
                output_type="pt",
            )
            synchronize(pipe.device)
            result.seconds.append(now() - start)
            result.skipped += result.calls == before
            drawn.append(output.images.float().cpu())
    result.frames = torch.cat(drawn).clamp(0, 1)
    return result


def gate(pipe: Any, frame: torch.Tensor, drawing: Drawing) -> float:
    """Check that a stream of one and the same frame shows what the plain pipeline does, also after all rows moved up.

    Returns:
        the largest difference, of 1.

    Raises:
        DitaError: it is more than rounding.
    """
    still = frame.expand(drawing.indices + 3, -1, -1, -1)
    plain = draw(pipe, still[:1], drawing).frames
    with dita.accelerated(pipe, Stream(threshold=1.0)):
        worst = float((draw(pipe, still, drawing).frames - plain).abs().max())
    if not worst <= ROUNDING:
        raise DitaError(f"gate failed: a still scene is off by {worst:.2g} in a stream batch; nothing was timed")
    return worst


def film_psnr(frames: torch.Tensor, plain: torch.Tensor, delay: int) -> float | None:
    """PSNR in dB of a film, by its mean squared error, to frames that went in `delay` calls earlier; None if equal.

    Example:
        >>> film_psnr(torch.full((2, 3, 4, 4), 0.5), torch.full((2, 3, 4, 4), 0.4), 1)
        20.0
    """
    error = float((frames[delay:] - plain[: len(plain) - delay]).square().mean())
    return -10 * math.log10(error) if error else None


def row(name: str, drawn: Film, plain: Film, delay: int) -> dict[str, Any]:
    """One line of the table."""
    later = drawn.seconds[1:]
    return {
        "method": name,
        "frames_per_second": len(later) / sum(later),
        "calls": drawn.calls,
        "rows": drawn.rows,
        "skipped_frames": drawn.skipped,
        "delay": delay,
        "psnr": film_psnr(drawn.frames, plain.frames, delay),
        "psnr_now": film_psnr(drawn.frames, plain.frames, 0),
    }


def bench(pipe: Any, frames: torch.Tensor, drawing: Drawing, threshold: float) -> Iterator[dict[str, Any]]:
    """Gate, then each way of drawing the film."""
    yield {"gate": "a still scene equals the plain run", "largest_difference": gate(pipe, frames[:1], drawing)}
    delay = drawing.indices - 1
    plain = draw(pipe, frames, drawing)
    yield row("plain", plain, plain, 0)
    for name, method, wait in (
        ("filter", Stream(batch=False, threshold=threshold), 0),
        ("stream batch", Stream(threshold=1.0), delay),
        ("stream batch and filter", Stream(threshold=threshold), delay),
    ):
        with dita.accelerated(pipe, method):
            yield row(name, draw(pipe, frames, drawing), plain, wait)


def main() -> None:
    """Parse the command line and print one JSON line for the machine, the gate and each way of drawing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caption", default="a red bag on the left")
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--strength", type=float, default=0.5)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--threshold", type=float, default=0.98, help="of the similarity filter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, default=None, help="file for the same lines")
    args = parser.parse_args()
    drawing = Drawing(args.caption, args.steps, args.strength, args.guidance, args.seed, args.clock)
    frames = film(args.caption, args.frames, args.seed)
    pipe = image_to_image(args.device)
    with pinned_threads(args.threads) as threads:
        machine = {"device": device_name(args.device), "threads": threads, "code": code_version()}
        names = ("caption", "frames", "steps", "strength", "guidance", "threshold", "clock")
        asked = {name: getattr(args, name) for name in names}
        lines = [json.dumps({**machine, "versions": library_versions(), **asked})]
        print(lines[0], flush=True)
        for line in bench(pipe, frames, drawing, args.threshold):
            lines.append(json.dumps(line))
            print(lines[-1], flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()

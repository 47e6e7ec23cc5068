"""Train the network that reads the world, and keep what it sees in real renders.

    python -m dita.eval.training.worldnet --minutes 20 --out eval/models/fashion-world

Starts from the bundled garment classifier's convolutions. Renders of Fashion-MNIST's training garments (scenes, clips
and single frames of clips, a little noise added), AdamW with a cosine schedule over a budget of processor time; the
average of the weights is kept.
The accuracies of its heads on renders of the 10,000 test garments go into `accuracy.json`, the features of real scenes
and clips into `scene.safetensors` and `clip.safetensors`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dita.eval.classifier import load_classifier
from dita.eval.metrics.frechet import Gaussian
from dita.eval.metrics.semantic import semantics
from dita.eval.reference import Reference
from dita.eval.world import (
    COLOURS,
    GARMENTS,
    MOTIONS,
    PLACES,
    Clip,
    Renderer,
    Scene,
    captions,
    random_clip,
    random_scene,
    read_caption,
)
from dita.eval.worldnet import WorldNet, load_worldnet

_COLOURS, _MOTIONS = tuple(COLOURS), tuple(MOTIONS)
_HELD_OUT = 4000
_FLOOR_SAMPLES = 2000


def scene_loss(net: WorldNet, scenes: list[Scene], images: torch.Tensor) -> torch.Tensor:
    """Cross entropies of both halves of scenes [N, 3, 32, 64] in [-1, 1]; an empty half has no garment or colour."""
    garment = torch.full((len(scenes), 2), -100)
    colour = torch.full((len(scenes), 2), -100)
    for row, scene in enumerate(scenes):
        for item in scene.items:
            side = PLACES.index(item.place)  # pyright: ignore[reportArgumentType]
            garment[row, side], colour[row, side] = GARMENTS.index(item.garment), _COLOURS.index(item.colour)
    reading = net.read(net.embedding(images))
    occupied = (garment >= 0).float()
    return (
        F.cross_entropy(reading.garment.flatten(0, 1), garment.flatten())
        + F.cross_entropy(reading.colour.flatten(0, 1), colour.flatten())
        + F.binary_cross_entropy_with_logits(reading.occupied, occupied)
    )


def clip_loss(net: WorldNet, clips: list[Clip], videos: torch.Tensor) -> torch.Tensor:
    """Cross entropies of clips [N, frames, 3, 32, 32] in [-1, 1]: garment and colour by frame, motion by clip.

    Single frames show no motion and only the first two count.
    """
    embedding = net.embedding(videos)
    reading = net.read(embedding)
    frames = videos.shape[1]
    garment = torch.tensor([GARMENTS.index(clip.garment) for clip in clips]).repeat_interleave(frames)
    colour = torch.tensor([_COLOURS.index(clip.colour) for clip in clips]).repeat_interleave(frames)
    loss = (
        F.cross_entropy(reading.garment.flatten(0, 1), garment)
        + F.cross_entropy(reading.colour.flatten(0, 1), colour)
        + F.binary_cross_entropy_with_logits(reading.occupied, torch.ones_like(reading.occupied))
    )
    if frames == 1:
        return loss
    motion = torch.tensor([_MOTIONS.index(clip.motion) for clip in clips])
    return loss + F.cross_entropy(net.read_motion(embedding), motion)


def noisy(media: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Add noise of up to 0.05 to each sample, so that the network does not hang on what a generator cannot match."""
    strength = 0.05 * torch.rand(len(media), *[1] * (media.ndim - 1), generator=generator)
    return media + strength * torch.randn(media.shape, generator=generator)


@torch.no_grad()
def started(net: WorldNet) -> WorldNet:
    """Copy what the garment classifier knows: convolutions on grey, half of the features, the garment head.

    In a wider network the classifier's channels come first, and to them the other channels give nothing yet.
    """
    classifier = load_classifier()
    mine: Any
    theirs: Any
    for index, (mine, theirs) in enumerate(zip(net.convs, classifier.convs, strict=True)):
        weight = theirs.weight.expand(-1, 3, -1, -1) / 3 if index == 0 else theirs.weight
        out, into = weight.shape[:2]
        mine.weight[:out] = 0.0
        mine.weight[:out, :into] = weight
    for mine, theirs in zip(net.norms, classifier.norms, strict=True):
        for name, values in theirs.state_dict().items():
            room = mine.state_dict()[name]
            room[: len(values)].copy_(values) if values.ndim else room.copy_(values)
    kept, narrow = classifier.embed.weight.shape
    net.embed.weight[:kept, narrow:] = 0.0
    net.embed.weight[:kept, :narrow], net.embed.bias[:kept] = classifier.embed.weight, classifier.embed.bias
    net.garment.weight.zero_()
    net.garment.weight[:, :kept] = classifier.head.weight
    net.garment.bias.copy_(classifier.head.bias)
    return net


def train(args: argparse.Namespace) -> WorldNet:
    """Train within the budget of minutes."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    renderer, net = (
        Renderer("train", args.data),
        load_worldnet(args.init_from).train().requires_grad_(True)
        if args.init_from
        else started(WorldNet(tuple(args.widths))),
    )
    average = copy.deepcopy(net).eval().requires_grad_(False)
    net = net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.02)
    start, step, shown = time.process_time(), 0, 0.0
    while (progress := (time.process_time() - start) / (60 * args.minutes * args.threads)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        scenes = [random_scene(generator) for _ in range(48)]
        loss = scene_loss(net, scenes, noisy(renderer.scenes(scenes, generator), generator))
        # Whole clips teach motion; more garments are seen in single frames.
        clips = [random_clip(generator) for _ in range(12)]
        videos = renderer.clips(clips, generator).transpose(1, 2)[:, ::6]
        loss = loss + clip_loss(net, clips, noisy(videos, generator))
        clips = [random_clip(generator) for _ in range(64)]
        stills = renderer.clips(clips, generator, frames=1).transpose(1, 2)
        loss = loss + clip_loss(net, clips, noisy(stills, generator))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _follow(average, net, min(0.998, (1 + step) / (10 + step)))
        step, shown = step + 1, shown + loss.item()
        if step % 100 == 0:
            print(f"step {step}, {progress:.0%}, loss {shown / 100:.4f}", flush=True)
            shown = 0.0
    return average


@torch.no_grad()
def _follow(average: WorldNet, net: WorldNet, decay: float) -> None:
    for kept, new in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
        kept.lerp_(new, 1 - decay) if kept.is_floating_point() else kept.copy_(new)


@torch.no_grad()
def measure(net: WorldNet, out: Path, data: str | None) -> dict[str, dict[str, float]]:
    """Write the accuracies on held-out renders and the features of real ones."""
    result: dict[str, dict[str, float]] = {}
    for kind in ("scene", "clip"):
        features = {}
        for split, count, seed in (("test", _HELD_OUT, 1), ("train", _FLOOR_SAMPLES, 2)):
            renderer, generator = Renderer(split, data), torch.Generator().manual_seed(seed)
            texts = captions(kind, count, seed)
            media = torch.cat([_render(renderer, kind, texts[i : i + 250], generator) for i in range(0, count, 250)])
            features[split] = torch.cat([net.features(part) for part in media.split(250)])
            if split == "test":
                found = semantics((media + 1) / 2, texts, net)
                result[kind] = {name: values.mean().item() for name, values in found.parts.items()}
                result[kind]["all"] = found.whole.mean().item()
        Reference(Gaussian.fit(features["test"]), result[kind]["all"], features["train"]).save(
            out / f"{kind}.safetensors"
        )
    (out / "accuracy.json").write_text(json.dumps({"held_out": _HELD_OUT, **result}, indent=2) + "\n")
    return result


def _render(renderer: Renderer, kind: str, texts: list[str], generator: torch.Generator) -> torch.Tensor:
    asked = [read_caption(text) for text in texts]
    if kind == "scene":
        return renderer.scenes(asked, generator)  # pyright: ignore[reportArgumentType]
    return renderer.clips(asked, generator).transpose(1, 2)  # pyright: ignore[reportArgumentType]


def main() -> None:
    """Parse the command line, train, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/fashion-world")
    parser.add_argument("--minutes", type=float, default=20, help="processor time per thread")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--widths", type=int, nargs=3, default=[16, 32, 64], help="channels at the three scales")
    parser.add_argument("--init-from", default=None, help="folder of a network to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", default=None, help="folder of Fashion-MNIST's idx files")
    args = parser.parse_args()
    net, out = train(args), Path(args.out)
    net.half().float().save(out)
    print(json.dumps(measure(net, out, args.data), indent=2))


if __name__ == "__main__":
    main()

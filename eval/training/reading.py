"""Teach text encoders to read the world's captions before a transformer learns to draw them.

Large pipelines come with encoders that were trained on text. Ours begin with random weights, and drawing teaches them
binding slowly or never: after 80,000 scenes the T5 encoder of fashion-flux knew which words a caption has and not in
which order. So they first learn, from captions alone, to hold at every token what stands on either side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dita.eval.world import COLOURS, GARMENTS, PLACES, Scene, random_scene

_SIZES = (len(GARMENTS) + 1, len(COLOURS) + 1) * len(PLACES)  # the last class: nothing on that side


def answers(scenes: Sequence[Scene]) -> torch.Tensor:
    """What stands where: int64 [B, 4], garment and colour on the left, garment and colour on the right.

    Example:
        >>> from dita.eval.world import read_caption
        >>> answers([read_caption("a blue bag on the right")]).tolist()
        [[10, 8, 8, 5]]
    """
    rows = torch.tensor([size - 1 for size in _SIZES]).repeat(len(scenes), 1)
    for row, scene in zip(rows, scenes, strict=True):
        for item in scene.items:
            side = 2 * PLACES.index(item.place or "left")
            row[side], row[side + 1] = GARMENTS.index(item.garment), list(COLOURS).index(item.colour)
    return rows


def learn_to_read(
    encode: Callable[[list[str]], Sequence[torch.Tensor]],
    encoders: nn.Module,
    widths: Sequence[int],
    seconds: float,
    generator: torch.Generator,
    batch: int = 64,
    lr: float = 2e-3,
) -> float:
    """Train text encoders until a linear layer on each of their features tells what a caption says.

    Args:
        encode: gives the features of captions: [B, C] or [B, tokens, C] each, of which every token is asked.
        encoders: the parameters that learn.
        widths: C of each of the features.
        seconds: processor time of one thread.
        generator: of the captions.
        batch: captions a step.
        lr: of AdamW; it falls to zero.

    Returns:
        share of right answers in the last tenth of the steps; NaN if there was no time for any.
    """
    heads = nn.ModuleList(nn.Linear(width, sum(_SIZES)) for width in widths)
    parameters = [*encoders.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    begin, right = time.process_time(), []
    while (progress := (time.process_time() - begin) / torch.get_num_threads() / max(seconds, 1e-9)) < 1:
        optimizer.param_groups[0]["lr"] = lr * (1 - progress)
        scenes = [random_scene(generator) for _ in range(batch)]
        asked, losses = answers(scenes), []
        for feature, head in zip(encode([str(scene) for scene in scenes]), heads, strict=True):
            tokens = feature.unflatten(0, (batch, 1)) if feature.ndim == 2 else feature
            parts = head(tokens).split(_SIZES, dim=-1)
            for part, answer in zip(parts, asked.unbind(1), strict=True):
                losses.append(F.cross_entropy(part.flatten(0, 1), answer.repeat_interleave(part.shape[1])))
                right.append((part.argmax(-1) == answer[:, None]).float().mean().item())
        torch.stack(losses).mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    last = right[-max(1, len(right) // 10) :]
    return sum(last) / len(last) if last else float("nan")

"""SADA's token-wise part: between full steps, blocks run on unstable tokens and a few others, the rest is reused.

Jiang et al., "SADA: Stability-guided Adaptive Diffusion Acceleration", ICML 2025, arXiv 2507.17135.

Kept: the output of every block at all image tokens. When: every `interval` steps, and outside the part `start` to
`stop` of the run, all tokens are computed; at the others the blocks run on one random token of every `cell` x `cell`
cell and on unstable tokens alone, whose outputs go into what is kept. Which: by the momentum M = -(f_t - 2 f_t+1 +
f_t+2) of the slope f of the latents, the mean over a token's channels; a token of high M does not go the way that the
last three steps told. Text runs at every step. Tokens take their positions along.

Differs from the paper: skipping whole steps by the mean of M is not part of this method, but of `sada`, which may be
attached with it. The slope is that of the latents from step to step over the difference of timesteps, which for flow
matching with Euler's method is the model's velocity after guidance, for which the authors' code has this M, and for
other solvers stands in for the gradient. The tokens computed are a fixed part, highest M first, where the authors take
those of M >= 0 up to a number: else how many of an image's tokens are computed would depend on its batch mates. The
authors prune in U-Nets, at the highest resolution, and switch pruning off for FLUX; their code gives kept tokens the
positions of a smaller grid, here they have their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from dita.anatomy import Anatomy
from dita.config import Method, check_number, check_whole
from dita.errors import DitaError
from dita.grid import channel_axis
from dita.kernels.reduction.base import CLAIM, require_known_positions
from dita.kernels.reduction.matching import Grid, draw_destinations, fitting, others, seed_of
from dita.kernels.sparse.handler import bytes_of
from dita.kernels.tokens import choose, gather_tokens, put_tokens
from dita.registry import register
from dita.seams import Call, Handler, Position, Reducer, Site


class Kept:
    """A reducer that reduces nothing and remembers what a block gives.

    Args:
        outputs: where to.
        key: under which name.
    """

    positions = None
    sizes = None

    def __init__(self, outputs: dict[Any, torch.Tensor], key: Any) -> None:
        self.outputs, self.key = outputs, key

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens themselves."""
        return x

    def restore(self, y: torch.Tensor) -> torch.Tensor:
        """The output itself; a copy is kept, for the next block may write into it."""
        self.outputs[self.key] = y.clone()
        return y


@dataclass(frozen=True)
class Refreshed:
    """Some tokens are computed, the others are as they were.

    Attributes:
        positions: int64 [B, M], those that are.
        kept: [B, N, C], the output as it was; takes the new rows in.

    Example:
        >>> some = Refreshed(torch.tensor([[1]]), torch.zeros(1, 3, 1))
        >>> some.restore(some.reduce(torch.ones(1, 3, 1))).flatten()
        tensor([0., 1., 0.])
    """

    positions: torch.Tensor
    kept: torch.Tensor
    sizes = None

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens to be computed [B, M, C]."""
        return gather_tokens(x, self.positions)

    def restore(self, y: torch.Tensor) -> torch.Tensor:
        """All tokens [B, N, C]."""
        return put_tokens(self.kept, self.positions, y).clone()


def momentum(points: list[tuple[float, torch.Tensor]]) -> torch.Tensor | None:
    """-(f_t - 2 f_t+1 + f_t+2) of the slopes between the last four points of a trajectory.

    Args:
        points: (time, latents), oldest first.

    Returns:
        of the latents' shape, float32; None with fewer than four points, or two at one time.

    Example:
        >>> momentum([(t, torch.tensor(t**3)) for t in (3.0, 2.0, 1.0, 0.0)])
        tensor(-6.)
    """
    pairs = list(zip(points[-4:], points[-3:], strict=False))
    if len(pairs) < 3 or any(after[0] == before[0] for before, after in pairs):
        return None
    first, second, third = ((a[1].float() - b[1].float()) / (a[0] - b[0]) for b, a in pairs)
    return -(third - 2 * second + first)


def on_tokens(model: nn.Module, x: torch.Tensor, grid: Grid) -> torch.Tensor | None:
    """The mean of latents over the channels and places of every token.

    Args:
        model: the transformer.
        x: [B, N, C], [B, C, H, W], or [B, C, F, H, W] in the model's order of axes.
        grid: frames, rows and columns of the tokens.

    Returns:
        [B, V]; None if the tokens do not lie so.

    Example:
        >>> on_tokens(nn.Identity(), torch.arange(4.0).view(1, 1, 2, 2), (1, 1, 2))
        tensor([[1., 2.]])
    """
    if x.ndim == 3:
        return x.mean(-1) if x.shape[1] == math.prod(grid) else None
    if x.ndim not in (4, 5):
        return None
    field = x.mean(channel_axis(model, x))
    field = field[:, None] if field.ndim == 3 else field
    if any(size % count for size, count in zip(field.shape[1:], grid, strict=True)):
        return None
    return functional.adaptive_avg_pool3d(field[:, None], grid).flatten(1)


def _rows(position: Position) -> slice:
    """Of a batch's latents, those of the call's samples."""
    return slice(None) if position.sample is None else slice(position.sample, position.sample + 1)


class TokenCache(Handler):
    """Runs the blocks of one transformer on some tokens between full steps.

    Args:
        settings: see there.
        anatomy: of the transformer.
    """

    def __init__(self, settings: SADAToken, anatomy: Anatomy) -> None:
        self.settings, self.sites, self._model = settings, anatomy.block_inputs, anatomy.model
        self._outputs: dict[Any, torch.Tensor] = {}
        self._points: list[tuple[float, torch.Tensor]] = []
        self._latest: torch.Tensor | None = None
        self._step, self._reached = -1, -1
        self._chosen: dict[tuple[int, int, int | None], torch.Tensor] = {}
        self._density, self._reason = 1.0, ""

    def begin_run(self) -> None:
        """Forget everything: a run starts."""
        self._outputs.clear()
        self._points.clear()
        self._latest, self._step, self._reached = None, -1, -1

    def begin_call(self, call: Call) -> None:
        """Note the time at which the latest latents stand."""
        latest, position = self._latest, call.position
        if position.step != self._step:
            self._step = position.step
            self._chosen.clear()
            if latest is not None:
                self._points = [*self._points[-3:], (position.timestep, latest)]
        # Steps that skip the transformer are not seen here: what the next call denoises is where they led.
        if latest is not None and self._reached + 1 != self._step and call.latents is not None:
            rows = _rows(position)
            latest[rows] = call.latents[: len(latest[rows])]
        self._density, self._reason = 1.0, "all tokens computed"

    def stepped(self, position: Position, latents: torch.Tensor) -> torch.Tensor:
        """Remember where the solver went."""
        self._latest, self._reached = latents.clone(), position.step
        return latents

    def _full(self, step: int, steps: int) -> bool:
        """All tokens are computed at this step."""
        settings = self.settings
        first, end = math.ceil(settings.start * steps - 1e-9), math.floor(settings.stop * steps + 1e-9)
        return not first <= step < end or (step - first) % settings.interval == 0

    def reducer(self, site: Site, occurrence: int, call: Call, tokens: torch.Tensor, text: int) -> Reducer | None:
        """All tokens, or some."""
        position = call.position
        key = (site, occurrence, position.stream)
        kept = self._outputs.get(key)
        if kept is not None and kept.shape[:2] != tokens.shape[:2]:
            kept = None
        if self._full(position.local_step, position.steps) or kept is None:
            used = position.local_step + 1 < position.steps and not self._full(position.local_step + 1, position.steps)
            return Kept(self._outputs, key) if used else None
        index = self._choice(call, tokens)
        count = tokens.shape[1]
        self._density = ((index.shape[1] + text) / (count + text)) ** 2
        self._reason = f"{index.shape[1]} of {count} tokens computed"
        return Refreshed(index, kept)

    def _choice(self, call: Call, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens to compute at this step, the same in all blocks: int64 [B, M]."""
        batch, count = tokens.shape[:2]
        key = (batch, count, call.position.sample)
        if key not in self._chosen:
            settings = self.settings
            grid = (call.grid[0], call.grid[1], call.grid[2])
            cell = fitting((1, settings.cell, settings.cell), grid)
            drawn = draw_destinations(grid, cell, seed_of(settings.seed, 0, call.position.step)).to(tokens.device)
            rest = others(drawn, count)
            index = drawn.expand(batch, -1)
            scores = self._scores(grid, batch, call.position)
            if scores is not None:
                some = choose(scores.to(tokens.device)[:, rest], round(settings.unstable * len(rest)))
                index = torch.cat([index, rest[some]], 1)
            self._chosen[key] = index
        return self._chosen[key]

    def _scores(self, grid: Grid, batch: int, position: Position) -> torch.Tensor | None:
        """The momentum of every token [B, V]; batched guidance has all latents several times over."""
        found = momentum(self._points)
        scores = None if found is None else on_tokens(self._model, found[_rows(position)], grid)
        if scores is None or batch % len(scores):
            return None
        return scores.repeat(batch // len(scores), 1)

    def irreducible(self, site: Site, call: Call, why: str) -> None:
        """Say why all are computed."""
        self._reason = why

    def end_call(self, call: Call) -> None:
        """Write the account into the call."""
        call.density *= self._density
        call.sparsely = f"{call.sparsely}; {self._reason}" if call.sparsely else self._reason

    def bytes_held(self) -> int:
        """Bytes of block outputs and of the trajectory."""
        return bytes_of([*self._outputs.values(), *(x for _, x in self._points)])


@register
@dataclass(frozen=True)
class SADAToken(Method):
    """Settings of SADA's token-wise part.

    Attributes:
        interval: steps from one at which all tokens are computed to the next; 1 computes all always.
        unstable: part of the tokens that are no destination which is computed in between, from 0 to 1.
        cell: side of the cells, one random token of which is computed.
        start, stop: parts of the run between which tokens are left out; published: steps 10 to 47 of 50.
        seed: of the random tokens.

    Raises:
        DitaError: a setting out of range; on attaching, a model of which dita does not know how positions are passed.

    Example:
        >>> SADAToken(unstable=0.2).label()
        'unstable=0.2'
    """

    interval: int = 4
    unstable: float = 0.5
    cell: int = 3
    start: float = 0.2
    stop: float = 0.94
    seed: int = 0

    name: ClassVar[str] = "sada-token"
    title: ClassVar[str] = "SADA, tokens"
    arxiv: ClassVar[str] = "2507.17135"
    axes: ClassVar[str] = "block outputs; unstable tokens computed between full steps; others reused"
    confidence: ClassVar[str] = "medium"
    claims: ClassVar[frozenset[str]] = frozenset({CLAIM, "which steps are reused"})
    seams: ClassVar[frozenset[str]] = frozenset({"block"})
    citation: ClassVar[str] = """@inproceedings{jiang2025sada,
  title={SADA: Stability-guided Adaptive Diffusion Acceleration},
  author={Jiang, Ting and Wang, Yixiao and Ye, Hancheng and Shao, Zishan and Sun, Jingwei and Zhang, Jingyang and
    Chen, Zekai and Zhang, Jianyi and Chen, Yiran and Li, Hai},
  booktitle={International Conference on Machine Learning},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("interval", self.interval, 1)
        check_number("unstable", self.unstable, 0, 1)
        check_whole("cell", self.cell, 1)
        check_number("start", self.start, 0, 1)
        check_number("stop", self.stop, 0, 1)
        check_whole("seed", self.seed, 0)
        if self.start > self.stop:
            raise DitaError(f"start is {self.start:g} and stop {self.stop:g}; expected start not to lie behind stop")

    def handler(self, anatomy: Anatomy) -> Handler:
        """See `Method.handler`."""
        anatomy.require("block", self.name)
        require_known_positions(anatomy, self.name)
        return TokenCache(self, anatomy)

    @classmethod
    def disabled(cls) -> SADAToken:
        """All tokens at every step."""
        return cls(interval=1)

    @classmethod
    def forced(cls) -> SADAToken:
        """Every other step on a third of the tokens."""
        return cls(interval=2, unstable=0.2, start=0.0, stop=1.0)

    @classmethod
    def ladder(cls) -> tuple[SADAToken, ...]:
        """From many tokens to few."""
        return tuple(cls(unstable=unstable) for unstable in (0.7, 0.5, 0.3, 0.1))

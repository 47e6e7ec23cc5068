"""What a method sees of a model: sites, calls, and the base class by which it takes part in a forward pass.

Shapes: B samples (twice the images under batched guidance), N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from dita.attention_view import Attended

if TYPE_CHECKING:
    from dita.response import Schedule

Features = tuple[torch.Tensor | None, ...]
"""What passes through a site: (hidden [B, N, C], text stream or None) of a span; the outputs of a module or model."""

SEAMS: tuple[str, ...] = ("step", "model", "block", "module", "attention")


@dataclass(frozen=True)
class Site:
    """One place of one model where a method may watch or act.

    Attributes:
        kind: "model" (the whole call), "span" (consecutive blocks), "module" (an attention or MLP inside a block),
            "attention" (scaled dot-product attention inside such a module), "entry" (what the attention of block
            `first` is about to read; can be watched, not skipped) or "input" (the image tokens that a module or block
            reads, which may be reduced, and its output, which is restored).
        name: unique within the model, such as "blocks[0:8]" or "transformer_blocks.3.attn1".
        first, last: the span's block numbers, both included, counted over all block lists in execution order.
        block: the block number of a module site.
        role: what the module is: "attention" (self or joint), "cross-attention", "mlp", "parallel" (both at once) or
            "linear" (a layer inside one of those); "block" for the input of a block.
        ends: the span reaches the last block, so that only the image stream is used after it.
        text: the module reads the text stream alone.
        temporal: the module attends over time alone, in a model that attends over space elsewhere.
    """

    kind: Literal["model", "span", "module", "attention", "entry", "input"]
    name: str
    first: int = -1
    last: int = -1
    block: int = -1
    role: str = ""
    ends: bool = False
    text: bool = False
    temporal: bool = False

    def __hash__(self) -> int:
        return hash(self.name)  # sites are keys of nearly everything: all fields would take a microsecond each time


@dataclass(frozen=True)
class Position:
    """Where a transformer call stands in its run.

    Attributes:
        step: solver step since the run began, from 0; image-to-image runs begin at 0 too.
        steps: solver steps of this run.
        stage: model evaluation within the step: 0, or 1 for the second one of Heun and other second-order solvers.
        branch: which of the step's calls: a guidance branch, or all of them batched.
        index: the step's number in the full schedule; differs from `step` when a run begins in the middle.
        schedule_length: solver steps of the full schedule.
        local_step: solver steps since this model was first called in the run (a second expert starts at 0).
        timestep: of the training schedule, scaled to 0..1000.
        sample: which sample of the batch, where samples are run one by one; None for all of them.
    """

    step: int
    steps: int
    stage: int
    branch: str
    index: int
    schedule_length: int
    local_step: int
    timestep: float = 0.0
    sample: int | None = None

    @property
    def name(self) -> str:
        """The branch, with the sample if there is one: "cond[2]"."""
        return self.branch if self.sample is None else f"{self.branch}[{self.sample}]"

    @property
    def stream(self) -> tuple[str, int]:
        """The key under which state is kept: the same branch, sample and stage, step after step."""
        return (self.name, self.stage)


@dataclass
class Call:
    """One call of the transformer, as it happens; handlers leave their verdict in it for the report.

    Attributes:
        position: where it stands.
        shapes: shapes of the tensors it was called with.
        scheduler: fingerprint of the scheduler.
        schedule: returns the run's timesteps; None for a call outside of a run.
        grid: frames, rows and columns of image tokens, () where the model does not tell.
        latents: what the transformer denoises, as it was called with it.
        arguments: everything it was called with, by name; must not be changed.
        scale: the pipeline's guidance scale, as methods on the sampling loop pass it on; None where there is none.
        tokens: image tokens of a sample, and how many there are at full resolution; None if these are all.
        fresh: nothing kept may stand in for any of it, as a method on the sampling loop asks.
        due: whether it is computed, as a method on the sampling loop says in place of a cache's plan; None for no word.
        action, value, reason: what was done, as in `dita.reporting.StepRecord`.
        note: what the run's report is to say about memory, "" for nothing new.
        density: share of the attention's pairs of tokens that were computed, over the layers that computed any.
        agree: of several ranks that work on one sample, returns what any of them wants; see `dita.agreement`.
        fewer_bits: attention was computed in fewer bits than the model's.
        sparsely: why that share is what it is, "" where nothing took part in attention.
    """

    position: Position
    shapes: tuple[tuple[int, ...], ...] = ()
    scheduler: str = ""
    grid: tuple[int, ...] = ()
    latents: torch.Tensor | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict, repr=False)
    scale: float | None = None
    tokens: tuple[int, int] | None = None
    fresh: bool = False
    due: bool | None = None
    action: str = "computed"
    value: float | None = None
    reason: str = ""
    note: str = ""
    density: float = 1.0
    fewer_bits: bool = False
    sparsely: str = ""
    schedule: Callable[[], Schedule | None] = field(default=lambda: None, repr=False)
    agree: Callable[..., tuple[bool, ...]] = field(default=lambda *wanted: wanted, repr=False)


@dataclass(frozen=True)
class Fresh:
    """Tokens on which a module runs although the rest of its output is forecast.

    Attributes:
        index: [B, K], int64.
        labels: [B, N] clusters of all tokens, -1 for none: `index[:, c]` stands for cluster c; None without clusters.
        share: by how much every kept token moves towards the fresh one of its cluster, from 0 to 1.
    """

    index: torch.Tensor
    labels: torch.Tensor | None = None
    share: float = 0.0


class Reducer(Protocol):
    """Makes fewer tokens of many, and many of few again.

    Attributes:
        positions: int64 [B or 1, M], the token whose position each reduced one takes; None if none is reduced, and
            `restore` alone is asked.
        sizes: [B, M], how many tokens each stands for, by whose logarithm its logits as a key are raised; None for not.
    """

    @property
    def positions(self) -> torch.Tensor | None: ...

    @property
    def sizes(self) -> torch.Tensor | None: ...

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """From [B, N, C] to [B, M, C]."""
        ...

    def restore(self, y: torch.Tensor) -> torch.Tensor:
        """From [B, M, C] to [B, N, C]."""
        ...


class Handler:
    """A method at work on one model: this one lets everything run and keeps nothing, others override what they need.

    The runtime calls it; it never touches modules itself.

    Attributes:
        sites: where it watches or acts.
        ranks: modules whose attention it looks at, token by token, at some steps.
        owner: name of the method, for messages; set on attaching.
    """

    sites: tuple[Site, ...] = ()
    ranks: frozenset[Site] = frozenset()
    owner: str = ""

    def begin_run(self) -> None:
        """Forget everything: a run starts."""

    def begin_call(self, call: Call) -> None:
        """The transformer is about to be called."""

    def drives(self, site: Site) -> bool:
        """Say, on attaching, whether this site is run through `drive`; nothing below is then asked about it."""
        return False

    def drive(self, site: Site, occurrence: int, call: Call, run: Callable[[], Features]) -> Features:
        """Return the outputs of the site; `run` computes them, as often as it is called, or not at all.

        Within `run` of the model gradients may be enabled, though the loop around it has them off.
        """
        return run()

    def compute(self, site: Site, call: Call, inputs: Features) -> bool:
        """Say whether the site runs for real this time."""
        return True

    def wants_inputs(self, site: Site) -> bool:
        """Say, always the same, whether `computed` and `skipped` need a span's inputs (copied) or a module's first."""
        return False

    def computed(self, site: Site, occurrence: int, call: Call, inputs: Features, outputs: Features) -> None:
        """The site ran: `inputs` are those of a span or module where `wants_inputs` says so, else empty."""

    def skipped(self, site: Site, occurrence: int, call: Call, inputs: Features) -> Features:
        """The site did not run: return what stands in for its outputs. Called only if `compute` said no."""
        raise NotImplementedError(f"{type(self).__name__} skips {site.name} but says nothing in its place")

    def fresh(self, site: Site, occurrence: int, call: Call, shape: tuple[int, ...]) -> Fresh | None:
        """Say on which tokens of an input of this shape a module runs that is to be skipped; None for none."""
        return None

    def refreshed(
        self, site: Site, occurrence: int, call: Call, inputs: Features, fresh: Fresh, outputs: Features
    ) -> Features:
        """The site ran on those tokens: return what stands in for its outputs on all. Only if `fresh` gave some."""
        raise NotImplementedError(f"{type(self).__name__} refreshes {site.name} but takes nothing of it up")

    def wants_attention(self, site: Site, call: Call) -> bool:
        """Say whether `attended` wants to see the attention of this module, which is about to run."""
        return False

    def attended(self, site: Site, call: Call, seen: Attended) -> None:
        """The module calls scaled dot-product attention with these tensors, which must not be changed."""

    def attend(
        self, site: Site, occurrence: int, call: Call, seen: Attended, plain: Callable[[Attended], torch.Tensor]
    ) -> torch.Tensor:
        """Answer one call of scaled dot-product attention of an "attention" site.

        Args:
            occurrence: which call of the site within this call of the model; models that attend sample by sample make
                several.
            seen: what it was given.
            plain: computes it; given `seen` itself, exactly what would have been computed without us.

        Returns:
            [B, H, N, D].
        """
        return plain(seen)

    def reducer(self, site: Site, occurrence: int, call: Call, tokens: torch.Tensor, text: int) -> Reducer | None:
        """Say how the image tokens that an "input" site is about to read are reduced; None to leave them.

        Args:
            tokens: [B, V, C], in the order of the call's grid; must not be changed.
            text: how many text tokens the module reads with them.
        """
        return None

    def irreducible(self, site: Site, call: Call, why: str) -> None:
        """The tokens at an "input" site are not known, so that they stay as they are."""

    def rehearses(self, site: Site, call: Call) -> bool:
        """Say whether the one block of this span, which runs, is to be run for real beforehand, for comparison."""
        return False

    def rehearsed(self, site: Site, call: Call, outputs: Features) -> None:
        """It was: `outputs` are what it puts out when nothing inside it is skipped."""

    def end_call(self, call: Call) -> None:
        """The transformer returned."""

    def stepped(self, position: Position, latents: torch.Tensor) -> torch.Tensor:
        """The solver finished a step on this model: return the latents to go on from, the same tensor if unchanged.

        Args:
            position: of the step; its branch is "".
            latents: as the scheduler returned them.
        """
        return latents

    def bytes_held(self) -> int:
        """Bytes of tensors kept between calls."""
        return 0

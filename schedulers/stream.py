"""Stream batch and similarity filter: a pipeline that is called once a frame calls its transformer once a frame.

Kodaira et al., "StreamDiffusion: A Pipeline-level Solution for Real-time Interactive Generation", arXiv 2312.12491,
2023.

What: every call of the pipeline is a frame (`pipe(image=frame, strength=...)`, or text-to-image from latents). The S
denoising steps of a frame are not run in its own call but in those of S frames, as rows of one batch: row j holds frame
f - j before its step j. All rows move one step, the oldest is finished, and its latents end the call. So a frame comes
out S - 1 calls after it went in, and state is kept from run to run by design.

When: always. The stochastic similarity filter leaves out whole frames: with c the cosine of the frame's latents and
those of the last frame that was processed, it is skipped with probability max(0, 1 - (1 - c) / (1 - threshold)), at
most `max_skips` times in a row. A skipped frame makes no call and returns the last result; the rows stay where they
are. One draw a frame serves all samples of a batch, and each is skipped by itself.

The first frame is run in full. Its latents before every step fill the batch, so that the next S - 1 calls return it
again, and every call a valid image. So it is after any change: of shapes, timesteps, scheduler, guidance scale, prompt
or other arguments of the transformer; a new scheduler takes two frames in full, for it is noticed after it added noise
to the first. Attaching the method again begins anew as well. A call that raised is as if it had not been made.

Guidance: the branches of classifier-free guidance run for all rows, and the pipeline combines them; "rcfg", named after
"stream", leaves one of them out. Give each call the same noise (`generator`) for pictures that do not flicker.

Defaults: threshold 0.98 and 10 skips are the authors'.

Differs from the paper: deterministic solvers of first order instead of an LCM, whose noise the pipeline would draw for
its own frame alone; frames are compared by their latents instead of their pixels; at most `max_skips` frames are
skipped in a row (the authors' code allows one more, and does not count anew after a frame that was processed); no
separate threads for encoding and decoding.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.fingerprint import fingerprint
from dita.loop import Loop, LoopVariables, Request, Run, Runner, Solver, Step
from dita.registry import register
from dita.schedulers.base import SamplingMethod
from dita.schedulers.flight import Flight, merged, run_some
from dita.schedulers.levels import Origin, entry_of
from dita.schedulers.solvers.first_order import FirstOrder, check_first_order


@dataclass(frozen=True)
class Turn:
    """What becomes of a frame.

    Attributes:
        who: the samples that are processed.
        whole: all steps are run in this call.
        reason: in words.
    """

    who: tuple[int, ...]
    whole: bool
    reason: str


class StreamBatch(Loop):
    """Batches the denoising steps of consecutive frames.

    Args:
        batch: do so; without, every frame that is not skipped is run in full.
        threshold: see `skip_probability`.
        max_skips: frames skipped in a row.
        seed: of the filter.
    """

    def __init__(self, batch: bool, threshold: float, max_skips: int, seed: int) -> None:
        self.batch, self.threshold, self.max_skips, self.seed = batch, threshold, max_skips, seed
        self._live: Flight | None = None

    def begin_run(self, run: Run) -> None:
        """A frame begins; one that was not finished is forgotten."""
        if self.batch:
            check_first_order(run.scheduler, "stream")
        self._run, self._origin = run, Origin(run.pipe)
        self._turn: Turn | None = None
        self._draft: Flight | None = None
        self._place = (0, -1)
        self._left: torch.Tensor | None = None

    def noised(self, clean: torch.Tensor, result: torch.Tensor) -> None:
        """See `Loop.noised`."""
        self._origin.noised(clean, result)

    def bytes_held(self) -> int:
        """See `Loop.bytes_held`."""
        return 0 if self._live is None else self._live.bytes_held()

    def model(self, request: Request, run: Runner) -> Any:
        """See `Loop.model`."""
        step = request.position.step
        number = self._place[1] + 1 if self._place[0] == step else 0
        self._place = (step, number)
        if self._turn is None:
            self._turn = self._decide(request)
        turn, flight = self._turn, self._draft
        assert flight is not None
        if not turn.who or (step > 0 and not turn.whole):
            request.leave_out(turn.reason if not turn.who else "the later steps of this frame run with the next ones")
            return request.answer((request.empty(),))
        other = flight.note(number, request) if turn.whole and self.batch else ""
        if not turn.whole:
            other = flight.other(number, request)
        if other:
            raise DitaError(
                f"{type(self._run.pipe).__name__} calls its transformer with another {other} at step {step} of a frame:"
                " stream batches steps that differ in latents and timestep alone; batch=False leaves the filter"
            )
        if not turn.whole:
            request = flight.spread(number, request, FirstOrder(self._run.scheduler))
        return run_some(replace(request, reason=turn.reason), run, turn.who, flight.batch)

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        """See `Loop.step`."""
        turn, flight = self._turn, self._draft
        if turn is None or flight is None:
            return solve(step.output, step.sample)
        size = flight.batch
        copies = step.sample.shape[0] // size  # DiTPipeline keeps its latents twice
        last = step.position.step + 1 >= step.position.steps
        sample = step.sample
        if turn.whole:
            sample = self._whole(flight, step, solve)
            if last:
                flight.result = merged(sample[:size], flight.result, turn.who)
        elif turn.who and step.position.step == 0:
            sample = self._advance(flight, turn, step, solve, copies)
        if not last:
            return sample
        self._live = flight
        assert flight.result is not None
        return torch.cat([flight.result] * copies) if copies > 1 else flight.result

    def _decide(self, request: Request) -> Turn:
        """Compare the frame with those in flight, and with the last one processed."""
        variables = LoopVariables(self._run.pipe).read()
        latents = request.latents[: request.batch]
        own = variables.get("latents")
        if self.batch and isinstance(own, torch.Tensor) and own.shape != latents.shape:
            raise DitaError(
                f"{request.anatomy.name} reads {list(latents.shape)}, but the latents are {list(own.shape)}: what else "
                "it reads belongs to one frame and cannot go with the others. stream works on text-to-image and "
                "image-to-image pipelines; batch=False leaves the filter"
            )
        if self.batch and variables.get("eta"):
            raise DitaError(f"stream needs a deterministic solver, but eta is {variables['eta']}: pass eta=0")
        clean, scheduler = self._origin.clean(latents), self._run.scheduler
        subject = latents if clean is None else clean
        sampling = {
            "scheduler": fingerprint(scheduler),
            "timesteps": torch.as_tensor(scheduler.timesteps).tolist(),
            "first timestep": entry_of(scheduler, variables.get("t"), request.position.index),
            "latents": (latents.shape, latents.dtype, latents.device),
            "kind of input": clean is None,
            "guidance": request.roles,
        }
        negative = {k: v for k, v in variables.items() if k.startswith("negative_") and isinstance(v, torch.Tensor)}
        everyone = tuple(range(request.batch))
        changed = self._live.changed(sampling, negative, request) if self._live is not None else ""
        if changed or self._live is None:
            why = f"begun anew with another {changed}" if changed else "the first frame"
            why += ": run in full, to fill the batch" if self.batch else ""
            skips = [0] * request.batch
            flight = Flight(sampling, negative, subject, [clean], random.Random(self.seed), skips)
            flight.calls = [] if self.batch else [request.changed(hidden_states=None)]
            self._draft = flight
            request.remark(why)
            return Turn(everyone, True, why)
        flight = self._draft = self._live.next()
        who = flight.let_through(subject, self.threshold, self.max_skips)
        if not who:
            return Turn((), False, "too similar to the last frame that was processed")
        flight.reference, flight.clean[0] = merged(subject, flight.reference, who), clean
        count = f", {len(who)} of {request.batch} images" if who != everyone else ""
        if self.batch:
            return Turn(who, False, f"{len(flight.entries)} denoising indices in one batch{count}")
        request.remark("the frame is not similar enough to be skipped")
        return Turn(who, True, f"not similar enough to be skipped{count}")

    def _whole(self, flight: Flight, step: Step, solve: Solver) -> torch.Tensor:
        """A step of a frame that is run in full, which fills the batch."""
        if self.batch:
            if self._left is not None and not torch.equal(self._left.to(step.sample.dtype), step.sample):
                raise DitaError(
                    f"the latents of {type(step.pipe).__name__} were changed between two steps (by a callback, an "
                    "inpainting mask, or another method), which stream cannot do to frames of earlier calls"
                )
            flight.entries.append(entry_of(step.scheduler, step.timestep, step.position.index))
            if len(flight.entries) > 1:
                flight.latents.append(step.sample[: flight.batch])
                flight.clean.append(flight.clean[0])
        self._left = solve(step.output, step.sample)
        return self._left

    def _advance(self, flight: Flight, turn: Turn, step: Step, solve: Solver, copies: int) -> torch.Tensor:
        """Move every row by one step; the frame's own by the pipeline's scheduler."""
        rows = len(flight.entries) * flight.batch
        if step.output.shape[0] != copies * rows:
            raise DitaError(
                f"{type(step.pipe).__name__} made {step.output.shape[0]} rows of what its transformer put out, "
                f"expected {copies * rows}: stream cannot tell the frames apart"
            )
        outputs = step.output[:rows].split(flight.batch)
        first = solve(torch.cat([outputs[0]] * copies), step.sample)
        flight.advance(outputs, first[: flight.batch], FirstOrder(step.scheduler), turn.who)
        return first


@register
@dataclass(frozen=True)
class Stream(SamplingMethod):
    """The settings of the stream batch and its filter.

    Attributes:
        batch: the steps of consecutive frames run in one batch.
        threshold: cosine below which no frame is skipped; 1 switches the filter off.
        max_skips: most frames skipped in a row.
        seed: of the filter's draws: a stream from its first frame on is the same twice.

    Raises:
        DitaError: a setting out of range.

    Example:
        >>> Stream(threshold=1.0).label()
        'threshold=1'
    """

    batch: bool = True
    threshold: float = 0.98
    max_skips: int = 10
    seed: int = 0

    name: ClassVar[str] = "stream"
    title: ClassVar[str] = "Stream batch (StreamDiffusion)"
    arxiv: ClassVar[str] = "2312.12491"
    axes: ClassVar[str] = "all steps of a frame in one batch with other frames; similar frames skipped at random"
    seams: ClassVar[frozenset[str]] = frozenset({"step", "model"})
    joint: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({"solver", "timesteps", "resolution"})
    across_runs: ClassVar[bool] = True
    citation: ClassVar[str] = """@article{kodaira2023streamdiffusion,
  title={StreamDiffusion: A Pipeline-level Solution for Real-time Interactive Generation},
  author={Kodaira, Akio and Xu, Chenfeng and Hazama, Toshiki and Yoshimoto, Takanori and Ohno, Kohei and
    Mitsuhori, Shogo and Sugano, Soichi and Cho, Hanying and Liu, Zhijian and Keutzer, Kurt},
  journal={arXiv preprint arXiv:2312.12491},
  year={2023}
}"""

    def validate(self) -> None:
        """Check ranges."""
        if not isinstance(self.batch, bool):
            raise DitaError(f"batch is {self.batch!r}; expected True or False")
        check_number("threshold", self.threshold, 0, 1)
        check_whole("max_skips", self.max_skips, 0)
        check_whole("seed", self.seed, 0)

    def make(self, anatomies: tuple[Anatomy, ...], pipe: Any) -> StreamBatch:
        """See `SamplingMethod.make`.

        Raises:
            DitaError: a solver whose steps cannot be told apart, or steps that are shared by two transformers.
        """
        if self.batch and pipe is not None:
            check_first_order(pipe.scheduler, "stream")
        if self.batch and len(anatomies) > 1:
            names = ", ".join(anatomy.name for anatomy in anatomies)
            raise DitaError(f"stream runs all steps in one call, but this pipeline shares them among {names}")
        return StreamBatch(self.batch, float(self.threshold), self.max_skips, self.seed)

    @classmethod
    def disabled(cls) -> Stream:
        """Neither batch nor filter."""
        return cls(batch=False, threshold=1.0)

    @classmethod
    def forced(cls) -> Stream:
        """Every frame is processed, from the second one on in one call."""
        return cls(threshold=1.0)

    @classmethod
    def ladder(cls) -> tuple[Stream, ...]:
        """The filter alone, the batch alone, both."""
        return (cls(batch=False), cls(threshold=1.0), cls())

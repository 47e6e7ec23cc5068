"""The seam on the sampling loop: what methods see of runs, steps and calls, and what becomes of their answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from helpers import GUIDED, plain
from pipelines import TINY

import dita
from dita.anatomy import Anatomy
from dita.caching import TaylorSeer
from dita.errors import DitaError
from dita.loop import Loop, Request, Run, Runner, Solver, Step, StepCall, roles_of, tensors_of
from dita.schedulers.base import SamplingMethod
from dita.schedulers.guidance import CFGCache, GuidanceInterval
from dita.watching import watched


class Watcher(Loop):
    """Writes down what it sees."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.requests: list[Request] = []
        self.outputs: list[torch.Tensor] = []
        self.steps: list[Step] = []

    def begin_run(self, run: Run) -> None:
        self.runs.append(run)

    def model(self, request: Request, run: Runner) -> Any:
        self.requests.append(request)
        result = run(request)
        first = tensors_of(result)[0]
        assert first is not None
        self.outputs.append(first)
        return result

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        self.steps.append(step)
        return solve(step.output, step.sample)


@pytest.mark.parametrize("tiny", TINY)
def test_watching_changes_nothing_and_names_every_branch(tiny: str) -> None:
    pipe, watcher = TINY[tiny].build(), Watcher()
    with watched(pipe, watcher):
        assert torch.equal(TINY[tiny].call(pipe), plain(tiny))
    assert len(watcher.runs) == 1 and watcher.runs[0].pipe is pipe
    spec = TINY[tiny]
    seen = [r.roles for r in watcher.requests if r.position.step == 1 and r.position.stage == 0]
    if spec.batched_cfg:
        assert seen == [("cond", "uncond") if tiny == "dit" else ("uncond", "cond")]
    else:
        assert seen == ([("cond",), ("uncond",)] if spec.branches == 2 else [("all",)])
    scales = {r.scale for r in watcher.requests}
    assert (None in scales) == (tiny not in GUIDED) and len(scales) <= 2
    assert {s.position.step for s in watcher.steps} == set(range(watcher.steps[-1].position.steps))


@pytest.mark.parametrize("tiny", [name for name in GUIDED if TINY[name].batched_cfg and name != "sd3-heun"])
def test_a_branch_runs_alone_as_it_does_in_the_batch(tiny: str) -> None:
    class Apart(Loop):
        def model(self, request: Request, run: Runner) -> Any:
            result = run(request)
            whole = tensors_of(result)[0]
            assert whole is not None and len(request.roles) == 2
            for n, role in enumerate(request.roles):
                part = request.part(role)
                assert part.latents.shape[0] == request.batch and part.roles == (role,)
                alone = tensors_of(run(part))[0]
                assert alone is not None
                rows = whole[n * request.batch : (n + 1) * request.batch]
                torch.testing.assert_close(alone, rows, rtol=1e-4, atol=1e-4)
            return result

    pipe = TINY[tiny].build()
    with watched(pipe, Apart()):
        assert torch.equal(TINY[tiny].call(pipe, steps=2, batch=2), plain(tiny, steps=2, batch=2))


def test_the_scheduler_keeps_count_when_its_step_is_answered_without_it() -> None:
    class Frozen(Loop):
        def step(self, step: Step, solve: Solver) -> torch.Tensor:
            return step.sample

    pipe = TINY["wan"].build()
    start = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with watched(pipe, Frozen()):
        out = TINY["wan"].call(pipe, latents=start)
        run = dita.report(pipe).last
    assert run.finished and run.steps == 8
    assert torch.equal(out, TINY["wan"].call(pipe, latents=start, steps=1)) is False
    with watched(pipe, Frozen()):
        assert torch.equal(TINY["wan"].call(pipe, latents=start, steps=3), out), "the latents never moved"


@dataclass(frozen=True)
class Scaled(SamplingMethod):
    """Multiplies and shifts the sample: two of them show the order."""

    factor: float = 1.0
    shift: float = 0.0
    seen: list[float] = field(default_factory=list, compare=False, repr=False)

    name: ClassVar[str] = "scaled"
    saves: ClassVar[bool] = False

    def make(self, anatomies: tuple[Anatomy, ...], pipe: Any) -> Loop:
        method = self

        class Answer(Loop):
            def step(self, step: Step, solve: Solver) -> torch.Tensor:
                method.seen.append(float(step.output.mean()))
                return solve(step.output * method.factor + method.shift, step.sample)

        return Answer()

    @classmethod
    def disabled(cls) -> Scaled:
        return cls()


def test_the_first_method_is_outermost_and_disabled_ones_are_not_attached() -> None:
    pipe = TINY["wan"].build()
    double, shift = Scaled(factor=2.0), Scaled(shift=3.0)
    dita.accelerate_pipeline(pipe, double, shift)
    TINY["wan"].call(pipe, steps=1)
    assert shift.seen == pytest.approx([2 * double.seen[0]])
    dita.accelerate_pipeline(pipe, Scaled())
    assert torch.equal(TINY["wan"].call(pipe), plain("wan")) and "scaled" in str(dita.report(pipe))


def test_arguments_by_name_and_place() -> None:
    anatomy = dita.anatomy.describe(TINY["dit"].build().transformer)
    x = torch.zeros(4, 3)
    mapping = {"mask": torch.ones(4), "ids": torch.ones(4, 2), "other": torch.ones(3)}
    position = dita.seams.Position(0, 1, 0, "call 0", 0, 1, 0)
    request = Request(
        position,
        ("uncond", "cond"),
        ("hidden_states", "timestep", "extra"),
        (x, torch.arange(4)),
        {"extra": mapping, "image_rotary_emb": (torch.ones(4, 2),)},
        anatomy,
    )
    assert request.get("timestep").tolist() == [0, 1, 2, 3] and request.get("missing") is None
    part = request.part("cond")
    assert part.get("timestep").tolist() == [2, 3] and part.position.branch == "cond"
    cut = part.get("extra")
    assert cut["mask"].shape == (2,) and cut["ids"].shape == (4, 2) and cut["other"].shape == (3,)
    assert part.get("image_rotary_emb")[0].shape == (4, 2)
    moved = request.changed(timestep=torch.zeros(4), extra=None)
    assert moved.args[1].sum() == 0 and moved.kwargs["extra"] is None and request.args[1].sum() == 6
    with pytest.raises(DitaError, match="takes no argument sigma"):
        request.changed(sigma=1)
    with pytest.raises(DitaError, match="expected a tensor"):
        request.changed(hidden_states=[x]).latents  # noqa: B018


def test_rows_are_taken_of_all_that_has_one_a_sample() -> None:
    """Lists with an entry a sample are cut; those with one a block are cut within, and settings stay."""
    position = dita.seams.Position(0, 1, 0, "call 0", 0, 1, 0)
    anatomy = dita.anatomy.describe(TINY["dit"].build().transformer)
    sizes = [[(1, 2, n)] for n in range(3)]
    blocks = [torch.arange(3.0), torch.arange(3.0), torch.arange(3.0)]
    given = {
        "hidden_states": torch.arange(3.0)[:, None],
        "img_shapes": sizes,
        "txt_seq_lens": [4, 5, 6],
        "skip_layers": [7, 8, 9],
        "block_controlnet_hidden_states": blocks,
        "encoder_hidden_states_llama3": torch.arange(6.0).view(2, 3),
    }
    request = Request(position, ("all",), tuple(given), (), given, anatomy)
    for rows in ([1], [2, 0]):
        taken = request.taken(rows)
        assert taken.latents.flatten().tolist() == rows
        assert taken.get("img_shapes") == [sizes[n] for n in rows]
        assert taken.get("txt_seq_lens") == [4 + n for n in rows]
        assert taken.get("skip_layers") == [7, 8, 9]
        assert [b.tolist() for b in taken.get("block_controlnet_hidden_states")] == [rows] * 3
        assert taken.get("encoder_hidden_states_llama3").tolist() == [rows, [3 + n for n in rows]]
    listed = {"x": list(torch.ones(3, 3)), "t": torch.arange(3.0), "texts": list(torch.arange(9.0).view(3, 3))}
    taken = Request(position, ("all",), tuple(listed), (), listed, anatomy).taken([1])
    assert len(taken.get("x")) == 1 and [t.tolist() for t in taken.get("texts")] == [[3, 4, 5]]


@pytest.mark.parametrize(
    ("variables", "branch", "earlier", "rows", "expected"),
    [
        ({"do_classifier_free_guidance": True}, "call 0", [], 2, ("uncond", "cond")),
        ({"do_classifier_free_guidance": True}, "call 0", [], 3, ("uncond", "cond", "third")),
        ({"do_classifier_free_guidance": True}, "call 1", [("uncond", "cond")], 1, ("third",)),
        ({"do_classifier_free_guidance": False}, "cond", [], 1, ("all",)),
        ({"do_classifier_free_guidance": True}, "call 1", [("cond",)], 1, ("uncond",)),
        ({"do_classifier_free_guidance": True}, "uncond", [], 1, ("uncond",)),
        ({"do_true_cfg": True}, "uncond_stg", [("cond",), ("uncond",)], 1, ("third",)),
        ({}, "pred_uncond", [("cond",)], 1, ("uncond",)),
        ({}, "call 0", [], 2, ("all",)),
        ({"guidance_scale": 1.0}, "call 0", [], 2, ("all",)),
    ],
)
def test_roles(variables: dict[str, Any], branch: str, earlier: Any, rows: int, expected: tuple[str, ...]) -> None:
    latents = torch.zeros(1, 4)
    assert roles_of({"latents": latents, **variables}, object(), branch, earlier, latents.repeat(rows, 1)) == expected


def test_a_loop_of_the_users_own_has_no_guidance_to_change() -> None:
    pipe = TINY["sd3"].build()
    with pytest.warns(dita.DitaWarning, match="this run has none"), dita.accelerated(pipe, GuidanceInterval()):
        pipe.scheduler.set_timesteps(4)
        x = torch.zeros(2, 4, 8, 8)
        for t in pipe.scheduler.timesteps:
            arguments = {"encoder_hidden_states": torch.zeros(2, 6, 32), "pooled_projections": torch.zeros(2, 16)}
            with torch.no_grad():
                v = pipe.transformer(x, timestep=t.expand(2), **arguments, return_dict=False)[0]
            x = pipe.scheduler.step(v, t, x, return_dict=False)[0]


def test_streams_of_a_cache_outlive_the_branch_that_is_left_out() -> None:
    for tiny in ("sd3", "wan"):
        pipe = dita.accelerate_pipeline(TINY[tiny].build(), GuidanceInterval(), TaylorSeer(interval=2, warmup=1))
        out = TINY[tiny].call(pipe)
        run = dita.report(pipe).last
        marks = {branch: "".join(r.action[0] for r in rs) for (_, branch, _), rs in run.streams().items()}
        assert marks["cond"].count("c") == 4 and marks["uncond"].endswith("ssss") and marks["uncond"].count("c") == 2
        assert out.isfinite().all()


def test_what_guidance_compares_is_computed() -> None:
    """CFG-Cache takes the difference of the branches at one step in five: forecasts of either would not do."""
    pipe = TINY["wan"].build()
    dita.accelerate_pipeline(pipe, CFGCache(below=1001), TaylorSeer(interval=4, warmup=1))
    TINY["wan"].call(pipe, steps=12)
    run = dita.report(pipe).last
    for records in run.streams().values():
        assert [r.action for r in records if r.step in (0, 5, 10)] == ["computed"] * 3
    assert {r.action for r in run.records} >= {"forecast", "skipped"}


def test_arguments_of_a_step() -> None:
    scheduler = TINY["wan"].build().scheduler
    scheduler.set_timesteps(4)
    x = torch.ones(1, 2)
    call = StepCall(scheduler, scheduler.step, (x, scheduler.timesteps[0], x), {"return_dict": False})
    assert call.readable and call.first == "model_output"
    assert torch.equal(call.run(torch.zeros(1, 2), x)[0], x)
    assert not StepCall(scheduler, scheduler.step, (None, scheduler.timesteps[0], x), {}).readable

"""Module- and model-level methods against their papers' algorithms written out by hand; see `handwritten`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from handwritten import STEPS, HandBlock, assert_same, by_dita, by_hand, record_modules, run_all
from pipelines import TINY

import dita
from dita.caching import (
    BAC,
    PAB,
    ABCache,
    EasyCache,
    EfficientVLA,
    FasterCache,
    FoCa,
    HiCache,
    HyCa,
    SmoothCache,
    SpeCa,
    TaylorSeer,
)
from dita.caching.policy import Verdict, View
from dita.caching.smoothcache import greedy_schedule
from dita.caching.speca import Speculation
from dita.errors import DitaError
from dita.seams import Position

Key = tuple[int, str]


class Modules:
    """A trunk whose modules are computed or stood in for, by `due(step, kind)` and `forecast(past, step, key)`.

    `past` lists (step, feature, computed) newest first; `keep` trims it; `forecasts_enter` adds forecasts to it.
    """

    def __init__(
        self,
        computed: list[int],
        due: Callable[[int, str], bool],
        forecast: Callable[[list[Any], int, Key], torch.Tensor] = lambda past, step, key: past[0][1],
        forecasts_enter: bool = False,
    ) -> None:
        self.computed, self.due, self.forecast, self.forecasts_enter = computed, due, forecast, forecasts_enter
        self.step, self.past = -1, {}

    def __call__(self, h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
        self.step += 1
        ran = [kind for kind in ("attention", "mlp") if self.due(self.step, kind)]
        if len(ran) == 2:
            self.computed.append(self.step)
        for block in blocks:
            h = block(h, self.module)
        return h

    def module(self, key: Key, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        past = self.past.setdefault(key, [])
        if self.due(self.step, key[1]):
            out = run()
            past.insert(0, (self.step, out, True))
            return out
        out = self.forecast(past, self.step, key)
        if self.forecasts_enter:
            past.insert(0, (self.step, out, False))
        return out


def fixed(interval: int, warmup: int) -> Callable[[int, str], bool]:
    return lambda step, kind: step < warmup or (step - warmup + 1) % interval == 0


def ladder(past: list[Any], order: int, oldest: int) -> list[torch.Tensor]:
    """TaylorSeer's recursion run forward over all anchors from step `oldest` on."""
    rungs: list[torch.Tensor] = []
    last = None
    for step, feature, _ in reversed(past):
        new = [feature]
        if last is not None and step > oldest:
            for j in range(min(order, len(rungs))):
                new.append((new[j] - rungs[j]) / (step - last))
        rungs, last = new, step
    return rungs


@pytest.mark.parametrize("order", [1, 2])
def test_taylorseer_modules(order: int) -> None:
    def forecast(past: list[Any], step: int, key: Key) -> torch.Tensor:
        k = step - past[0][0]
        return sum(d * k**j / math.factorial(j) for j, d in enumerate(ladder(past, order, 1)))  # pyright: ignore

    assert_same(
        TaylorSeer(interval=4, order=order, warmup=3), lambda c: Modules(c, fixed(4, 3), forecast), [0, 1, 2, 6, 10]
    )


@pytest.mark.parametrize(("order", "scale"), [(1, 0.5), (2, 0.5), (3, 0.71)])
def test_hicache(order: int, scale: float) -> None:
    """Physicists' Hermite polynomials by NumPy, scaled s^j H_j(s k)."""

    def forecast(past: list[Any], step: int, key: Key) -> torch.Tensor:
        k, total = step - past[0][0], torch.zeros(())
        for j, rung in enumerate(ladder(past, order, 1)):
            value = np.polynomial.hermite.hermval(scale * k, [0] * j + [1])
            total = total + rung * float(scale**j * value / math.factorial(j))
        return total

    config = HiCache(interval=4, order=order, scale=scale, warmup=3)
    assert_same(config, lambda c: Modules(c, fixed(4, 3), forecast), [0, 1, 2, 6, 10])


def test_foca() -> None:
    """BDF2 then Heun on tensors, the window holding real and predicted values."""

    def forecast(past: list[Any], step: int, key: Key) -> torch.Tensor:
        (s0, f0, real0), (s1, f1, _) = past[:2]
        (a0, g0, _), (a1, g1, _) = [entry for entry in past if entry[2]][:2]
        assert s0 - s1 == 1 and step - s0 == 1, "every step leaves a value"
        slope_full = (g0 - g1) / (a0 - a1)
        slope_now = slope_full if real0 else f0 - f1
        predicted = 4 / 3 * f0 - f1 / 3 + 2 / 3 * slope_now
        return f0 + 0.5 * (slope_full + (predicted - f0))

    assert_same(FoCa(interval=4, warmup=2), lambda c: Modules(c, fixed(4, 2), forecast, True), [0, 1, 5, 9, 13])


def test_efficientvla() -> None:
    assert_same(EfficientVLA(), lambda c: Modules(c, lambda step, kind: step % 5 == 0), [0, 5, 10])


def test_efficientvla_computes_two_of_cogacts_ten_steps() -> None:
    pipe = dita.accelerate_pipeline(TINY["dit"].build(), "efficientvla")
    TINY["dit"].call(pipe, steps=10)
    assert dita.report(pipe).last.computed_steps == (0, 5)


def timesteps() -> list[float]:
    pipe = TINY["dit"].build()
    pipe.scheduler.set_timesteps(STEPS)
    return pipe.scheduler.timesteps.tolist()


def test_pab() -> None:
    """Attention at multiples of 3 inside the range; MLPs always."""
    times = timesteps()

    def due(step: int, kind: str) -> bool:
        return kind == "mlp" or not 100 < times[step] < 850 or step % 3 == 0

    assert_same(PAB(self_interval=3), lambda c: Modules(c, due))


def test_fastercache() -> None:
    """Newest plus half the drift between the two newest computed outputs, below timestep 681."""
    times = timesteps()

    def due(step: int, kind: str) -> bool:
        return kind == "mlp" or times[step] >= 681 or step % 3 == 0

    def forecast(past: list[Any], step: int, key: Key) -> torch.Tensor:
        new, old = past[0][1], past[1][1]
        return new + 0.5 * (new - old)

    assert_same(FasterCache(interval=3), lambda c: Modules(c, due, forecast))


def test_fastercache_with_a_rising_weight() -> None:
    """Open-Sora's: the first eight calls in full, then every other one, with the drift weighted 0.9 (c - 7) / 20."""

    def due(step: int, kind: str) -> bool:
        return kind == "mlp" or step <= 7 or step % 2 == 0

    def forecast(past: list[Any], step: int, key: Key) -> torch.Tensor:
        new, old = past[0][1], past[1][1]
        return new + 0.9 * (step - 7) / 20 * (new - old)

    assert_same(FasterCache.published("open-sora"), lambda c: Modules(c, due, forecast))


def test_smoothcache() -> None:
    """Changes averaged over depth on a full run, then the authors' greedy scan for each kind."""
    alpha, most = 0.5, 3
    features = record_modules()

    def change(kind: str, i: int, j: int) -> float:
        each = []
        for key, seen in features.items():
            if key[1] == kind:
                rows = zip(seen[i], seen[i + j], strict=True)
                each.append(np.mean([((a - b).abs().mean() / b.abs().mean()).item() for a, b in rows]))
        return float(np.mean(each))

    schedules: dict[str, set[int]] = {}
    for kind in ("attention", "mlp"):
        computed, i = set(), 0
        while i < STEPS:
            computed.add(i)
            lags = [j for j in range(1, most + 1) if i + j < STEPS and change(kind, i, j) <= alpha]
            i += max(lags, default=0) + 1
        schedules[kind] = computed | {STEPS - 1}
    assert schedules["attention"] != schedules["mlp"], "guard: the kinds must differ for the test to say anything"
    assert_same(SmoothCache(alpha=alpha, most=most), lambda c: Modules(c, lambda step, kind: step in schedules[kind]))


def test_smoothcache_schedule_tests_the_far_end_only() -> None:
    """Only the lag's far end is compared, as in the authors' code: a bump in between does not stop it."""
    assert greedy_schedule([[0.9] * 5, [0.1] * 4], 6, 0.2, 2) == [True, False, False, True, False, True]


def test_hyca_is_taylor_where_one_solver_serves_all() -> None:
    """With every channel on Taylor's order 1, HyCa is TaylorSeer; with the chosen solvers it is not."""
    pipe = TINY["dit"].build()
    call = lambda p: TINY["dit"].call(p, steps=STEPS, batch=2)  # noqa: E731
    config: Any = HyCa(interval=4).calibrated(pipe, call)
    chosen = {solver for solvers in config.table.values.values() for solver in solvers}
    assert len(chosen) > 1, "guard: different clusters want different solvers"
    uniform = {name: (1,) * len(solvers) for name, solvers in config.table.values.items()}
    import dataclasses

    taylor, _ = by_dita(TaylorSeer(interval=4))
    outputs = []
    for table in (config.table, dataclasses.replace(config.table, values=uniform)):
        accelerated = dita.accelerate_pipeline(TINY["dit"].build(), config.replace(table=table))
        outputs.append(call(accelerated))
    assert not torch.equal(outputs[0], taylor)
    torch.testing.assert_close(outputs[1], taylor, rtol=1e-4, atol=1e-5)


def test_hyca_by_drift_takes_the_least_sum_of_errors_on_its_own_schedule() -> None:
    """The choice for one module, from its outputs in a plain run, written out; the run then skips what was judged."""
    from dita.caching.hyca import SOLVERS, scheduled, solver_weights

    tiny, interval, warmup = TINY["dit"], 4, 3
    call = lambda p: tiny.call(p, steps=STEPS)  # noqa: E731
    pipe = tiny.build()
    config = HyCa(interval=interval, warmup=warmup, criterion="drift", clusters=1).calibrated(pipe, call)
    block, outputs = pipe.transformer.transformer_blocks[2], []
    hook = block.ff.register_forward_hook(lambda module, inputs, output: outputs.append(output.double()))
    call(pipe)
    hook.remove()
    cases = scheduled(STEPS, interval, warmup)
    drifts = []
    for solver in SOLVERS:
        total = torch.zeros_like(outputs[0])
        for anchors, step in cases:
            weights = solver_weights(solver, step - anchors[0], anchors)
            total += sum(w * outputs[a] for w, a in zip(weights, anchors, strict=True)) - outputs[step]
        drifts.append(total.square().sum().item())
    assert config.table is not None
    chosen = set(config.table.values["transformer_blocks.2.ff, 0"])
    assert len(chosen) == 1 and drifts[chosen.pop()] <= min(drifts) * (1 + 1e-4)
    dita.accelerate_pipeline(pipe, config)
    call(pipe)
    skipped = [r.step for r in dita.report(pipe).last.records if r.action == "forecast"]
    assert skipped == [step for _, step in cases]
    with pytest.raises(DitaError, match="skips none at interval 40"):
        HyCa(interval=40, warmup=STEPS, criterion="drift").calibrated(tiny.build(), call)
    with pytest.raises(DitaError, match="'error' or 'drift'"):
        HyCa(criterion="bias")


class ModelByHand:
    """The transformer's whole call under an algorithm `run(latents, compute)`."""

    def __init__(self, run: Callable[[torch.Tensor, Callable[[], torch.Tensor]], torch.Tensor]) -> None:
        self.run = run

    def output(self) -> torch.Tensor:
        pipe = TINY["dit"].build()
        original = pipe.transformer.forward

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sample = self.run(hidden_states, lambda: original(hidden_states, *args, **kwargs)[0])
            return type("Output", (), {"sample": sample})

        vars(pipe.transformer)["forward"] = forward
        return TINY["dit"].call(pipe, steps=STEPS, batch=2)


@pytest.mark.parametrize(("points", "push"), [(1, False), (2, False), (2, True), (4, False)])
def test_ab_cache(points: int, push: bool) -> None:
    state: dict[str, Any] = {"step": -1, "queue": []}
    computed: list[int] = []

    def run(x: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        state["step"] += 1
        queue = state["queue"]
        if state["step"] < 5 or state["step"] % 3 == 0:
            computed.append(state["step"])
            queue.insert(0, compute())
            return queue[0]
        out = sum((-1) ** j * math.comb(points, j + 1) * queue[j] for j in range(points))
        if push:
            queue.insert(0, out)
        return out  # pyright: ignore[reportReturnType]

    expected = ModelByHand(run).output()
    output, report = by_dita(ABCache(interval=3, points=points, push_forecasts=push))
    assert list(report.computed_steps) == computed == [0, 1, 2, 3, 4, 6, 9, 12]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_ab_cache_published_schedule() -> None:
    pipe = dita.accelerate_pipeline(TINY["dit"].build(), "ab-cache")
    TINY["dit"].call(pipe, steps=50)
    assert dita.report(pipe).last.computed_steps == (0, 1, 2, 3, 4, *range(6, 50, 6))


def test_easycache() -> None:
    """The authors' running error, per sample of a batch with guidance; the output minus the latents is reused."""
    threshold, warmup = 0.3, 4
    state: dict[str, Any] = {"step": -1, "error": torch.zeros(4), "k": None}
    computed: list[int] = []

    def mean(t: torch.Tensor) -> torch.Tensor:
        return t.abs().mean((1, 2, 3))

    def run(x: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        state["step"] += 1
        step = state["step"]
        skip = False
        if step >= warmup and step < STEPS - 1:
            state["error"] = state["error"] + state["k"] * mean(x - state["x"]) / mean(state["ya"])
            skip = state["error"].max().item() < threshold
        state["x"] = x
        if skip:
            return torch.cat([x + state["delta"], state["ya"][:, 4:]], 1)
        computed.append(step)
        y = compute()
        if "ya" in state:
            state["k"] = mean(y - state["ya"]) / mean(x - state["xa"])
        state.update(ya=y, xa=x, delta=y[:, :4] - x, error=torch.zeros(4))
        return y

    expected = ModelByHand(run).output()
    output, report = by_dita(EasyCache(threshold=threshold, warmup=warmup))
    assert list(report.computed_steps) == computed and 4 < len(computed) < STEPS - 1
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_easycache_lets_the_first_branch_decide() -> None:
    """Wan calls the model for cond and uncond in turn: both skip on the same steps."""
    pipe = dita.accelerate_pipeline(TINY["wan"].build(), EasyCache(threshold=0.1, warmup=3))
    TINY["wan"].call(pipe, steps=STEPS)
    lanes = dita.report(pipe).last.streams()
    actions = [[r.action for r in records] for records in lanes.values()]
    assert len(actions) == 2 and actions[0] == actions[1] and "reused" in actions[0]
    reasons = {r.reason for r in next(iter(reversed(lanes.values())))}
    assert any(reason.startswith("as the first branch") for reason in reasons)


def test_the_plain_modules_are_the_model() -> None:
    computed: list[int] = []
    expected = by_hand(run_all)
    torch.testing.assert_close(by_hand(Modules(computed, lambda step, kind: True)), expected)
    assert computed == list(range(STEPS))


def test_bac() -> None:
    """Schedules by exhaustive search over all choices of updates, then the union over MLPs behind."""
    budget, upstream = 4, 2
    features = record_modules()

    def best(seen: list[torch.Tensor]) -> set[int]:
        flat = torch.stack(seen).flatten(1)
        alike = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
        choices = [(0, *rest) for rest in itertools.combinations(range(1, STEPS), budget - 1)]
        value = lambda chosen: sum(  # noqa: E731
            alike[max(c for c in chosen if c <= step), step].item() for step in range(STEPS) if step not in chosen
        )
        return set(max(choices, key=value))

    chosen = {key: best(seen) for key, seen in features.items()}
    change = {
        key: torch.cdist(flat, flat, p=1).mean().item()
        for key, flat in ((key, torch.stack(seen).flatten(1)) for key, seen in features.items())
        if key[1] == "mlp"
    }
    final = {key: set(steps) for key, steps in chosen.items()}
    for key in sorted(change, key=lambda k: -change[k])[:upstream]:
        for other in change:
            if other[0] > key[0]:
                final[key] |= chosen[other]
    assert final != chosen, "guard: the union adds something"

    class PerSite(Modules):
        def __call__(self, h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
            self.step += 1
            if all(self.step in steps for steps in final.values()):
                self.computed.append(self.step)
            for block in blocks:
                h = block(h, self.module)
            return h

        def module(self, key: Key, run: Callable[[], torch.Tensor]) -> torch.Tensor:
            if self.step in final[key]:
                self.past[key] = run()
            return self.past[key]

    expected = by_hand(PerSite([], lambda step, kind: True))
    output, report = by_dita(BAC(updates=round(100 * budget / STEPS), upstream=upstream))
    assert report.reused > 0 and any(record.action == "partial" for record in report.records)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("least", "most", "steps", "fails", "counts"),
    [
        (2, 5, 50, False, (9, 41, 24)), (2, 5, 50, True, (13, 37, 12)), (3, 8, 50, False, (7, 43, 25)),
        (3, 8, 50, True, (11, 39, 9)), (3, 8, 99, False, (12, 87, 53)), (3, 8, 99, True, (21, 78, 19)),
        (3, 8, 100, False, (12, 88, 54)), (3, 8, 100, True, (21, 79, 19)),
    ],
)  # fmt: skip
def test_speca_schedule(least: int, most: int, steps: int, fails: bool, counts: tuple[int, int, int]) -> None:
    """Computed, drafted and verified steps of the released DiT scheduler, when all drafts pass and when all fail."""
    policy = Speculation(0.5, 0.5, 0.01, least, most)
    found = [0, 0, 0]
    for step in range(steps):
        view = View(Position(step, steps, 0, "all", step, steps, step))
        verdict = policy.decide(view) if step else Verdict(True, "first step")
        if verdict.compute:
            found[0] += 1
            policy.computed(view)
            continue
        found[1] += 1
        found[2] += verdict.verify
        if verdict.verify:
            exact = torch.ones(1, 2, 3)
            policy.verified((exact * (9.0 if fails else 1.0),), (exact,), view)
        policy.skipped(view)
    assert tuple(found) == counts


def test_speca() -> None:
    """Drafts on modules; the last block run twice on verified steps, its exact output used for the error only."""
    threshold, decay, floor, least, most = 0.9, 0.4, 0.01, 1, 4
    errors: list[float] = []

    class Speculating(Modules):
        def __init__(self, computed: list[int]) -> None:
            super().__init__(computed, lambda step, kind: self.full, self.taylor)
            self.drafts, self.error, self.full = 0, None, True

        @staticmethod
        def taylor(past: list[Any], step: int, key: Key) -> torch.Tensor:
            k = step - past[0][0]
            return sum(d * k**j / math.factorial(j) for j, d in enumerate(ladder(past, 2, 1)))  # pyright: ignore

        def __call__(self, h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
            step, check = self.step + 1, False
            if step == 0:
                self.full = True
            elif self.full:
                self.full, self.drafts, self.error = False, 1, None
            else:
                allowed = max(floor, threshold * decay ** ((step + 1) / STEPS))
                check = self.drafts >= least
                self.full = step < 3 or self.drafts >= most
                self.full = self.full or (check and self.error is not None and self.error > allowed)
                self.drafts += 1
            self.step = step
            if self.full:
                self.computed.append(step)
            for block in blocks[:-1]:
                h = block(h, self.module)
            if check and not self.full:
                exact, draft = blocks[-1](h), blocks[-1](h, self.module)
                rows = zip(draft, exact, strict=True)
                self.error = max(((d - e).abs() / (e.abs() + 1e-10)).mean().item() for d, e in rows)
                errors.append(self.error)
                return draft
            return blocks[-1](h, self.module)

    config = SpeCa(threshold=threshold, decay=decay, floor=floor, least=least, most=most)
    assert_same(config, Speculating)
    assert len(errors) > 2 and len(set(errors)) == len(errors)

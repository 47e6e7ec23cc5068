"""HarmoniCa: inference and training against the algorithm written out by hand, and what the training must do."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from handwritten import HandBlock, HandWritten, by_hand
from helpers import assert_same_snapshot, plain, snapshot
from pipelines import TINY

import dita
from dita.caching import HarmoniCa, Table
from dita.caching.harmonica_training import LIMIT, START, Training, error_of, train_router
from dita.config import Method
from dita.errors import DitaError

STEPS = 4
Key = tuple[int, str]
Call = Callable[[Any], Any]


def call(pipe: Any, steps: int = STEPS) -> torch.Tensor:
    return TINY["dit"].call(pipe, steps=steps, batch=2)


def site(key: Key) -> str:
    return f"transformer_blocks.{key[0]}.{'attn1' if key[1] == 'attention' else 'ff'}"


def keys(pipe: Any) -> list[Key]:
    return [(n, kind) for n in range(len(pipe.transformer.transformer_blocks)) for kind in ("attention", "mlp")]


def test_a_module_runs_iff_its_sigmoid_is_above_the_threshold() -> None:
    """The rule by hand, on a table of chance with a step on which all modules run and one on which none does."""
    generator = torch.Generator().manual_seed(0)
    pipe, steps = TINY["dit"].build(), 14
    table = {key: torch.rand(steps, generator=generator) for key in keys(pipe)}
    for row in table.values():
        row[5], row[0], row[8] = 0.9, 0.0, 0.0
    state: dict[str, Any] = {"step": -1}
    kept: dict[Key, torch.Tensor] = {}
    ran = []

    def trunk(h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
        state["step"] += 1
        step = state["step"]

        def module(key: Key, run: Callable[[], torch.Tensor]) -> torch.Tensor:
            if step == 0 or table[key][step] > 0.4:
                ran.append((step, site(key)))
                kept[key] = run()
            return kept[key]

        for block in blocks:
            h = block(h, module)
        return h

    expected = by_hand(trunk)
    rows = {site(key): tuple(row.tolist()) for key, row in table.items()}
    config = HarmoniCa(threshold=0.4, table=Table(rows, steps=steps))
    computed = [(site.name, step) for site, step in computed_by(pipe, config)]
    output = TINY["dit"].call(dita.accelerate_pipeline(pipe, config), steps=steps, batch=2)
    run = dita.report(pipe).last
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert [r.action for r in run.records][:9] == ["computed", *["partial"] * 4, "computed", *["partial"] * 2, "reused"]
    assert sorted(computed) == sorted((name, step) for step, name in ran)


def computed_by(pipe: Any, config: Method) -> list[tuple[Any, int]]:
    """(site, step) of every module that ran."""
    found: list[tuple[Any, int]] = []
    with dita.accelerated(pipe, config):
        handler = vars(pipe)["_dita_session"].runtimes[0].handlers[0]
        done = handler.computed
        handler.computed = lambda s, n, c, i, o: (found.append((s, c.position.step)), done(s, n, c, i, o))
        TINY["dit"].call(pipe, steps=14, batch=2)
    return found


class ByHand:
    """The training without dita: blends, proxy and Adam, on trajectories of the tiny DiT from fixed noise."""

    def __init__(self, threshold: float, beta: float) -> None:
        self.pipe = TINY["dit"].build()
        self.keys = keys(self.pipe)
        self.threshold, self.beta, self.rate = threshold, beta, 0.0
        self.logits = torch.full((STEPS, len(self.keys)), -1.0)
        self.first, self.second = torch.zeros_like(self.logits), torch.zeros_like(self.logits)
        self.updates, self.scale = 0, 0.0
        self.proxy: dict[int, float] = {}

    def blended(self, shares: torch.Tensor) -> Any:
        def trunk(h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
            def module(key: Key, run: Callable[[], torch.Tensor]) -> torch.Tensor:
                share = shares[self.keys.index(key)]
                self.new[key] = share * run() + (1 - share) * self.kept[key]
                return self.new[key]

            for block in blocks:
                h = block(h, module)
            return h

        return HandWritten(self.pipe, trunk)

    def full(self) -> Any:
        def trunk(h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
            def module(key: Key, run: Callable[[], torch.Tensor]) -> torch.Tensor:
                self.new[key] = run()
                return self.new[key]

            for block in blocks:
                h = block(h, module)
            return h

        return HandWritten(self.pipe, trunk)

    def keep(self, shares: torch.Tensor) -> None:
        for key, new in self.new.items():
            if key not in self.kept or shares[self.keys.index(key)] > self.threshold:
                self.kept[key] = new.detach()

    def run(self, step_of: Callable[[int, Any], Any]) -> torch.Tensor:
        """One trajectory whose model calls are `step_of(step, arguments)`; returns the final latents."""
        self.kept: dict[Key, torch.Tensor] = {}
        self.new: dict[Key, torch.Tensor] = {}
        count, latents, pipe = [0], [], self.pipe
        step = type(pipe.scheduler).step

        def forward(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            return step_of(count[0] - 1, (args, kwargs))

        def stepping(*args: Any, **kwargs: Any) -> Any:
            result = step(pipe.scheduler, *args, **kwargs)
            latents[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
            return result

        vars(pipe.transformer)["forward"], vars(pipe.scheduler)["step"] = forward, stepping
        call(pipe)
        return latents[0]

    def measure(self) -> None:
        """The proxy: routers enabled one after the other from the first step on."""
        errors: dict[int, float] = {}

        def follow(last: int) -> Callable[[int, Any], Any]:
            def step_of(step: int, arguments: Any) -> Any:
                args, kwargs = arguments
                full = self.full()(*args, **kwargs)
                if step == 0:
                    self.keep(torch.ones(len(self.keys)))
                if step == 0 or step > last:
                    return full
                shares = self.logits[step].sigmoid()
                out = self.blended(shares)(*args, **kwargs)
                self.keep(shares)
                errors[step] = (out.sample - full.sample).square().mean().item()
                return out

            return step_of

        latents = [self.run(follow(last)) for last in range(STEPS)]
        changes = {n: (latents[n] - latents[n - 1]).square().mean().item() for n in range(1, STEPS)}
        self.scale = self.scale or median(changes[n] * errors[n] for n in changes)
        self.proxy = {n: change / self.scale for n, change in changes.items()}

    def train(self, rate: float) -> None:
        self.updates, self.rate = self.updates + 1, rate

        def step_of(step: int, arguments: Any) -> Any:
            args, kwargs = arguments
            full = self.full()(*args, **kwargs)
            if step == 0:
                self.keep(torch.ones(len(self.keys)))
                return full
            with torch.enable_grad():
                row = self.logits[step].clone().requires_grad_(True)
                out = self.blended(row.sigmoid())(*args, **kwargs)
                error = (out.sample - full.sample).square().mean()
                (self.proxy[step] * error + self.beta * row.sigmoid().mean()).backward()
            self.keep(row.detach().sigmoid())
            self.adam(step, row.grad)
            return type("Output", (), {"sample": out.sample.detach()})

        self.run(step_of)

    def adam(self, step: int, grad: Any) -> None:
        first, second = self.first[step], self.second[step]
        first.mul_(0.9).add_(0.1 * grad)
        second.mul_(0.999).add_(0.001 * grad**2)
        mean, spread = first / (1 - 0.9**self.updates), second / (1 - 0.999**self.updates)
        self.logits[step] = (self.logits[step] - self.rate * mean / (spread.sqrt() + 1e-8)).clamp(-5, 5)


def test_training_is_the_algorithm_by_hand() -> None:
    hand = ByHand(threshold=0.25, beta=0.5)
    for number in range(3):
        if number % 2 == 0:
            hand.measure()
        hand.train(rate=0.3 * (1 - number / 3))
    training = Training(threshold=0.25, beta=0.5, rate=0.3)
    train_router(TINY["dit"].build(), call, training, iterations=3, refresh=2)
    assert training.names == [site(key) for key in hand.keys]
    assert training.proxy == pytest.approx(hand.proxy, rel=1e-3)
    learned = torch.stack([training.logits[step].detach() for step in range(1, STEPS)])
    torch.testing.assert_close(learned, hand.logits[1:], rtol=1e-3, atol=1e-4)
    assert (learned > -0.9).any() and (learned < -1.2).any(), "some went up and some fell below the threshold"


def test_gradient_is_that_of_finite_differences() -> None:
    class Checked(Training):
        def learn(self, step: int, student: Any) -> Any:
            row = torch.linspace(-1, 1, len(self.names), dtype=torch.float64, requires_grad=True)
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(student(row)[0], [row])
            for column in range(len(row)):
                nudge = torch.zeros_like(row)
                nudge[column] = 1e-5
                high, low = student(row.detach() + nudge)[0], student(row.detach() - nudge)[0]
                assert (high - low).item() / 2e-5 == pytest.approx(grad[column].item(), rel=1e-3, abs=1e-9)
                checked.append(grad[column].item())
            return super().learn(step, student)

    checked: list[float] = []
    pipe = TINY["dit"].build()
    pipe.to(torch.float64)
    train_router(pipe, lambda p: call(p, 3), Checked(beta=0.5), iterations=1, refresh=1)
    assert len(checked) == 2 * len(keys(pipe)) and min(checked) < 0 < max(checked)


def test_training_lowers_the_objective_and_touches_nothing_else() -> None:
    class Noted(Training):
        def loss(self, step: int, error: torch.Tensor, sigmoids: torch.Tensor) -> torch.Tensor:
            losses.append(super().loss(step, error, sigmoids))
            return losses[-1]

    losses: list[torch.Tensor] = []
    pipe = TINY["dit"].build()
    call(pipe)
    before, chance = snapshot(pipe), torch.get_rng_state()
    weights = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    train_router(pipe, call, Noted(beta=1.0, rate=0.6), iterations=4, refresh=4)
    each = torch.stack(losses).detach().reshape(4, STEPS - 1).sum(1)
    assert each[-1] < 0.9 * each[0], each
    assert_same_snapshot(before, snapshot(pipe))
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(p.requires_grad and p.grad is None for p in pipe.transformer.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in pipe.transformer.state_dict().items())
    assert torch.equal(TINY["dit"].call(pipe), plain("dit"))


def test_the_module_that_matters_is_kept() -> None:
    """All modules but one put out nothing: only that one is worth computing, and not where beta outweighs it."""
    pipe = TINY["dit"].build()
    alive = "transformer_blocks.0.attn1"
    for number, block in enumerate(pipe.transformer.transformer_blocks):
        for name, last in (("attn1", block.attn1.to_out[0]), ("ff", block.ff.net[2])):
            if f"transformer_blocks.{number}.{name}" != alive:
                torch.nn.init.zeros_(last.weight)
                torch.nn.init.zeros_(last.bias)
    training = Training(beta=1.0, rate=1.0)
    train_router(pipe, call, training, iterations=5, refresh=5)
    table = training.sigmoids()
    assert all(max(row[1:]) < 0.1 for name, row in table.items() if name != alive), table
    strongest = max(training.proxy, key=lambda n: training.proxy[n] * training.errors[n][0])
    assert table[alive][strongest] > 0.5, table[alive]


@pytest.mark.parametrize("tiny", ["flux-img2img", "wan-2", "sd3-heun"])
def test_trains_whatever_the_pipeline(tiny: str) -> None:
    """Sequential guidance, two experts, two evaluations a step, a run from the middle."""
    case, pipe = TINY[tiny], TINY[tiny].build()
    config: Any = HarmoniCa(iterations=1, stride=8).calibrated(pipe, case.call)
    rows = config.table.values
    assert rows.keys() == {part.site.name for part in dita.anatomy.describe(pipe.transformer).modules}
    first, top = 2 if tiny == "flux-img2img" else 0, round(torch.tensor(LIMIT).sigmoid().item(), 4)
    start = round(torch.tensor(START).sigmoid().item(), 4)
    moved = {step for row in rows.values() for step, value in enumerate(row) if value not in (start, top)}
    assert all(set(row[: first + 1]) == {top} for row in rows.values())
    assert len(moved) >= 4
    assert Method.from_json(config.to_json()) == config
    with dita.accelerated(pipe, config.replace(threshold=0.5)):
        case.call(pipe)
        assert any(record.action != "computed" for record in dita.report(pipe).last.records)


def test_what_it_had_attached_is_attached_again() -> None:
    pipe = dita.accelerate_pipeline(TINY["dit"].build(), "efficientvla")
    before = call(pipe)
    HarmoniCa(iterations=0).calibrated(pipe, call)
    assert dita.report(pipe).methods[0].startswith("efficientvla") and torch.equal(call(pipe), before)


def test_refuses() -> None:
    pipe, config = TINY["dit"].build(), HarmoniCa(iterations=1)
    seeds = iter(range(100))
    with pytest.raises(DitaError, match="started from other noise under the same seed"):
        config.calibrated(pipe, lambda p: TINY["dit"].call(p, steps=4, seed=next(seeds)))
    lengths = iter((4, 5))
    with pytest.raises(DitaError, match="ran 4 steps first and 5 now"):
        config.calibrated(pipe, lambda p: call(p, next(lengths)))
    with pytest.raises(DitaError, match="ran no sampling loop"):
        config.calibrated(pipe, lambda p: None)
    with pytest.raises(DitaError, match="inference_mode forbids"), torch.inference_mode():
        config.calibrated(pipe, call)
    pipe.transformer.enable_gradient_checkpointing()
    with pytest.raises(DitaError, match="gradient checkpointing"):
        config.calibrated(pipe, call)
    for bad in ({"threshold": 1.5}, {"beta": -1}, {"iterations": -1}, {"refresh": 0}, {"stride": 0}, {"rate": "x"}):
        with pytest.raises(DitaError, match="expected"):
            HarmoniCa(**bad)  # pyright: ignore[reportArgumentType]


def test_error_is_over_all_outputs() -> None:
    outputs = (torch.tensor([[1.0, 3.0]]), None, torch.tensor([[0.0]]))
    assert error_of(outputs, (torch.zeros(1, 2), None, torch.ones(1, 1))).item() == 3.0

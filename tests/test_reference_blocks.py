"""Block-level methods against their papers' algorithms written out by hand; see `handwritten`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from handwritten import STEPS, HandBlock, Trunk, assert_same, by_hand, relative, run_all

from dita.caching import AdaCache, CacheQuant, CGTaylor, DeltaDiT, DiCache, Foresight, FreqCa, TeaCache


def taylor(ladder: list[torch.Tensor], k: int) -> torch.Tensor:
    return sum(d * (k**j / math.factorial(j)) for j, d in enumerate(ladder))  # pyright: ignore[reportReturnType]


def climb(old: list[torch.Tensor], feature: torch.Tensor, gap: int, order: int) -> list[torch.Tensor]:
    new = [feature]
    for j in range(min(order, len(old))):
        new.append((new[j] - old[j]) / gap)
    return new


@pytest.mark.parametrize(("probe_order", "order"), [(1, 1), (3, 1), (0, 2)])
def test_cg_taylor(probe_order: int, order: int) -> None:
    """Skip while the first block's output is forecast well; both ladders move on computed steps only."""
    threshold, warmup = 0.12, 3

    def make(computed: list[int]) -> Trunk:
        state: dict[str, Any] = {"step": -1, "probe": [], "target": [], "last": None}

        def trunk(h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
            state["step"] += 1
            step = state["step"]
            x = blocks[0](h)
            if warmup <= step < STEPS - 1:
                k = step - state["last"]
                expected = taylor(state["probe"], k)
                if max((e - o).abs().mean() / o.abs().mean() for e, o in zip(expected, x, strict=True)) < threshold:
                    return taylor(state["target"], k)
            computed.append(step)
            out = run_all(x, blocks[1:])
            gap = step - state["last"] if state["last"] is not None else 1
            state["probe"] = climb(state["probe"], x, gap, probe_order)
            state["target"] = climb(state["target"], out, gap, order)
            state["last"] = step
            return out

        return trunk

    assert_same(CGTaylor(threshold=threshold, probe_order=probe_order, order=order, warmup=warmup), make)


def lowest(plane: np.ndarray, cutoff: float) -> np.ndarray:
    """The low band of [rows, columns, channels] by SciPy's cosine transform: a disc around the origin."""
    rows, columns, _ = plane.shape
    spectrum = np.asarray(scipy.fft.dctn(plane, axes=(0, 1), norm="ortho"))
    distance = np.sqrt(np.arange(rows)[:, None] ** 2 + np.arange(columns)[None] ** 2)
    kept = spectrum * (distance <= cutoff * distance.max())[:, :, None]
    return np.asarray(scipy.fft.idctn(kept, axes=(0, 1), norm="ortho"))


def lowest_along(tokens: np.ndarray, cutoff: float) -> np.ndarray:
    """The low band of [tokens, channels] by NumPy's Fourier transform."""
    frequency = np.abs(np.fft.fftfreq(len(tokens)))
    spectrum = np.fft.fft(tokens, axis=0) * (frequency <= cutoff * frequency.max())[:, None]
    return np.fft.ifft(spectrum, axis=0).real


@pytest.mark.parametrize(("cutoff", "transform"), [(0.1, "dct"), (0.5, "dct"), (0.9, "dct"), (0.3, "fft")])
def test_freqca(cutoff: float, transform: str) -> None:
    """Low band of the newest residual, high band of a Hermite sum with s^j H_j(s k), order 2."""
    interval, warmup, s = 4, 3, 0.71

    def split(residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = residual.double().numpy()
        if transform == "dct":
            bands = [lowest(row.reshape(4, 4, -1), cutoff) for row in rows]
        else:
            bands = [lowest_along(row, cutoff) for row in rows]
        low = torch.from_numpy(np.stack(bands)).reshape(residual.shape)
        return low, residual.double() - low

    def make(computed: list[int]) -> Trunk:
        state: dict[str, Any] = {"step": -1, "low": None, "high": [], "last": None}

        def trunk(h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
            state["step"] += 1
            step = state["step"]
            if step >= warmup and (step - warmup + 1) % interval:
                k = step - state["last"]
                terms = [1.0, s * 2 * s * k, s**2 * (4 * (s * k) ** 2 - 2)]
                high = sum(d * terms[j] / math.factorial(j) for j, d in enumerate(state["high"]))
                return h + (state["low"] + high).float()
            computed.append(step)
            out = run_all(h, blocks)
            state["low"], high = split(out - h)
            # The ladder's differences begin at the last warm-up step but one, as TaylorSeer's.
            old = state["high"] if step > warmup - 2 else []
            state["high"] = climb(old, high, step - (state["last"] or 0) or 1, 2)  # pyright: ignore
            state["last"] = step
            return out

        return trunk

    assert_same(FreqCa(interval=interval, warmup=warmup, cutoff=cutoff, transform=transform), make, [0, 1, 2, 6, 10])


@pytest.mark.parametrize(("depth", "minus"), [(1, False), (2, False), (1, True)])
def test_dicache(depth: int, minus: bool) -> None:
    """Accumulated probe change; the trunk's residual from its input, extrapolated as far as the probe went."""
    threshold, retention, most = (0.01, 0.0, 1.5) if minus else (0.6, 0.2, 1.5)

    def make(computed: list[int]) -> Trunk:
        state: dict[str, Any] = {"step": -1, "sum": None, "x": None, "y": None, "probes": [], "residuals": []}

        def trunk(h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
            state["step"] += 1
            step, skip = state["step"], False
            y = run_all(h, blocks[:depth])
            if step > 0 and step >= int(retention * STEPS):
                change = torch.stack(
                    [(n - o).abs().mean() / o.abs().mean() for n, o in zip(y, state["y"], strict=True)]
                )
                if minus:
                    change_x = [(n - o).abs().mean() / o.abs().mean() for n, o in zip(h, state["x"], strict=True)]
                    change = (change - torch.stack(change_x)).abs()
                state["sum"] = change if state["sum"] is None else state["sum"] + change
                skip = state["sum"].max().item() < threshold
            state["x"], state["y"] = h, y
            if skip:
                residual = state["residuals"][-1]
                if len(state["residuals"]) > 1:
                    older, newer = state["probes"][-2:]
                    g = ((y - h - older).abs().mean() / (newer - older).abs().mean()).clamp(1, most)
                    residual = state["residuals"][-2] + g * (state["residuals"][-1] - state["residuals"][-2])
                return h + residual
            computed.append(step)
            state["sum"] = None
            out = run_all(y, blocks[depth:])
            state["residuals"].append(out - h)
            state["probes"].append(y - h)
            return out

        return trunk

    config = DiCache(threshold=threshold, depth=depth, retention=retention, most=most, minus_input=minus)
    assert_same(config, make)


def test_adacache_keeps_per_block_residuals_like_one() -> None:
    """The authors' per-block residuals of attention and MLP, all reused together, at the codebook's rate."""
    codebook, stretch = [(0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.4, 2)], 1.5

    def make(computed: list[int]) -> Trunk:
        state: dict[str, Any] = {"step": -1, "next": 0, "rate": 1, "kept": None, "last": 0, "residuals": {}}

        def trunk(h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
            state["step"] += 1
            step = state["step"]
            if step < state["next"] and step < STEPS - 2:
                for block in blocks:
                    attention, mlp = state["residuals"][block.number]
                    h = h + attention
                    h = h + mlp
                return h
            computed.append(step)
            for block in blocks:
                inside: dict[str, torch.Tensor] = {}

                def module(key: tuple[int, str], run: Any, inside: dict[str, torch.Tensor] = inside) -> torch.Tensor:
                    inside[key[1]] = run()
                    return inside[key[1]]

                gates = block.entry(h)
                out = block(h, module)
                attention = gates[1][:, None] * inside["attention"]
                state["residuals"][block.number] = (attention, out - h - attention)
                if block.number == len(blocks) // 2:
                    new = inside["attention"]
                    if state["kept"] is not None:
                        old, gap = state["kept"], step - state["last"]
                        change = max(((o - n).abs().sum() / o.abs().sum() / gap).item() for n, o in zip(new, old))  # noqa: B905
                        state["rate"] = next((r for limit, r in codebook if change < limit * stretch), 1)
                    state["kept"], state["last"] = new, step
                    state["next"] = step + state["rate"]
                h = out
            return h

        return trunk

    assert_same(AdaCache(stretch=stretch), make)


def test_foresight() -> None:
    """Thresholds from the last two warm-up steps; resume behind the deepest block within its threshold."""
    gamma, warmup, refresh = 1.3, 4, 3
    resumed: list[int] = []

    def make(computed: list[int]) -> Trunk:
        state: dict[str, Any] = {"step": -1, "cache": {}, "limit": {}, "mse": {}}

        def trunk(h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
            state["step"] += 1
            step, start = state["step"], 0
            full = step < warmup or (step - warmup) % refresh == 0
            if not full:
                good = [n for n in state["limit"] if all(state["mse"][n] <= state["limit"][n])]
                full = not good
                if good:
                    start, h = max(good) + 1, state["cache"][max(good)]
                    resumed.append(max(good))
            if full:
                computed.append(step)
            for block in blocks[start:]:
                h = block(h)
                if full and block.number in state["cache"]:
                    state["mse"][block.number] = (h - state["cache"][block.number]).square().mean((1, 2))
                    if step < warmup:
                        state["limit"][block.number] = gamma * state["mse"][block.number]
                state["cache"][block.number] = h
            return h

        return trunk

    assert_same(Foresight(gamma=gamma, warmup=warmup, refresh=refresh), make)
    assert resumed


@pytest.mark.parametrize(("interval", "fraction", "switch"), [(2, 0.5, 0.5), (3, 0.75, 0.3), (3, 1.0, 0.0)])
def test_delta_dit(interval: int, fraction: float, switch: float) -> None:
    """Rear blocks early, front blocks late; what a span adds is reused."""

    def make(computed: list[int]) -> Trunk:
        state: dict[str, Any] = {"step": -1}

        def trunk(h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
            state["step"] += 1
            step, count = state["step"], len(blocks)
            length = round(fraction * count)
            spans = {"rear": (count - length, count), "front": (0, length)}
            skipped = None
            if step % interval:
                skipped = "rear" if step < switch * STEPS else "front"
            else:
                computed.append(step)
            inputs: dict[int, torch.Tensor] = {}
            number = 0
            while number < count:
                if skipped and number == spans[skipped][0]:
                    h = h + state[skipped]
                    number = spans[skipped][1]
                    inputs[number] = h
                    continue
                inputs[number] = h
                h = blocks[number](h)
                number += 1
            inputs[count] = h
            for name, (first, last) in spans.items():
                if name != skipped and first in inputs and last in inputs:
                    state[name] = inputs[last] - inputs[first]
            return h

        return trunk

    assert_same(DeltaDiT(interval, fraction, switch), make)


def test_teacache() -> None:
    """Accumulated polynomial of the first attention input's change, fitted to the output's change on a full run."""
    threshold = 0.5
    entries: list[torch.Tensor] = []

    def watching(h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
        entries.append(blocks[0].entry(h)[0])
        return run_all(h, blocks)

    by_hand(watching)
    # The fit itself is dita's; that it is a fit is tested beside the polynomial. Here the schedule is what counts.
    from handwritten import TINY

    config: Any = TeaCache(threshold=threshold).calibrated(
        TINY["dit"].build(), lambda p: TINY["dit"].call(p, steps=STEPS, batch=2)
    )
    coefficients, (low, high) = config.table.values["coefficients"], config.table.values["range"]
    changes = [relative_mean(n, o) for o, n in zip(entries, entries[1:], strict=False)]
    assert low == pytest.approx(min(changes), rel=1e-4) and high == pytest.approx(max(changes), rel=1e-4)

    def make(computed: list[int]) -> Trunk:
        state: dict[str, Any] = {"step": -1, "sum": 0.0}

        def trunk(h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
            state["step"] += 1
            step = state["step"]
            entry, last = blocks[0].entry(h)[0], state.get("entry")
            state["entry"] = entry
            if last is not None and step < STEPS - 1:
                change = [((n - o).abs().mean() / o.abs().mean()).item() for n, o in zip(entry, last, strict=True)]
                rescaled = np.polyval(coefficients, np.clip(change, low, high))
                state["sum"] = state["sum"] + np.maximum(rescaled, 0)
                if np.max(state["sum"]) < threshold:
                    return h + state["residual"]
            computed.append(step)
            state["sum"] = 0.0
            out = run_all(h, blocks)
            state["residual"] = out - h
            return out

        return trunk

    assert_same(config, make)


def relative_mean(new: torch.Tensor, old: torch.Tensor) -> float:
    changes = [((n - o).abs().mean() / o.abs().mean()).item() for n, o in zip(new, old, strict=True)]
    return sum(changes) / len(changes)


def test_cachequant() -> None:
    """Heads by exhaustive search over all cuttings, and least squares per channel by NumPy."""
    interval = 3
    residuals: list[torch.Tensor] = []

    def measuring(h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
        out = run_all(h, blocks)
        residuals.append(out - h)
        return out

    by_hand(measuring)

    def cost(heads: tuple[int, ...]) -> float:
        ends = (*heads[1:], STEPS)
        return sum(
            (residuals[i] - residuals[head]).abs().mean().item()
            for head, end in zip(heads, ends, strict=True)
            for i in range(head, end)
        )

    def cuttings(head: int, count: int) -> list[tuple[int, ...]]:
        lengths = range(math.ceil(interval / 2), 2 * interval + 1)
        if count == 1:
            return [(head,)] if 1 <= STEPS - head <= 2 * interval else []
        return [(head, *rest) for n in lengths for rest in cuttings(head + n, count - 1)]

    heads = min(cuttings(0, round(STEPS / interval)), key=cost)

    def make(computed: list[int]) -> Trunk:
        state: dict[str, Any] = {"step": -1}

        def trunk(h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
            state["step"] += 1
            step = state["step"]
            if step in heads:
                computed.append(step)
                state["head"], state["residual"] = step, run_all(h, blocks) - h
                return h + state["residual"]
            x, y = (residuals[i].flatten(0, 1).double().numpy() for i in (state["head"], step))
            fit = np.array([np.polyfit(x[:, c], y[:, c], 1) for c in range(x.shape[1])])
            scale, shift = (torch.from_numpy(column.copy()).float() for column in fit.T)
            return h + state["residual"] * scale + shift

        return trunk

    assert_same(CacheQuant(interval=interval), make, list(heads))


def test_guard_the_probe_changes_are_not_trivial() -> None:
    """The thresholds above say something only because consecutive steps differ by several percent."""
    outputs: list[torch.Tensor] = []

    def watching(h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
        out = run_all(h, blocks)
        outputs.append(out)
        return out

    by_hand(watching)
    assert min(relative(n, o) for o, n in zip(outputs, outputs[1:], strict=False)) > 0.01

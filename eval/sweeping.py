"""A sweep under way: which rows are there, which are to be measured, and what is made of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dita.errors import DitaError
from dita.eval.bench import Bench, Cost, merge
from dita.eval.environment import code_version, library_versions
from dita.eval.films import animation, film
from dita.eval.htmlreport import sample_note, write_report
from dita.eval.judge import Judge, Values
from dita.eval.labels import setting_of
from dita.eval.plots import plot_sweep, strip
from dita.eval.rows import Row, append_row, read_rows, to_markdown, to_rich
from dita.eval.sampling import Drawn
from dita.eval.settings import PLAIN, Setting, digest
from dita.eval.winners import winners_to_markdown

_SHOWN_IMAGES, _SHOWN_CLIPS = 10, 3


@dataclass
class Sweep:
    """Where the rows go, what draws, what judges, and what the numbers depend on.

    Attributes:
        out: folder of the results.
        bench: draws and times.
        judge: compares.
        surroundings: JSON values that go into every row and its key.
    """

    out: Path
    bench: Bench
    judge: Judge
    surroundings: dict[str, Any]
    _plain: dict[int, Drawn] = field(default_factory=dict, repr=False)  # by first index of the batch
    _plain_flops: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        (self.out / "images").mkdir(parents=True, exist_ok=True)

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"

    def done(self) -> dict[str, Row]:
        """The newest row of each key that has no error."""
        return {row["key"]: row for row in read_rows(self.results) if not row.get("error")}

    def run(self, settings: Sequence[Setting]) -> None:
        """Measure the settings that have no row yet, the plain one first."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        group = self.bench.group
        done = group.from_lead(self.done() if group.leads else None)
        plain = next(setting for setting in settings if setting.method == PLAIN)
        pending = [setting for setting in settings if self._key(setting) not in done]
        if not self._load_plain(plain, done) and plain not in pending:
            pending.insert(0, plain)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, transient=True, disable=not group.leads) as progress:
            batches = len(self.bench.batches)
            task = progress.add_task("sweep", total=max(1, len(pending) * batches))
            self.bench.advance = lambda: progress.advance(task)
            for number, setting in enumerate(pending):
                progress.update(task, description=f"{setting.method} {setting.label}", completed=number * batches)
                row = self._row(setting)
                if group.leads:
                    append_row(self.results, row)
                    progress.console.print(_line(row), markup=False, highlight=False, soft_wrap=True)
                if setting.method == PLAIN and row.get("error"):
                    raise DitaError(f"the plain run failed, so there is nothing to compare with: {row['error']}")

    def write(self, settings: Sequence[Setting], model: str) -> Path:
        """Write results.md, pareto.png and report.html from the rows of these settings, and print the table."""
        page = self.out / "report.html"
        if not self.bench.group.leads:
            return page
        newest = {row["key"]: row for row in read_rows(self.results)}
        rows = [newest[key] for key in dict.fromkeys(map(self._key, settings)) if key in newest]
        floor = self._floor()
        if floor is not None:
            if not any(row["key"] == floor["key"] for row in newest.values()):
                append_row(self.results, floor)
            rows.insert(1, floor)
        return publish(self.out, rows, model, self.bench.sampling.prompts)

    def _key(self, setting: Setting) -> str:
        return setting.key(self.surroundings)

    def _plain_path(self, plain: Setting, indices: range) -> Path:
        return self.out / "images" / self._key(plain) / f"{indices.start}.npz"

    def _load_plain(self, plain: Setting, done: dict[str, Row]) -> bool:
        """Read the plain samples of a sweep that was interrupted; whether all processes have all of theirs."""
        row = done.get(self._key(plain))
        paths = {indices.start: self._plain_path(plain, indices) for indices in self.bench.batches}
        complete = row is not None and all(path.is_file() for path in paths.values())
        if not all(self.bench.group.gather(complete)):
            return False
        assert row is not None
        self._plain_flops = row["flops_per_image"]
        for start, path in paths.items():
            with np.load(path) as kept:
                latents = torch.from_numpy(kept["latents"]) if "latents" in kept else None
                self._plain[start] = Drawn(torch.from_numpy(kept["media"]), latents)
        return True

    def _keep_plain(self, setting: Setting, drawn: Drawn, indices: range) -> None:
        self._plain[indices.start] = drawn
        path = self._plain_path(setting, indices)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"media": drawn.media.numpy()}
        if drawn.latents is not None:
            arrays["latents"] = drawn.latents.numpy()
        np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]

    def _row(self, setting: Setting) -> Row:
        row = self._describe(self._key(setting), setting.method, setting.label, setting.steps)
        row["origin"] = setting.origin
        row["config"] = setting.config.to_dict() if setting.config else None
        observed: list[tuple[int, Values]] = []
        shown: list[Drawn] = []
        media: dict[str, Any] = {"media": "image"}

        def observe(drawn: Drawn, indices: range) -> None:
            plain = None if setting.method == PLAIN else self._plain[indices.start]
            observed.append((indices.start, self.judge.observe(drawn, plain, self.bench.sampling, indices)))
            shown.append(drawn)
            if drawn.media.ndim == 5:
                media.update(media="video", frames=drawn.media.shape[1])
            if setting.method == PLAIN:
                self._keep_plain(setting, drawn, indices)

        try:
            mine: Any = (self.bench.run(setting, observe), observed)
        except Exception as error:
            mine = f"{type(error).__name__}: {error}"
        everyone: list[Any] = self.bench.group.gather(mine)
        failed = next((one for one in everyone if isinstance(one, str)), None)
        if failed is not None:
            return {**row, "error": failed}
        if self.bench.group.leads:
            self._picture(row["key"], torch.cat([drawn.media for drawn in shown]))
        costs: list[Cost] = [cost for cost, _ in everyone]
        try:
            numbers = merge(costs, self._plain_flops)
            if setting.method == PLAIN:
                self._plain_flops = numbers["flops_per_image"]
                numbers["flops_ratio"] = 1.0
            parts = sorted((part for _, parts in everyone for part in parts), key=lambda part: part[0])
            joined = {name: torch.cat([values[name] for _, values in parts]) for name in parts[0][1]}
            return {**row, **media, **numbers, **self.judge.summarise(joined)}
        except Exception as error:
            return {**row, "error": f"{type(error).__name__}: {error}"}

    def _picture(self, key: str, media: torch.Tensor) -> None:
        path = self.out / "images" / key
        if media.ndim == 4:
            path.with_suffix(".png").write_bytes(strip(media[:_SHOWN_IMAGES]))
            return
        plain = torch.cat([drawn.media for drawn in self._plain.values()])[:_SHOWN_CLIPS]
        path.with_suffix(".png").write_bytes(film(media[:_SHOWN_CLIPS]))
        path.with_suffix(".webp").write_bytes(animation(media[:_SHOWN_CLIPS], plain))

    def _describe(self, key: str, method: str, label: str, steps: int) -> Row:
        return {
            "key": key,
            "method": method,
            "label": label,
            "steps": steps,
            **self.surroundings,
            "code": code_version(),
            "versions": library_versions(),
            "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _floor(self) -> Row | None:
        samples = self.bench.sampling.samples
        numbers = self.judge.floor(samples)
        if not numbers:
            return None
        key = digest({**self.surroundings, "method": "data"})
        label = f"{samples} real training samples; accuracy on real unseen ones"
        return {**self._describe(key, "data", label, 0), "origin": "baseline", **numbers}


def publish(out: Path, rows: list[Row], model: str, prompts: Sequence[str] = ()) -> Path:
    """Write results.md, pareto.png and report.html from rows, and print the table; settings as `setting_of` has them.

    Args:
        out: folder; pictures of the samples lie in its images/, by the rows' keys.
        rows: the plain run first, then real data if they were measured, then the settings.
        model: name of the pipeline.
        prompts: of the first samples.

    Returns:
        The path of report.html.
    """
    from rich.console import Console

    rows = [{**row, "label": setting_of(row)} for row in rows]
    plain, floor = rows[0], next((row for row in rows if row["method"] == "data"), None)
    note = sample_note(plain["samples"], floor)
    parts = (to_markdown(rows), winners_to_markdown(rows), f"{note}\n")
    (out / "results.md").write_text("\n".join(part for part in parts if part.strip()), encoding="utf-8")
    plot = plot_sweep(rows, out / "pareto.png", f"{model}: {plain['samples']} samples per setting, {plain['device']}")
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(to_rich(rows))
    if note:
        console.print(note, highlight=False)
    shown = _SHOWN_CLIPS if any(row.get("media") == "video" for row in rows) else _SHOWN_IMAGES
    pictures = _pictures(out, rows, "jpeg") | _pictures(out, rows, "png")
    animations = _pictures(out, rows, "webp")
    return write_report(out / "report.html", rows, plot, pictures, model, animations, prompts[:shown])


def _pictures(out: Path, rows: Sequence[Row], suffix: str) -> dict[str, bytes]:
    paths = {row["key"]: out / "images" / f"{row['key']}.{suffix}" for row in rows}
    return {key: path.read_bytes() for key, path in paths.items() if path.is_file()}


def _line(row: Row) -> str:
    name = f"{row['method']} {row['label']}"
    if row.get("error"):
        return f"{name}: failed: {row['error']}"
    parts = [f"{row['speedup']:.2f}x", f"{row['seconds_per_image'] * 1000:.0f} ms/sample"]
    if row.get("psnr") is not None:
        parts.append(f"{row['psnr']:.1f} dB")
    for accuracy in ("class_accuracy", "semantic_accuracy"):
        if accuracy in row:
            parts.append(f"{accuracy.replace('_', ' ')} {row[accuracy]:.0%}")
    return f"{name}: {', '.join(parts)}"

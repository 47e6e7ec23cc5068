"""The sweep: methods x strengths on one trained pipeline, measured, kept, resumed, reported."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dita.errors import DitaError
from dita.eval.bench import Bench
from dita.eval.classifier import BUNDLED as CLASSIFIER
from dita.eval.environment import code_version, device_name, library_versions
from dita.eval.htmlreport import sample_note, write_report
from dita.eval.judge import Judge, make_judge
from dita.eval.pipelines import fingerprint, load_pipeline, pipeline_folder
from dita.eval.plots import plot_sweep, strip
from dita.eval.rows import Row, append_row, read_rows, to_markdown, to_rich
from dita.eval.sampling import Sampling, check_pipeline
from dita.eval.settings import PLAIN, Setting, context, digest, plan
from dita.eval.timing import pinned_threads

_SHOWN = 10
_SAMPLES, _QUICK_SAMPLES = 64, 6
_PAIRS, _QUICK_PAIRS = 3, 2


def run_sweep(
    model: str = "fashion-dit",
    out: str | Path = "runs/sweep",
    quick: bool = False,
    methods: Sequence[str] | None = None,
    samples: int | None = None,
    steps: int = 50,
    seed: int = 0,
    threads: int = 0,
    batch: int = 8,
    guidance: float = 3.0,
    device: str = "cpu",
    published_metrics: bool | None = None,
) -> Path:
    """Run every setting that is not yet in `out`, then write the table, the plot and the report of all of them.

    Args:
        model: bundled pipeline by name, or the folder of a DiTPipeline that draws 32x32 grey garments.
        out: folder of results.jsonl, results.md, pareto.png, report.html and images/.
        quick: two settings for each method, 6 samples, FID and LPIPS left out.
        methods: registry names, or "fewer steps"; all if None.
        samples: images per setting; 64, or 6 if quick.
        steps: solver steps of the plain run.
        seed: of the images.
        threads: CPU threads; 0 keeps torch's number.
        batch: images in one call, lowered so that there are at least three calls.
        guidance: scale of classifier-free guidance.
        device: where to run.
        published_metrics: see `make_judge`.

    Returns:
        The path of report.html.

    Raises:
        DitaError: the pipeline or a method is unknown, or an argument makes no sense. A setting that fails does not
            raise: its row holds the error, and it is tried again by the next call.

    Example:
        >>> run_sweep(quick=True)  # doctest: +SKIP
        PosixPath('runs/sweep/report.html')
    """
    if samples is None:
        samples = _QUICK_SAMPLES if quick else _SAMPLES
    sampling = Sampling(samples, min(batch, max(1, samples // 3)), steps, guidance, seed)
    settings = plan(steps, methods, quick)
    folder = pipeline_folder(model)
    judge = make_judge(False if quick and published_metrics is None else published_metrics, device)
    pipe: Any = load_pipeline(folder, device=device)
    check_pipeline(pipe)
    with pinned_threads(threads) as used:
        surroundings = context(sampling, fingerprint(folder), fingerprint(CLASSIFIER), used, device_name(device))
        surroundings |= {"with_fid": judge.fid, "with_lpips": judge.lpips}
        bench = Bench(pipe, sampling, _QUICK_PAIRS if quick else _PAIRS)
        sweep = Sweep(Path(out), bench, judge, surroundings)
        sweep.run(settings)
        return sweep.write(settings, Path(model).name)


@dataclass
class Sweep:
    """A sweep under way: where its rows go, what draws, what judges, and what the numbers depend on."""

    out: Path
    bench: Bench
    judge: Judge
    surroundings: dict[str, Any]

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

        done = self.done()
        plain = next(setting for setting in settings if setting.method == PLAIN)
        reference = self._load_reference(plain, done)
        pending = [setting for setting in settings if self._key(setting) not in done]
        if reference is None and plain not in pending:
            pending.insert(0, plain)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, transient=True) as progress:
            batches = len(list(self.bench.sampling.batches()))
            task = progress.add_task("sweep", total=max(1, len(pending) * batches))
            self.bench.advance = lambda: progress.advance(task)
            for number, setting in enumerate(pending):
                progress.update(task, description=f"{setting.method} {setting.label}", completed=number * batches)
                row, images = self._row(setting, reference)
                if images is not None:
                    self._strip_path(row["key"]).write_bytes(strip(images[:_SHOWN]))
                if setting.method == PLAIN:
                    reference = self._keep_reference(setting, row, images)
                append_row(self.results, row)
                progress.console.print(_line(row), markup=False, highlight=False, soft_wrap=True)

    def write(self, settings: Sequence[Setting], model: str) -> Path:
        """Write results.md, pareto.png and report.html from the rows of these settings, and print the table."""
        from rich.console import Console

        newest = {row["key"]: row for row in read_rows(self.results)}
        rows = [newest[key] for key in dict.fromkeys(map(self._key, settings)) if key in newest]
        floor = self._floor()
        if not any(row["key"] == floor["key"] for row in newest.values()):
            append_row(self.results, floor)
        rows.insert(1, floor)
        note = sample_note(self.bench.sampling.samples, floor)
        (self.out / "results.md").write_text(f"{to_markdown(rows)}\n{note}\n", encoding="utf-8")
        title = f"{model}: {self.bench.sampling.samples} images per setting, {self.surroundings['device']}"
        plot = plot_sweep(rows, self.out / "pareto.png", title)
        paths = {row["key"]: self._strip_path(row["key"]) for row in rows}
        strips = {key: path.read_bytes() for key, path in paths.items() if path.is_file()}
        console = Console()
        if not console.is_terminal:
            console = Console(width=120)
        console.print(to_rich(rows))
        console.print(note, highlight=False)
        return write_report(self.out / "report.html", rows, plot, strips, model)

    def _key(self, setting: Setting) -> str:
        return setting.key(self.surroundings)

    def _reference_path(self, plain: Setting) -> Path:
        return self.out / "images" / f"{self._key(plain)}.npz"

    def _strip_path(self, key: str) -> Path:
        return self.out / "images" / f"{key}.png"

    def _load_reference(self, plain: Setting, done: dict[str, Row]) -> torch.Tensor | None:
        path, row = self._reference_path(plain), done.get(self._key(plain))
        if row is None or not path.is_file():
            return None
        self.bench.plain_flops = round(row["flops_per_image"] * self.bench.first_batch)
        with np.load(path) as kept:
            return torch.from_numpy(kept["images"])

    def _keep_reference(self, plain: Setting, row: Row, images: torch.Tensor | None) -> torch.Tensor:
        if images is None:
            append_row(self.results, row)
            raise DitaError(f"the plain run failed, so there is nothing to compare with: {row['error']}")
        np.savez_compressed(self._reference_path(plain), images=images.numpy())
        return images

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

    def _row(self, setting: Setting, reference: torch.Tensor | None) -> tuple[Row, torch.Tensor | None]:
        row = self._describe(self._key(setting), setting.method, setting.label, setting.steps)
        row["config"] = setting.config.to_dict() if setting.config else None
        try:
            measured = self.bench.run(setting)
            quality = self.judge.against_data(measured.images, self.bench.sampling.labels())
            if reference is not None and setting.method != PLAIN:
                quality |= self.judge.against_plain(measured.images, reference)
        except Exception as error:
            return {**row, "error": f"{type(error).__name__}: {error}"}, None
        return {**row, **measured.cost, **quality}, measured.images

    def _floor(self) -> Row:
        samples = self.bench.sampling.samples
        key = digest({**self.surroundings, "method": "data"})
        label = f"{samples} training images; accuracy on the test images"
        return {**self._describe(key, "data", label, 0), **self.judge.floor(samples)}


def _line(row: Row) -> str:
    name = f"{row['method']} {row['label']}"
    if row.get("error"):
        return f"{name}: failed: {row['error']}"
    parts = [f"{row['speedup']:.2f}x", f"{row['seconds_per_image'] * 1000:.0f} ms/image"]
    if row.get("psnr") is not None:
        parts.append(f"{row['psnr']:.1f} dB")
    parts.append(f"class accuracy {row['class_accuracy']:.0%}")
    return f"{name}: {', '.join(parts)}"

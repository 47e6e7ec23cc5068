"""`dita bench attention`: time by backend and the mass kept by method, as JSON, a table and a picture."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dita import registry
from dita.anatomy import describe
from dita.errors import DitaError
from dita.eval.attention_recall import Captured, capture, judge
from dita.eval.attention_timing import time_attention
from dita.eval.environment import code_version, device_name, library_versions
from dita.eval.pipelines import load_pipeline, pipeline_folder
from dita.eval.sampling import Sampling, draw
from dita.eval.task import task_of
from dita.eval.timing import pinned_threads
from dita.kernels.sparse.base import SparseMethod

_SEEN_STEPS = (0.35, 0.4)  # parts of the run at which real attention is captured, the second one step later


def bench_attention(
    out: str | Path,
    tokens: Sequence[int] = (1024, 2048, 4096),
    densities: Sequence[float] = (0.5, 0.25, 0.1),
    dtypes: Sequence[str] = ("fp32", "bf16"),
    backends: Sequence[str] | None = None,
    block: int = 128,
    heads: int = 4,
    head_dim: int = 64,
    repeats: int = 5,
    threads: int = 0,
    device: str = "cpu",
    model: str | None = "fashion-wan",
    methods: Sequence[str] | None = None,
    advance: Callable[[str], None] = lambda text: None,
) -> Path:
    """Gate and time the backends, judge every sparse method on real attention, and write what came out.

    Args:
        out: folder of attention.json, attention.md and attention.png.
        tokens, densities, dtypes, backends, block, heads, head_dim, repeats: see `time_attention`; backends default to
            those of the device.
        threads: CPU threads; 0 keeps torch's number.
        device: "cpu" or "cuda".
        model: pipeline whose attention is captured; None for timing alone.
        methods: names of sparse methods; all by default, each along its ladder.
        advance: told what comes next.

    Returns:
        The path of attention.md.

    Raises:
        DitaError: a backend disagrees with the oracle, or a method is unknown or not sparse.

    Example:
        >>> bench_attention("runs/attention", tokens=[1024], model=None)  # doctest: +SKIP
        PosixPath('runs/attention/attention.md')
    """
    chosen = sparse_methods(methods)
    if backends is None:
        backends = ("triton",) if device == "cuda" else ("gather", "flex")
    with pinned_threads(threads) as used:
        timing = time_attention(tokens, densities, dtypes, backends, block, heads, head_dim, repeats, device, advance)
        kept = [] if model is None else judge_all(model, chosen, device, advance)
    found = {
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device_name(device),
        "threads": used,
        "code": code_version(),
        "versions": library_versions(),
        "model": model,
        "timing": timing,
        "recall": kept,
    }
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "attention.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot_attention(found, folder / "attention.png")
    page = folder / "attention.md"
    page.write_text(to_markdown(found), encoding="utf-8")
    return page


def sparse_methods(names: Sequence[str] | None = None) -> dict[str, type[SparseMethod]]:
    """The registered methods that compute a part of the attention, by name.

    Raises:
        DitaError: a name is unknown, or another kind of method.

    Example:
        >>> sparse_methods(["adaspa"])["adaspa"].title
        'AdaSpa'
    """
    every = {name: cls for name in registry.names() if issubclass(cls := registry.get(name), SparseMethod)}
    wrong = [name for name in names or () if name not in every]
    if wrong:
        raise DitaError(f"{', '.join(wrong)} computes no part of the attention; sparse methods are {', '.join(every)}")
    return {name: every[name] for name in names} if names else every


def judge_all(
    model: str,
    methods: Mapping[str, type[SparseMethod]],
    device: str = "cpu",
    advance: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Judge each method along its ladder on a pipeline's own attention, in its first, middle and last layer.

    Args:
        model: bundled pipeline by name, a folder, or a hub id; drawn with its task's own settings, one sample.
        methods: by name; one that needs a calibration is left out.
        device: where it runs.
        advance: told what comes next.

    Returns:
        Rows with method, label, density, recall and error; see `dita.eval.attention_recall.judge`.

    Example:
        >>> judge_all("fashion-wan", sparse_methods(["adaspa"]))  # doctest: +SKIP
    """
    folder = pipeline_folder(model)
    task = task_of(folder)
    pipe: Any = load_pipeline(folder, torch.float32, torch.device(device))
    sampling = Sampling(1, 1, task.steps, task.guidance, 0, task.prompts(1, 0), task.call)
    first = round(_SEEN_STEPS[0] * task.steps)
    count = len(describe(pipe.transformer).attention_sites)
    layers = sorted({0, count // 2, count - 1})
    advance(f"attention of {model}")
    captured = capture(pipe, lambda p: draw(p, sampling, range(1)), [first, first + 1], layers, stop=True)
    ladders = {}
    for name, cls in methods.items():
        if cls.needs_calibration:
            advance(f"{name} needs a calibration on whole runs and is left out")
        else:
            ladders[name] = cls.ladder()
    return judged(pipe, captured, ladders, advance)


def judged(
    pipe: Any,
    captured: Mapping[tuple[int, int], Captured],
    settings: Mapping[str, Sequence[Any]],
    advance: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Judge settings of methods on captured attention.

    Args:
        pipe: which was captured.
        captured: from `capture`.
        settings: name -> methods.
        advance: told what comes next.

    Returns:
        Rows as of `judge_all`.

    Example:
        >>> judged(pipe, captured, {"adaspa": [AdaSpa(density=0.2)]})  # doctest: +SKIP
    """
    rows = []
    for name, ladder in settings.items():
        for method in ladder:
            advance(f"{name} {method.label()}")
            rows.append({"method": name, "label": method.label(), **judge(method, pipe, captured)})
    return rows


def to_markdown(found: Mapping[str, Any]) -> str:
    """The tables of a benchmark.

    Example:
        >>> to_markdown({"device": "cpu", "threads": 1, "versions": {"torch": "2"}, "timing": [], "recall": []})[:11]
        '# Attention'
    """
    lines = [
        "# Attention", "",
        f"{found['device']}, {found['threads']} threads, torch {found['versions'].get('torch')}. Speedup: median over "
        "rounds of dense / own milliseconds, both measured in turn; in brackets the slowest and fastest round. Target: "
        "0.75 / density.", "",
    ]  # fmt: skip
    if found["timing"]:
        lines += ["| dtype | tokens | block | density | backend | dense ms | ms | speedup | target |", "|---" * 9 + "|"]
        for row in found["timing"]:
            lines.append(
                f"| {row['dtype']} | {row['tokens']} | {row['block']} | {row['density']:.3f} | {row['backend']} "
                f"| {row['dense_ms']:.1f} | {row['ms']:.1f} | {row['speedup']:.2f} [{row['slowest']:.2f}, "
                f"{row['fastest']:.2f}] | {row['target']:.2f} |"
            )
    if found["recall"]:
        lines += [
            "", f"## What methods keep of {found['model']}'s attention", "",
            "Density: share of the pairs of tokens computed. Mass kept: part of the true attention, mean over queries "
            "and over the first, middle and last layer. Error: relative L1 distance of the output to dense "
            "attention's.", "",
            "| method | setting | density | mass kept | error |", "|---" * 5 + "|",
        ]  # fmt: skip
        for row in found["recall"]:
            mass = "" if row["recall"] is None else f"{row['recall']:.3f}"
            lines.append(f"| {row['method']} | {row['label']} | {row['density']:.3f} | {mass} | {row['error']:.3f} |")
    return "\n".join(lines) + "\n"


def plot_attention(found: Mapping[str, Any], path: str | Path) -> None:
    """Draw speedup against density, and the error of each method against its density.

    Example:
        >>> plot_attention(found, "attention.png")  # doctest: +SKIP
    """
    import matplotlib

    matplotlib.use("agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in found["timing"]:
        groups.setdefault(f"{row['backend']} {row['dtype']} {row['tokens']}", []).append(row)
    for name, rows in groups.items():
        left.plot([row["density"] for row in rows], [row["speedup"] for row in rows], "o-", label=name, markersize=4)
    shown = sorted({row["density"] for row in found["timing"]})
    if shown:
        left.plot(shown, [1 / density for density in shown], "k:", label="1 / density", linewidth=1)
        left.set(xscale="log", yscale="log")
        left.legend(frameon=False, fontsize=7)
    left.set(xlabel="density", ylabel="speedup over dense attention", title="Backends")
    methods: dict[str, list[Mapping[str, Any]]] = {}
    for row in found["recall"]:
        methods.setdefault(row["method"], []).append(row)
    for number, (name, rows) in enumerate(methods.items()):
        ordered = sorted(rows, key=lambda row: row["density"])
        style = "osD^v<>PX*"[number % 10] + "-"
        points = [row["density"] for row in ordered], [row["error"] for row in ordered]
        right.plot(*points, style, label=name, markersize=4, linewidth=1)
    if methods:
        right.legend(frameon=False, fontsize=7, ncols=2)
    right.set(xlabel="density", ylabel="relative L1 error of the output", title=f"Methods on {found.get('model')}")
    figure.savefig(path, dpi=110)

"""The command line: `dita demo`, `dita sweep`, `dita join`, `dita bench`, `dita methods` and `dita doctor`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from dita import __version__
from dita.errors import DitaError

if TYPE_CHECKING:
    from rich.table import Table

    from dita.doctor import Finding


class _Commands(TyperGroup):
    """Turns a `DitaError` of any command into one message and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DitaError as error:
            typer.secho(f"dita: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands,
    help="Make diffusion transformers fast without retraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


Model = Annotated[str, typer.Option(help="A bundled pipeline by name, or the folder of a saved one.")]
Out = Annotated[Path, typer.Option(help="Where results.jsonl, the table, the plot and report.html go.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; timings are compared at a fixed number.")]


@app.command()
def demo(model: Model = "fashion-dit", out: Out = Path("runs/quick"), threads: Threads = None) -> None:
    """Sweep a bundled pipeline in about three minutes: the same as `dita sweep --quick`."""
    _sweep(model=model, out=out, quick=True, threads=threads)


@app.command()
def sweep(
    file: Annotated[
        Path | None, typer.Argument(help="YAML file with settings to compare and any of the options below.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A bundled pipeline by name, a folder, or a hub id.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where results, table, plot and report go.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Five methods, fewer samples and settings: about three minutes.")
    ] = False,
    methods: Annotated[
        list[str] | None, typer.Option("--methods", "-m", help="Only these methods; repeat, or join with commas.")
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Other projects' accelerators too, where installed.")] = False,
    samples: Annotated[int | None, typer.Option(min=1, help="Images or videos per setting.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Solver steps of the uncached run.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the first sample; the others count up.")] = None,
    threads: Threads = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples per call.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0.0, help="Guidance scale.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: fp32, bf16 or fp16.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with a prompt a line.")] = None,
    call: Annotated[
        list[str] | None, typer.Option("--call", "-c", help="Argument of the pipeline's call, as height=512; repeat.")
    ] = None,
    clip: Annotated[str | None, typer.Option(help="Folder or hub id of a CLIP model, for the CLIP score.")] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="Timed batches per setting paired with a plain run.")] = None,
    strengths: Annotated[int | None, typer.Option(min=1, help="Settings of each method; if left out, all.")] = None,
) -> None:
    """Measure speed against quality: methods x strengths on one pipeline. Resumes where it stopped.

    Started by `accelerate launch -m dita sweep ...` on several processes, they share the samples.
    """
    given: dict[str, Any] = {
        "model": model,
        "out": out,
        "quick": quick or None,
        "methods": _split(methods),
        "peers": peers or None,
        "samples": samples,
        "steps": steps,
        "seed": seed,
        "threads": threads,
        "batch": batch,
        "guidance": guidance,
        "device": device,
        "dtype": dtype,
        "prompts": prompts,
        "call": _arguments(call),
        "clip": clip,
        "pairs": pairs,
        "strengths": strengths,
    }
    options: dict[str, Any] = {}
    if file is not None:
        from dita.eval.recipes import read_recipes

        options = read_recipes(file)
        unknown = sorted(set(options) - {*given, "settings"})
        if unknown:
            raise DitaError(f"{file} has unknown keys {', '.join(unknown)}; known are settings, {', '.join(given)}")
    _sweep(
        **{"out": Path("runs/sweep"), **options, **{name: value for name, value in given.items() if value is not None}}
    )


@app.command()
def join(
    folders: Annotated[list[Path], typer.Argument(help="Folders of sweeps of one pipeline, oldest first.")],
    out: Annotated[Path, typer.Option(help="Where table, plot and report of all of them go.")],
    by_setting: Annotated[
        bool, typer.Option("--by-setting", help="Keep settings of a method that the last sweep of it lacks.")
    ] = False,
) -> None:
    """Put sweeps together that were made at different times; a method counts from the last one that has it."""
    from dita.eval.joining import join_sweeps

    typer.echo(join_sweeps(folders, out, by_setting))


bench = typer.Typer(cls=_Commands, help="Benchmarks of parts: a correctness gate first, then times.")
app.add_typer(bench, name="bench", no_args_is_help=True)


@bench.callback()
def _bench() -> None:
    pass


@bench.command()
def attention(
    out: Annotated[Path, typer.Option(help="Where attention.json, .md and .png go.")] = Path("runs/attention"),
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, joined by commas.")] = "1024,2048,4096",
    densities: Annotated[str, typer.Option(help="Shares of the blocks kept, joined by commas.")] = "0.5,0.25,0.1",
    dtypes: Annotated[str, typer.Option(help="fp32, bf16 or fp16, joined by commas.")] = "fp32,bf16",
    backends: Annotated[str | None, typer.Option(help="gather, flex or triton; the device's own if left out.")] = None,
    block: Annotated[int, typer.Option(min=16, help="Tokens of a block.")] = 128,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    head_dim: Annotated[int, typer.Option(min=8)] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 5,
    threads: Threads = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    model: Annotated[
        str, typer.Option(help="Pipeline whose attention methods are judged on; none for times alone.")
    ] = ("fashion-wan"),
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", "-m", help="Only these sparse methods; repeat, or join with commas."),
    ] = None,
) -> None:
    """Time the backends of block-sparse attention, and judge every sparse method on a pipeline's own attention."""
    from dita.eval.attention_report import bench_attention

    page = bench_attention(
        out,
        _numbers("tokens", tokens, int),
        _numbers("densities", densities, float),
        _split([dtypes]) or (),
        _split(None if backends is None else [backends]),
        block,
        heads,
        head_dim,
        repeats,
        threads or 0,
        device,
        None if model == "none" else model,
        _split(methods),
        lambda text: typer.echo(text, err=True),
    )
    typer.echo(page.read_text())
    typer.echo(f"wrote attention.json, attention.md and attention.png in {page.parent}")


def _numbers(name: str, text: str, kind: Any) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise DitaError(f"--{name} got {text!r}; expected numbers joined by commas") from None


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List the methods: what each keeps, when it reuses it, and where it was published."""
    from dita import methods as registered

    rows = registered()
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    table = _table("name", "title", "what, when, how", "paper", "calibration")
    for row in rows:
        paper = f"arXiv {row.arxiv}" if row.arxiv[0].isdigit() else row.arxiv
        _add(table, row.name, row.title, row.axes, paper, "one run" if row.needs_calibration else "none")
    _console().print(table)


@app.command()
def doctor(
    pipeline: Annotated[str, typer.Argument(metavar="PATH_OR_HUB_ID", help="A pipeline's folder, or its hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say which seams and methods work on a pipeline, and why not; exit status 1 if no method does."""
    from dita.doctor import examine

    diagnosis = examine(pipeline)
    if as_json:
        typer.echo(json.dumps(diagnosis.to_dict(), indent=2))
    else:
        console = _console()
        console.print(f"{diagnosis.source}: {diagnosis.pipeline}", markup=False, highlight=False)
        if diagnosis.problem:
            console.print(diagnosis.problem, markup=False, highlight=False)
        for finding in diagnosis.findings:
            _print_finding(console, finding)
    raise typer.Exit(0 if diagnosis.usable else 1)


def _sweep(**options: Any) -> None:
    from dita.eval.sweep import run_sweep

    report = Path(run_sweep(**{name: value for name, value in options.items() if value is not None}))
    if os.environ.get("RANK", "0") != "0":
        return
    typer.echo(f"wrote {', '.join(sorted(path.name for path in report.parent.iterdir() if path.is_file()))}")
    typer.echo(f"in {report.parent}; open {report}")


def _arguments(pairs: list[str] | None) -> dict[str, Any] | None:
    """Read name=value pairs; a value that is JSON is taken as such, anything else as text."""
    if pairs is None:
        return None
    read: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name.isidentifier():
            raise DitaError(f"--call got {pair!r}; expected name=value, as in height=512")
        try:
            read[name] = json.loads(text)
        except json.JSONDecodeError:
            read[name] = text
    return read


def _split(names: list[str] | None) -> list[str] | None:
    if names is None:
        return None
    return [name for chunk in names for name in (part.strip() for part in chunk.split(",")) if name]


def _print_finding(console: Any, finding: Finding) -> None:
    console.print(f"\n{finding.component}: {finding.class_name}", markup=False, highlight=False)
    if finding.support is None:
        console.print(finding.problem, markup=False, highlight=False)
        return
    for kind, verdicts in (("seam", finding.support.seams), ("method", finding.support.methods)):
        table = _table(kind, "works", "why")
        for name, (ok, reason) in verdicts.items():
            _add(table, name, "yes" if ok else "no", reason, style="" if ok else "dim")
        console.print(table)


def _console() -> Any:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=160)


def _table(*columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _add(table: Table, *cells: str, style: str = "") -> None:
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in cells), style=style)

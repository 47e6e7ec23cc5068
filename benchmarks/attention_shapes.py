"""Every sparse method on attention captured from tiny random models: that it fits their shapes, not what it is worth.

    python benchmarks/attention_shapes.py        # writes eval/results/attention/shapes.md, under a minute

Random weights attend nearly evenly, so that the mass kept is hardly more than the density. What real attention gives is
in `dita bench attention`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_pipelines import TINY_PIPELINES

from dita.anatomy import describe
from dita.eval.attention_recall import capture
from dita.eval.attention_report import judged, sparse_methods
from dita.eval.environment import code_version
from dita.eval.rows import markdown_table

PIPELINES = ("WanPipeline", "HunyuanVideoPipeline", "CogVideoXPipeline")
PAGE = Path(__file__).resolve().parents[1] / "eval" / "results" / "attention" / "shapes.md"
SIZES = {name: {"height": 64, "width": 64} for name in PIPELINES[:1]}
STEPS = 4


def rows_of(name: str) -> tuple[str, list[dict[str, Any]]]:
    """What the tokens of a pipeline are, in words, and a row for each method.

    Example:
        >>> rows_of("WanPipeline")  # doctest: +SKIP
    """
    tiny = TINY_PIPELINES[name]
    pipe = tiny.build()

    def call(pipe: Any) -> Any:
        return tiny.call(pipe, STEPS, **SIZES.get(name, {}))

    settings: dict[str, list[Any]] = {}
    for method, cls in sparse_methods().items():
        config: Any = cls.forced()
        settings[method] = [config.calibrated(pipe, call) if config.needs_calibration else config]
    last = len(describe(pipe.transformer).attention_sites) - 1
    captured = capture(pipe, call, [STEPS - 2, STEPS - 1], sorted({0, last}), stop=True)
    layout = captured[last, STEPS - 1].layout
    text = f", {layout.text} of text {'first' if layout.text_first else 'last'}" if layout.text else ", no text"
    return f"{layout.visual} tokens of {' x '.join(map(str, layout.grid))}{text}", judged(pipe, captured, settings)


def page() -> str:
    """The three tables as one, with a column of density and of mass for each model."""
    found = {name: rows_of(name) for name in PIPELINES}
    head, lines = ["method"], [[row["method"]] for row in found[PIPELINES[0]][1]]
    for name, (tokens, rows) in found.items():
        head += [f"{name.removesuffix('Pipeline')} ({tokens}): density", "mass kept", "error"]
        for line, row in zip(lines, rows, strict=True):
            mass = "" if row["recall"] is None else f"{row['recall']:.3f}"
            line += [f"{row['density']:.3f}", mass, f"{row['error']:.3f}"]
    said = (
        "# Sparse methods on the shapes of tiny random models\n\n`python benchmarks/attention_shapes.py`, code "
        f"{code_version()}. Small blocks, as for tests; first and last layer, last of {STEPS} steps. Mass kept: of the "
        "blocks alone, where a method corrects its output or adds a branch. VORTA has heads of three kinds, of which "
        "there is no one mass.\n\n"
    )
    return said + markdown_table(head, lines, left=head[:1])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))

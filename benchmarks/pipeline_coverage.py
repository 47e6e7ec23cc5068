"""Which pipelines of the installed diffusers run with dita from end to end, tried on tiny instances, as a table.

    python benchmarks/pipeline_coverage.py --write docs/pipelines.md

Every pipeline is built with random weights (`tiny_pipelines`) and called plain, with the default recipe, with a
forecast at a fixed interval, and restored. Takes some minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import diffusers
from model_coverage import pipelines as users_of_classes
from tiny_pipelines import TINY_PIPELINES
from tiny_pipelines.check import Ran, check, samples_apart

COMMAND = "python benchmarks/pipeline_coverage.py --write docs/pipelines.md"


@cache
def pipelines() -> dict[str, tuple[str, ...]]:
    """Every pipeline that diffusers exports, modular ones apart, whose constructor asks for a transformer: which.

    Example:
        >>> pipelines()["FluxPipeline"]
        ('FluxTransformer2DModel',)
    """
    exported = {name for names in diffusers._import_structure.values() for name in names}
    found: dict[str, tuple[str, ...]] = {}
    for transformer, users in users_of_classes().items():
        for name in users:
            if name in exported:
                found[name] = (*found.get(name, ()), transformer)
    return dict(sorted(found.items()))


def uncovered() -> list[str]:
    """Those of which there is no tiny instance.

    Example:
        >>> "FluxPipeline" in uncovered()
        False
    """
    return sorted(set(pipelines()) - {tiny.name for tiny in TINY_PIPELINES.values()})


def cells(ran: Ran) -> tuple[str, ...]:
    """What does not depend on the machine: pipeline, task, transformer, seams."""
    tiny = ran.tiny
    return (tiny.key, tiny.task, tiny.transformer, ", ".join(ran.seams) or "none")


def row(ran: Ran) -> str:
    """One line of the table."""
    shares = ("", "") if ran.refusal else (f"{ran.default:.0%}", f"{ran.forecast:.0%}")
    said = "; ".join(text for text in (ran.refusal.partition(": ")[2], ran.tiny.remark) if text)
    return f"| {' | '.join((*cells(ran), *shares, said))} |"


def document(found: Sequence[Ran], apart: Mapping[str, bool | None]) -> str:
    """The whole page.

    Args:
        found: what each entry did.
        apart: for each entry, what `samples_apart` says.
    """
    classes = {ran.tiny.name for ran in found}
    refused = {ran.tiny.name for ran in found if ran.refusal}
    skipped = {ran.tiny.name for ran in found if ran.default < 1}
    missing = uncovered()
    several = {TINY_PIPELINES[key].name for key, same in apart.items() if same is not None}
    unlike = sorted(key for key, same in apart.items() if same is False)
    lines = [
        "# Pipelines",
        "",
        f"{len(classes - refused)} pipeline classes of diffusers {diffusers.__version__} run from end to end with the",
        "default recipe (`dita.accelerate_pipeline(pipe)`) and with a forecast at a fixed interval,",
        "`TaylorSeer(interval=2, warmup=1)`, on tiny random weights. For each of them the forecast left out work",
        "(modules were counted), outputs were finite and of the plain run's shape, a second run was bit for bit the",
        "first, every guidance branch and every expert began anew, and `dita.restore_pipeline` gave back the plain",
        "output bit for bit. Where a strength cuts the loop short, steps are counted from the first that is executed.",
        "",
        "The last numbers are the share of the transformer's calls that was computed. The default recipe decides from",
        f"the features: on these random weights, in so few steps, it skipped something in {len(skipped)} classes;",
        "100% is a run in which it found nothing alike. They say nothing about quality or speed.",
        "",
        f"{len(several)} of the classes make two samples a call here, and with `per_sample=True` and nothing skipped",
        f"they make the same two one by one{', but for ' + ', '.join(unlike) if unlike else ''};",
        "the others make one sample from what they are given here.",
        "",
        f"Written by `{COMMAND}`.",
        "",
        "| pipeline | task | transformer | seams | default | forecast | remark |",
        "|---|---|---|---|---:|---:|---|",
        *map(row, sorted(found, key=lambda ran: ran.tiny.key)),
        "",
        f"diffusers {diffusers.__version__} exports {len(pipelines())} pipelines with a transformer, modular ones "
        "apart.",
        f"{len(classes)} of them have a tiny instance here, {len(refused)} of which dita refuses. "
        f"These {len(missing)} have none:",
        "",
        *(f"- {name} ({', '.join(pipelines()[name])})" for name in missing),
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Run every pipeline and write the page, or print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", type=Path, help="file to write; printed by default")
    target = parser.parse_args().write
    apart = {key: samples_apart(tiny) for key, tiny in TINY_PIPELINES.items()}
    text = document([check(tiny) for tiny in TINY_PIPELINES.values()], apart)
    if target is None:
        print(text, end="")
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

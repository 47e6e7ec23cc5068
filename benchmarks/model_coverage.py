"""Which seams every transformer class of the installed diffusers offers, tried on tiny instances, as a table.

    python benchmarks/model_coverage.py --write docs/coverage.md

Every class is built with random weights and a configuration of our own (`tiny_models`), and takes a scheduler through
a few steps with one method attached at each seam. What is said to be there must leave out work, counted by hooks that
know nothing of dita, give the same output twice, and come off without a trace. Takes a minute on one core.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import diffusers
import diffusers.models.transformers as transformers
from tiny_models import TINY_MODELS
from tiny_models.check import SEAMS, Coverage, check

COMMAND = "python benchmarks/model_coverage.py --write docs/coverage.md"
_SHOWN = 3  # pipelines that are named


def classes() -> dict[str, type]:
    """Every model class that a module of `diffusers.models.transformers` defines, by name.

    Example:
        >>> "FluxTransformer2DModel" in classes()
        True
    """
    found: dict[str, type] = {}
    for info in pkgutil.iter_modules(transformers.__path__):
        module = importlib.import_module(f"{transformers.__name__}.{info.name}")
        own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
        found |= {c.__name__: c for c in own if inspect.isclass(c) and issubclass(c, diffusers.ModelMixin)}
    return dict(sorted(found.items()))


def unclassified(found: Iterable[str]) -> list[str]:
    """Classes of which no tiny instance is known.

    Example:
        >>> unclassified([*TINY_MODELS, "NewTransformer2DModel"])
        ['NewTransformer2DModel']
    """
    return sorted(set(found) - set(TINY_MODELS))


@cache
def pipelines() -> dict[str, tuple[str, ...]]:
    """Names of the pipelines, modular ones apart, whose constructor asks for each class."""
    users = {name: set[str]() for name in TINY_MODELS}
    any_class = re.compile(rf"\b({'|'.join(TINY_MODELS)})\b")
    for path in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py"):
        for part in re.split(r"^class ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            name = re.match(r"\w*Pipeline\w*", part)
            constructor = re.search(r"def __init__\((.*?)\n    \)", part, flags=re.DOTALL)
            for asked in any_class.findall(constructor[1]) if name and constructor else ():
                users[asked].add(name[0])  # pyright: ignore[reportOptionalSubscript]
    return {name: tuple(sorted(found, key=lambda n: (len(n), n))) for name, found in users.items()}


def row(found: Coverage) -> str:
    """One line of the table."""
    users = pipelines()[found.name]
    shown = ", ".join(name.removesuffix("Pipeline") for name in users[:_SHOWN])
    more = f" and {len(users) - _SHOWN} more" if len(users) > _SHOWN else ""
    cells = ["no" if found.reasons[seam] else "yes" for seam in SEAMS]
    reasons = list(dict.fromkeys(why for why in found.reasons.values() if why))
    said = "; ".join([*reasons, *([found.note] if found.note else [])])
    return f"| {found.name} | {found.kind} | {shown}{more} | {' | '.join(cells)} | {said} |"


def document(rows: Sequence[Coverage]) -> str:
    """The whole page."""
    counts = ", ".join(f"{seam} on {sum(seam in r.offered for r in rows)}" for seam in SEAMS)
    lines = [
        "# Model coverage",
        "",
        f"diffusers {diffusers.__version__} defines {len(rows)} transformer classes. Seams of dita: {counts}.",
        "",
        "A cell says yes where one method at that seam left out work on a tiny instance of the class, gave the same",
        "output twice, changed nothing when disabled, and came off without a trace. The trunk is all blocks at once,",
        "in one or several spans. Attention means self- and joint attention inside the blocks. Pipelines are named",
        'without "Pipeline"; classes without one are parts of other models, or belong to modular pipelines.',
        "",
        f"Written by `{COMMAND}`.",
        "",
        f"| class | makes | pipelines | {' | '.join(SEAMS)} | why not, and notes |",
        f"|---|---|---|{'---|' * len(SEAMS)}---|",
        *map(row, sorted(rows, key=lambda r: (("image", "video", "audio", "other").index(r.kind), r.name))),
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Check every class and write the page, or print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", type=Path, help="file to write; printed by default")
    target = parser.parse_args().write
    missing = unclassified(classes())
    if missing:
        raise SystemExit(f"add a tiny instance to benchmarks/tiny_models: {', '.join(missing)}")
    text = document([check(tiny) for tiny in TINY_MODELS.values()])
    if target is None:
        print(text, end="")
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

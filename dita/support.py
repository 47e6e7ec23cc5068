"""What can be attached to a model, and why not."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from dita import registry
from dita.anatomy import Anatomy, describe
from dita.config import Method
from dita.errors import DitaError, DitaWarning
from dita.session import transformers_of


@dataclass(frozen=True)
class SupportReport:
    """Seams and methods of one model; each maps to (supported, what was found or why not).

    Truthy when every method that was asked about is supported.
    """

    model: str
    seams: dict[str, tuple[bool, str]]
    methods: dict[str, tuple[bool, str]]

    def __bool__(self) -> bool:
        return bool(self.methods) and all(ok for ok, _ in self.methods.values())

    def __str__(self) -> str:
        lines = [self.model]
        for title, table in (("seams", self.seams), ("methods", self.methods)):
            width = max(map(len, table), default=0) + 2
            lines.append(f"  {title}")
            lines += [f"    {'yes' if ok else 'no':<4}{name:<{width}}{text}" for name, (ok, text) in table.items()]
        return "\n".join(lines)


def supports(pipe_or_model: Any, method: str | Method | None = None) -> SupportReport:
    """Say what a pipeline or a bare transformer supports; nothing is attached, no weight is read.

    Args:
        pipe_or_model: a diffusers pipeline, or the transformer itself (the meta device will do).
        method: one method to ask about; all registered ones by default.

    Raises:
        DitaError: unknown method, or an object that is neither.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_layers=2, num_attention_heads=1, attention_head_dim=8)
        >>> supports(model, "taylorseer").methods["taylorseer"][0]
        True
    """
    if isinstance(pipe_or_model, nn.Module):
        pipe, anatomies = None, [describe(pipe_or_model)]
    else:
        pipe = pipe_or_model
        anatomies = [describe(model) for model in transformers_of(pipe).values()]
    wanted = [registry.resolve(method)] if method is not None else [registry.get(n)() for n in registry.names()]
    answers = {m.name: _answer(m, anatomies, pipe) for m in wanted}
    return SupportReport(", ".join(a.name for a in anatomies), _seams(anatomies[0]), answers)


def _seams(anatomy: Anatomy) -> dict[str, tuple[bool, str]]:
    found = {
        "model": "the transformer's call",
        "block": f"{len(anatomy.blocks)} blocks in {len(anatomy.segments)} span(s)",
        "module": f"{len(anatomy.modules)} attention and MLP modules",
        "attention": f"{len(anatomy.attention_sites)} self- or joint attentions inside the blocks",
    }
    answers = {"step": (True, "the pipeline's scheduler")}
    for seam, what in found.items():
        why = anatomy.why_not(seam)
        answers[seam] = (why is None, what if why is None else why)
    return answers


def _answer(method: Method, anatomies: list[Anatomy], pipe: Any) -> tuple[bool, str]:
    try:
        sites = sum(len(method.sites(anatomy)) for anatomy in anatomies)
        # What is calibrated has no numbers yet to be attached with; its disabled setting needs none.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DitaWarning)  # nothing is attached yet
            loop = (type(method).disabled() if method.needs_calibration else method).loop(tuple(anatomies), pipe)
    except DitaError as error:
        return False, str(error)
    note = "; needs one calibration run" if method.needs_calibration else ""
    place = f"{sites} sites" if sites or loop is None else "the sampling loop"
    return True, f"{place}{note}"

"""Adapter guidance distillation: one call of the transformer with small trained adapters stands for guidance.

Perez Jensen and Sadat, "Efficient Distillation of Classifier-Free Guidance using Adapters", Transactions on Machine
Learning Research 2025, arXiv 2503.07274.

What: the model stays as it is. Each attention module gets an adapter of time step t, condition c and guidance scale w,
whose output is added to that of the module; all adapters together have 1 to 5 % of the model's parameters. They are
trained so that the conditional call puts out u + w (c - u), on states of guided runs, with the mean squared error
(`dita.schedulers.guidance.agd_training`, `python -m dita.eval.training.agd`). Then the unconditional branch is left
out, and the pipeline's formula is given the adapted output for both.

The paper has two adapters. The offset adapter sums the embeddings of t, c and w, and a perceptron makes of the sum one
vector that is added to all tokens. In the cross-attention adapter each token attends to the embeddings, tokens of the
text among them. The authors' code takes the first for DiT (classes) and the second for Stable Diffusion's UNets and
for SD3 (text); so does `kind="auto"` of the training. They draw w from 1 to 6 for DiT and train 5000 updates of 64
states at a rate of 1e-4.

Where: as in their code at the cross-attention where a block has one, else at self- or joint attention. The adapter acts
on the module's output projection, a layer of its own. So it goes with caches: one that leaves out the module or its
block leaves out the adapter too and stands in for the adapted output. One that reuses the same layer (icc) excludes it.

Differs from the paper: t and w are embedded by sines and cosines of fixed, slow frequencies, not random ones, and t by
a perceptron of each adapter's own instead of the model's; what a module puts out queries the cross-attention, not what
it reads; embeddings carry no position. Where the projection is shared with text tokens (CogVideoX) or with the MLP
(single blocks of Flux) the adapter adds to these too. `begin` is not in the paper.

Adapters that ship with dita exist for fashion-dit only; other pipelines need a training of their own.

Adapters know the unconditional input of their training: another negative prompt is not heard. A run without guidance is
left alone, and so is one whose pipeline has a third branch in the same batch or runs the unconditional one first.

SpeedUpNet (Chai et al., ECCV 2024, arXiv 2312.08887), whose adapters do read the negative prompt, does not fit the same
training: they replace the attention to that prompt's tokens in the cross-attention of a UNet, which DiT and joint
attention do not have and the recorded conditional calls do not carry, and its loss joins several solver steps, which
distils steps rather than guidance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number
from dita.errors import DitaError, DitaWarning
from dita.loop import Request, Run, Runner
from dita.registry import register
from dita.schedulers.guidance.agd_adapters import Conditions
from dita.schedulers.guidance.agd_weights import AdapterSet, load_adapters, output_layers
from dita.schedulers.guidance.policy import GuidanceLoop, GuidanceMethod, GuidancePolicy, Moment, Wanted
from dita.seams import Call, Features, Handler, Site

UNTRAINED = "untrained"
"""In place of a file: no adapters, which is the conditional branch alone."""


class Distilled(GuidancePolicy):
    """Both branches before `begin`, the conditional one from there on."""

    def __init__(self, begin: float) -> None:
        self.begin = begin

    def wants(self, moment: Moment) -> Wanted:
        """See `GuidancePolicy.wants`."""
        if moment.position.step < self.begin * moment.position.steps - 1e-9:
            return Wanted("both", f"guided up to {self.begin:g} of the run")
        return Wanted("cond", "adapters stand for guidance")


class DistilledLoop(GuidanceLoop):
    """Hands the guidance scale on to the calls that stand for both branches, and to no other.

    Adapters act where a call of the conditional branch has a scale.
    """

    _uncond_at: tuple[int, int] | None = None

    def begin_run(self, run: Run) -> None:
        """See `Loop.begin_run`."""
        super().begin_run(run)
        self._uncond_at = None

    def model(self, request: Request, run: Runner) -> Any:
        """See `Loop.model`."""
        key = (request.position.step, request.position.stage)
        if request.roles == ("uncond",) and (self._cond is None or self._key != key):
            self._uncond_at = key
        aside = self._uncond_at == key or "third" in request.roles

        def marked(inner: Request) -> Any:
            alone = inner.roles == ("cond",) and self._wanted.branches == "cond" and not aside
            if alone and inner.entries:
                raise DitaError(
                    "agd's adapters know one time step for all samples of a call, and some method puts samples of "
                    "several steps into one; choose one of the two"
                )
            return run(inner if alone else replace(inner, scale=None))

        if "third" in request.roles:
            request.remark("agd stands for two branches, and this pipeline runs three in one batch")
            return marked(replace(request, reason="more than two branches"))
        return super().model(request, marked)


class AdapterHandler(Handler):
    """Adds what the adapters say to the outputs of their layers. See `dita.seams.Handler`.

    Args:
        adapters: of this transformer.
    """

    def __init__(self, adapters: AdapterSet) -> None:
        self.adapters, self.sites = adapters, adapters.sites
        self._numbers = {site: number for number, site in enumerate(adapters.sites)}
        self._conditions: Conditions | None = None
        self._warned = False

    def begin_run(self) -> None:
        """See `Handler.begin_run`."""
        self._conditions, self._warned = None, False

    def begin_call(self, call: Call) -> None:
        """Gather what the adapters know of the call."""
        self._conditions = None
        if call.scale is None or call.position.branch != "cond" or call.latents is None:
            return
        low, high = self.adapters.scales
        if not (self._warned or low - 1e-6 <= call.scale <= high + 1e-6):
            self._warned = True
            text = f"agd's adapters were trained for guidance scales from {low:g} to {high:g}, not for {call.scale:g}"
            warnings.warn(text, DitaWarning, stacklevel=2)
        self.adapters.to(call.latents.device)
        like = torch.ones(call.latents.shape[0], device=call.latents.device)
        self._conditions = Conditions.of(call.arguments, like * call.position.timestep, like * call.scale)

    def end_call(self, call: Call) -> None:
        """See `Handler.end_call`."""
        self._conditions = None

    def drives(self, site: Site) -> bool:
        """All of them."""
        return True

    def drive(self, site: Site, occurrence: int, call: Call, run: Callable[[], Features]) -> Features:
        """Run the layer and add to it."""
        output, *rest = run()
        if self._conditions is None or output is None:
            return (output, *rest)
        return (self.adapters.add(self._numbers[site], output, self._conditions), *rest)


@register
@dataclass(frozen=True)
class AGD(GuidanceMethod):
    """The settings of adapter guidance distillation.

    Attributes:
        weights: file of the adapters, which `train_agd` writes; "untrained" for none: the conditional branch alone.
        begin: share of the run that is guided by two branches, from 0 to 1; published as 0.

    The class attribute `ships_weights` tells sweeps of a bundled pipeline to take the file that ships for it.

    Raises:
        DitaError: a setting out of range; on attaching, no file, adapters of another model, or two transformers.

    Example:
        >>> AGD("agd.safetensors", begin=0.1).label()
        'weights=agd.safetensors begin=0.1'
    """

    weights: str = ""
    begin: float = 0.0

    name: ClassVar[str] = "agd"
    title: ClassVar[str] = "AGD"
    arxiv: ClassVar[str] = "2503.07274"
    axes: ClassVar[str] = "guidance; every step; conditional output with trained adapters"
    seams: ClassVar[frozenset[str]] = frozenset({"model", "module"})
    confidence: ClassVar[str] = "medium"
    ships_weights: ClassVar[bool] = True
    citation: ClassVar[str] = """@article{perezjensen2025agd,
  title={Efficient Distillation of Classifier-Free Guidance using Adapters},
  author={Perez Jensen, Cristian and Sadat, Seyedmorteza},
  journal={Transactions on Machine Learning Research},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("begin", self.begin, 0, 1)

    def sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """See `Method.sites`; no file is read."""
        return tuple(part.site for part in output_layers(anatomy))

    def handler(self, anatomy: Anatomy) -> Handler:
        """See `Method.handler`."""
        if self.begin >= 1:
            return Handler()
        if not self.weights:
            raise DitaError(
                f"agd has no adapters for {anatomy.name}: train them (python -m dita.eval.training.agd, or train_agd) "
                f'and give their file as weights; weights="{UNTRAINED}" runs the conditional branch alone'
            )
        output_layers(anatomy)
        return Handler() if self.weights == UNTRAINED else AdapterHandler(load_adapters(self.weights, anatomy))

    def policy(self, anatomies: tuple[Anatomy, ...]) -> Distilled:
        """See `GuidanceMethod.policy`."""
        return Distilled(self.begin)

    def make(self, anatomies: tuple[Anatomy, ...], pipe: Any) -> DistilledLoop:
        """See `SamplingMethod.make`."""
        if len(anatomies) > 1:
            raise DitaError(f"agd's adapters are trained for one transformer, and this pipeline has {len(anatomies)}")
        return DistilledLoop(self.policy(anatomies), self.name)

    @classmethod
    def disabled(cls) -> AGD:
        """Guidance by two branches throughout."""
        return cls(begin=1.0)

    @classmethod
    def forced(cls) -> AGD:
        """The second half without adapters."""
        return cls(UNTRAINED, begin=0.5)

    @classmethod
    def ladder(cls) -> tuple[AGD, ...]:
        """From the last half of the run to all of it, with the adapters that ship with a bundled pipeline."""
        return (cls(begin=0.5), cls(begin=0.25), cls(begin=0.1), cls())

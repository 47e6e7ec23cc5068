"""SageAttention: all of the attention, with 8-bit queries and keys.

Zhang et al., "SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference Acceleration", ICLR 2025,
arXiv 2410.02367; "SageAttention2", ICML 2025, arXiv 2411.10958.

Keys lose their mean, which changes no weight; then queries and keys are rounded to int8 and multiplied as such, weights
and values in float16, or in fp8 e4m3 (SageAttention2). See `dita.kernels.int8_attention` for what is rounded how, and
for what of SageAttention2 is left out. Every pair of tokens is computed, so the density stays 1: the report calls such
a step "low-bit" and says how many attentions were.

On a GPU this is a speed-up. On a CPU the roundings are emulated, for the study of their error: that is several times
slower than the model's own attention. It is no default anywhere. Attention whose mask differs from query to query stays
as it is. A sparse method multiplies in int8 with its own setting `qk`; it is not combined with this one.

Differs from the papers: SageAttention chooses per layer between this and a fully 8-bit variant by calibration; here all
layers are alike. Low-rank keys with large means of queries (smoothing of queries) are not treated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.attention_view import Attended
from dita.config import Method, check_number, check_whole
from dita.errors import DitaError
from dita.kernels.guards import steps_of
from dita.kernels.int8_attention import int8_attention
from dita.registry import register
from dita.seams import Call, Handler, Site


class LowBitHandler(Handler):
    """Computes the attention of some sites in 8 bits. See `dita.seams.Handler`.

    Args:
        sites: "attention" sites, in execution order.
        dense_steps, dense_layers: the first steps (a part of the run) and layers, which stay as they are.
        pv, granularity: as of `dita.kernels.int8_attention.int8_attention`.
    """

    def __init__(
        self, sites: tuple[Site, ...], dense_steps: float, dense_layers: int, pv: str, granularity: str
    ) -> None:
        self.sites, self.dense_steps = sites, dense_steps
        self.pv, self.granularity = pv, granularity
        self._spared = frozenset(sites[:dense_layers])
        self._rounded, self._whole = 0, 0

    def begin_call(self, call: Call) -> None:
        """Start the account of one call of the transformer."""
        self._rounded, self._whole = 0, 0

    def attend(
        self, site: Site, occurrence: int, call: Call, seen: Attended, plain: Callable[[Attended], torch.Tensor]
    ) -> torch.Tensor:
        """Answer in 8 bits where a mask allows it."""
        early = call.position.step < steps_of(self.dense_steps, call.position.steps)
        masked = seen.causal or (seen.mask is not None and seen.key_mask is None)
        if early or masked or site in self._spared:
            self._whole += 1
            return plain(seen)
        self._rounded += 1
        valid = None if seen.key_mask is None else seen.key_mask[:, None]
        return int8_attention(
            seen.q, seen.k, seen.v, scale=seen.scale, key_valid=valid, pv=self.pv, granularity=self.granularity
        )[0]

    def end_call(self, call: Call) -> None:
        """Write the account into the call."""
        if not self._rounded + self._whole:
            return
        account = f"{self._rounded} of {self._rounded + self._whole} attentions in 8 bits"
        call.sparsely = f"{call.sparsely}; {account}" if call.sparsely else account
        call.fewer_bits = call.fewer_bits or self._rounded > 0


@register
@dataclass(frozen=True)
class Sage(Method):
    """SageAttention's settings.

    Attributes:
        pv: how weights and values are multiplied: "fp16", or "fp8" as in SageAttention2, which needs an Ada or Hopper
            GPU.
        granularity: one scale of the queries per "block" of 128, or per "warp" of 32 as in SageAttention2.
        dense_steps: first part of the run, from 0 to 1, that stays as it is.
        dense_layers: how many of the first layers stay as they are.

    Raises:
        DitaError: a setting out of range; on attaching, a model without attention inside its blocks.

    Example:
        >>> Sage(pv="fp8", granularity="warp").label()
        'pv=fp8 granularity=warp'
    """

    pv: str = "fp16"
    granularity: str = "block"
    dense_steps: float = 0.0
    dense_layers: int = 0

    name: ClassVar[str] = "sage"
    title: ClassVar[str] = "SageAttention"
    arxiv: ClassVar[str] = "2410.02367"
    axes: ClassVar[str] = "all of the attention; int8 queries and keys, float16 or fp8 values"
    claims: ClassVar[frozenset[str]] = frozenset({"which attention is computed"})
    seams: ClassVar[frozenset[str]] = frozenset({"attention"})
    citation: ClassVar[str] = """@inproceedings{zhang2025sageattention,
  title={SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference Acceleration},
  author={Zhang, Jintao and Wei, Jia and Zhang, Pengle and Zhu, Jun and Chen, Jianfei},
  booktitle={International Conference on Learning Representations},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        for name, value, known in (
            ("pv", self.pv, ("fp16", "fp8")),
            ("granularity", self.granularity, ("block", "warp")),
        ):
            if value not in known:
                raise DitaError(f"{name} is {value!r}; expected {' or '.join(known)}")
        check_number("dense_steps", self.dense_steps, 0, 1)
        check_whole("dense_layers", self.dense_layers, 0)

    def handler(self, anatomy: Anatomy) -> Handler:
        """See `Method.handler`."""
        anatomy.require("attention", self.name)
        return LowBitHandler(anatomy.attention_sites, self.dense_steps, self.dense_layers, self.pv, self.granularity)

    @classmethod
    def disabled(cls) -> Sage:
        """Every step as it is."""
        return cls(dense_steps=1.0)

    @classmethod
    def forced(cls) -> Sage:
        """All but the first steps."""
        return cls(dense_steps=0.2)

    @classmethod
    def ladder(cls) -> tuple[Sage, ...]:
        """From fine scales and float16 to coarse ones and fp8."""
        kinds = (("fp16", "warp"), ("fp16", "block"), ("fp8", "warp"), ("fp8", "block"))
        return tuple(cls(pv=pv, granularity=granularity) for pv, granularity in kinds)

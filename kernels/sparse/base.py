"""The base class of block-sparse attention methods: settings that all share, and how they attach."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from dita.anatomy import Anatomy
from dita.config import Method, check_number, check_whole
from dita.errors import DitaError
from dita.kernels.sparse.handler import SparseHandler
from dita.kernels.sparse.policy import Policy
from dita.seams import Handler

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class SparseMethod(Method):
    """A method that computes a part of the attention; subclasses define `policy`.

    Attributes:
        dense_steps: first part of the run, from 0 to 1, that stays dense.
        dense_layers: how many of the first layers stay dense.
        cutoff: density above which dense attention is used; gathering and planning cost more than it saves.
        qk: how queries and keys are multiplied where attention is sparse: "same" as the model's dtype, or "int8" with
            8-bit numbers (SageAttention's, as in SpargeAttn). On a CPU int8 is emulated: slower, and only for study.
    """

    dense_steps: float = field(default=0.2, kw_only=True)
    dense_layers: int = field(default=0, kw_only=True)
    cutoff: float = field(default=0.6, kw_only=True)
    qk: str = field(default="same", kw_only=True)

    claims: ClassVar[frozenset[str]] = frozenset({"which attention is computed"})
    seams: ClassVar[frozenset[str]] = frozenset({"attention"})

    def __post_init__(self) -> None:
        check_number("dense_steps", self.dense_steps, 0, 1)
        check_whole("dense_layers", self.dense_layers, 0)
        check_number("cutoff", self.cutoff, 0, 1)
        if self.qk not in ("same", "int8"):
            raise DitaError(f'qk is {self.qk!r}; expected "same" or "int8"')
        super().__post_init__()

    @classmethod
    def disabled(cls) -> Self:
        """Every step dense."""
        return cls(dense_steps=1.0)

    def policy(self, anatomy: Anatomy) -> Policy:
        """The method for one model, without the shared settings."""
        raise NotImplementedError(f"{type(self).__name__} must define policy()")

    def handler(self, anatomy: Anatomy) -> Handler:
        """See `Method.handler`."""
        anatomy.require("attention", self.name)
        policy = self.policy(anatomy)
        policy.dense_steps, policy.dense_layers, policy.cutoff = self.dense_steps, self.dense_layers, self.cutoff
        policy.qk = self.qk
        return SparseHandler(policy, anatomy.attention_sites, anatomy.text_at)

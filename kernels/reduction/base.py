"""The base class of methods that reduce the tokens that attention reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dita.anatomy import Anatomy, input_site
from dita.config import Method, check_number
from dita.errors import DitaError
from dita.kernels.reduction.handler import ReductionHandler, ReductionPolicy
from dita.seams import Handler, Site

CLAIM = "which attention is computed"


@dataclass(frozen=True)
class ReductionMethod(Method):
    """A method that reduces the image tokens on their way into self- and joint attention; subclasses define `policy`.

    Text tokens are never reduced. Cross-attention and MLPs run on all tokens.

    Attributes:
        dense_steps: first part of the run, from 0 to 1, in which nothing is reduced.
        proportional: a merged token counts in attention for as many as it stands for: log(size) is added to its logits
            as a key (ToMe's proportional attention). No paper on diffusion does.
    """

    dense_steps: float = field(default=0.0, kw_only=True)
    proportional: bool = field(default=False, kw_only=True)

    claims: ClassVar[frozenset[str]] = frozenset({CLAIM})
    seams: ClassVar[frozenset[str]] = frozenset({"module"})

    def __post_init__(self) -> None:
        check_number("dense_steps", self.dense_steps, 0, 1)
        if not isinstance(self.proportional, bool):
            raise DitaError(f"proportional is {self.proportional!r}; expected True or False")
        super().__post_init__()

    def policy(self, anatomy: Anatomy) -> ReductionPolicy:
        """The method for one model, without the shared settings."""
        raise NotImplementedError(f"{type(self).__name__} must define policy()")

    @property
    def watches_shift(self) -> bool:
        """Representation shift is wanted."""
        return False

    def handler(self, anatomy: Anatomy) -> Handler:
        """See `Method.handler`."""
        require_known_positions(anatomy, self.name)
        if not anatomy.input_sites:
            raise DitaError(f"{self.name} found no self- or joint attention inside the blocks of {anatomy.name}")
        watched: tuple[Site, ...] = ()
        if self.watches_shift:
            watched = tuple(input_site(p.site) for p in anatomy.modules if p.site.role == "mlp" and not p.site.text)
            if not watched:
                raise DitaError(
                    f"{self.name} ranks tokens by how MLPs change them, and {anatomy.name} has no MLP of its own in "
                    'its blocks; use another ranking than "shift"'
                )
        policy = self.policy(anatomy)
        policy.dense_steps = self.dense_steps
        return ReductionHandler(policy, anatomy.input_sites, watched)


def require_known_positions(anatomy: Anatomy, method: str) -> None:
    """Raise `DitaError` unless dita has tried how this model's positions travel with its tokens."""
    anatomy.require("module", method)
    if not anatomy.family:
        raise DitaError(
            f"{method} reduces tokens together with their positions, and how {anatomy.name} passes these dita does not "
            "know (dita/models.py lists the models it knows); asymrnr reduces behind that, inside the attention"
        )

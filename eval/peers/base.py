"""The base class of peers: another project's accelerator as a config that a sweep can run like one of dita's.

A peer gets the help that a user who knows both libraries would give it, and each file says which. It never gets other
arguments, another pipeline or another precision than the run it is compared with.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any, ClassVar

from torch import nn

from dita.errors import DitaError
from dita.eval.peers.harness import Attachment, Counter, Harness
from dita.eval.peers.trace import Trace, quiet
from dita.session import transformers_of

_MARK = "_dita_peer"


@dataclass(frozen=True)
class Peer:
    """One accelerator of another project with its settings, which are plain JSON values.

    Subclasses are frozen dataclasses whose fields are the settings.

    Attributes:
        name: of the rows, such as "diffusers firstblock".
        package: the distribution it comes from.
        module: what is imported of it.
        loud: level from which its log messages are shown while it is attached.
        needs_calibration: the settings hold numbers measured on the pipeline.
    """

    name: ClassVar[str] = ""
    package: ClassVar[str] = ""
    module: ClassVar[str] = ""
    loud: ClassVar[int] = logging.WARNING
    needs_calibration: ClassVar[bool] = False

    @property
    def uncalibrated(self) -> bool:
        """Whether a sweep calibrates it first."""
        return self.needs_calibration

    @property
    def settings(self) -> dict[str, Any]:
        """The fields as a dictionary of plain values."""
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
        }

    def to_dict(self) -> dict[str, Any]:
        """Name, package, its version and the settings, as JSON values.

        Raises:
            DitaError: the package is not installed.
        """
        return {"method": self.name, "package": self.package, "version": self.version(), "settings": self.settings}

    def label(self) -> str:
        """The settings that differ from the defaults, in one line; "default" if none does."""
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.repr:
                parts.append(f"{field.name}={value:g}" if isinstance(value, float) else f"{field.name}={value}")
        return " ".join(parts) or "default"

    @classmethod
    def ladder(cls) -> tuple[Peer, ...]:
        """Settings from mild to strong, for sweeps."""
        raise NotImplementedError(f"{cls.__name__} must define ladder()")

    @classmethod
    def version(cls) -> str:
        """Version of the installed package.

        Raises:
            DitaError: it is not installed.
        """
        try:
            return installed_version(cls.package)
        except PackageNotFoundError:
            raise DitaError(f'{cls.name} needs {cls.package}, which is missing: pip install "dita[peers]"') from None

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> Peer:
        """The same settings with the numbers measured on `pipe`, which `call(pipe)` runs once, in full.

        Peers that need none return themselves.
        """
        return self

    def trial(self) -> Peer:
        """A peer that attaches as this one does and needs no calibration, for `supports`."""
        return self

    def enable(self, pipe: Any, model: nn.Module) -> Attachment:
        """Switch the peer on; whatever it changes is put back by `attached`.

        Raises:
            DitaError: it cannot work on this pipeline, or hooked nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} must define enable()")

    @contextmanager
    def attached(self, pipe: Any) -> Iterator[Counter]:
        """Switch the peer on within a `with` block; afterwards, and after an error, the pipeline is as it was.

        Args:
            pipe: a diffusers pipeline with one transformer, neither accelerated nor cached.

        Yields:
            A `Counter`, which says after each run how much of it was computed.

        Raises:
            DitaError: the peer does not work on this pipeline, with the peer's own reason; or, from the pipeline's
                call, it failed at run time. A run in which it skipped nothing gives a `DitaWarning`.

        Example:
            >>> with FirstBlock(threshold=0.1).attached(pipe) as counter:  # doctest: +SKIP
            ...     images = pipe(class_labels=[1], num_inference_steps=50).images
            >>> counter.computed_fraction  # doctest: +SKIP
            0.41
        """
        self.version()
        model = plain_transformer(pipe)
        importlib.import_module(self.module)
        trace = Trace(pipe, model)
        harness = None
        try:
            vars(model)[_MARK] = self.name
            with quiet(self.module, self.loud):
                harness = Harness(f"{self.name} ({self.label()})", pipe, model)
                try:
                    harness.attach(lambda: self.enable(pipe, model))
                except DitaError:
                    raise
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"
                    raise DitaError(f"{self.name} does not attach to {type(pipe).__name__}: {reason}") from error
                yield harness.counter
        finally:
            if harness is not None:
                harness.detach()
            trace.restore()


def plain_transformer(pipe: Any) -> nn.Module:
    """The one transformer of a pipeline to which nothing is attached.

    Raises:
        DitaError: there is none, or more than one, or something is attached already.
    """
    models = transformers_of(pipe)
    if len(models) != 1:
        raise DitaError(f"{type(pipe).__name__} has {', '.join(models)}; peers are compared on pipelines with one")
    ((name, model),) = models.items()
    held = next((mark for mark in (_MARK, "_dita_owner", "_cache_config") if vars(model).get(mark) is not None), None)
    if held is not None or getattr(type(pipe), "_is_cached", False):
        what = vars(model)[_MARK] if held == _MARK else "dita" if held == "_dita_owner" else "a cache of its own"
        raise DitaError(f"the {name} of this {type(pipe).__name__} has {what} attached already: take that off first")
    return model


def supports(peer: Peer | type[Peer], pipe: Any) -> tuple[bool, str]:
    """Try to attach a peer; nothing runs, and the pipeline is left as it was.

    Args:
        peer: a config, or a class, which is tried at its strongest setting.
        pipe: a diffusers pipeline.

    Returns:
        Whether it attaches, and what was hooked or why not.

    Example:
        >>> supports(FirstBlock, pipe)  # doctest: +SKIP
        (True, '8 hooks on DiTTransformer2DModel')
    """
    config = (peer.ladder()[-1] if isinstance(peer, type) else peer).trial()
    try:
        with config.attached(pipe) as counter:
            return True, counter.summary
    except DitaError as error:
        return False, str(error)

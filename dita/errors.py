"""The one error class of dita, and the one warning class."""

from __future__ import annotations


class DitaError(Exception):
    """Something asked of dita cannot be done; the message says what came, what was expected and what to do."""


class DitaWarning(UserWarning):
    """Something worth knowing: a run that reused nothing, a calibration made elsewhere."""

"""Reuse across steps: what is kept of the transformer, when it is used again, and how it is forecast.

Importing this package registers every caching method.
"""

from __future__ import annotations

from dita.caching.bwcache import BWCache
from dita.caching.dbcache import DBCache, FirstBlockCache
from dita.caching.magcache import MagCache
from dita.caching.magnitude import MagnitudeTable
from dita.caching.taylorseer import TaylorSeer

__all__ = ["BWCache", "DBCache", "FirstBlockCache", "MagCache", "MagnitudeTable", "TaylorSeer"]

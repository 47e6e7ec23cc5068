"""Reuse across steps: what is kept of the transformer, when it is used again, and how it is forecast.

Importing this package registers every caching method.
"""

from __future__ import annotations

from dita.caching.abcache import ABCache
from dita.caching.adacache import AdaCache
from dita.caching.bac import BAC
from dita.caching.bwcache import BWCache
from dita.caching.cachequant import CacheQuant
from dita.caching.cgtaylor import CGTaylor
from dita.caching.clusca import ClusCa
from dita.caching.dbcache import DBCache, FirstBlockCache
from dita.caching.deltadit import DeltaDiT
from dita.caching.dicache import DiCache
from dita.caching.duca import DuCa
from dita.caching.easycache import EasyCache
from dita.caching.efficientvla import EfficientVLA
from dita.caching.fastercache import FasterCache
from dita.caching.fitted import Fitted
from dita.caching.fitted_table import FittedTable
from dita.caching.foca import FoCa
from dita.caching.foresight import Foresight
from dita.caching.freqca import FreqCa
from dita.caching.harmonica import HarmoniCa
from dita.caching.hicache import HiCache
from dita.caching.hyca import HyCa
from dita.caching.icc import ICC
from dita.caching.lightcache import LightCache
from dita.caching.magcache import MagCache
from dita.caching.magnitude import MagnitudeTable
from dita.caching.pab import PAB
from dita.caching.policy import Guards
from dita.caching.profilingdit import ProfilingDiT
from dita.caching.qandc import QandC
from dita.caching.smoothcache import SmoothCache
from dita.caching.speca import SpeCa
from dita.caching.taylorseer import TaylorSeer
from dita.caching.teacache import Rescaling, TeaCache
from dita.caching.toca import ToCa
from dita.table import Table

__all__ = [
    "BAC",
    "ICC",
    "PAB",
    "ABCache",
    "AdaCache",
    "BWCache",
    "CGTaylor",
    "CacheQuant",
    "ClusCa",
    "DBCache",
    "DeltaDiT",
    "DiCache",
    "DuCa",
    "EasyCache",
    "EfficientVLA",
    "FasterCache",
    "FirstBlockCache",
    "Fitted",
    "FittedTable",
    "FoCa",
    "Foresight",
    "FreqCa",
    "Guards",
    "HarmoniCa",
    "HiCache",
    "HyCa",
    "LightCache",
    "MagCache",
    "MagnitudeTable",
    "ProfilingDiT",
    "QandC",
    "Rescaling",
    "SmoothCache",
    "SpeCa",
    "Table",
    "TaylorSeer",
    "TeaCache",
    "ToCa",
]

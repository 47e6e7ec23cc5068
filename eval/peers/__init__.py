"""Other projects' accelerators, to be measured in the same sweep as dita's methods.

Importing this loads neither diffusers nor cache-dit.
"""

from __future__ import annotations

from typing import Any

from dita.errors import DitaError
from dita.eval.peers.base import Peer, supports
from dita.eval.peers.cache_dit import DBCache, DBCacheTaylor
from dita.eval.peers.diffusers_attention import FasterCache, PyramidBroadcast
from dita.eval.peers.diffusers_hooks import FirstBlock, MagCache
from dita.eval.peers.diffusers_taylorseer import TaylorSeer, TaylorSeerLite
from dita.eval.peers.harness import Counter

__all__ = ["Counter", "Peer", "get_peer", "peers", "supports"]

_ALL: tuple[type[Peer], ...] = (
    FirstBlock,
    MagCache,
    TaylorSeer,
    TaylorSeerLite,
    PyramidBroadcast,
    FasterCache,
    DBCache,
    DBCacheTaylor,
)


def peers(pipe: Any = None) -> list[type[Peer]]:
    """List the peers whose package is installed, and with a pipeline only those that attach to it.

    Args:
        pipe: a diffusers pipeline, left as it was.

    Example:
        >>> "diffusers firstblock" in [peer.name for peer in peers()]
        True
    """
    return [peer for peer in _ALL if _installed(peer) and (pipe is None or supports(peer, pipe)[0])]


def get_peer(name: str) -> type[Peer]:
    """Find a peer by the name of its rows, installed or not.

    Raises:
        DitaError: there is none of that name.

    Example:
        >>> get_peer("cache-dit dbcache").package
        'cache-dit'
    """
    for peer in _ALL:
        if peer.name == name:
            return peer
    raise DitaError(f"there is no peer {name!r}; known: {', '.join(peer.name for peer in _ALL)}")


def _installed(peer: type[Peer]) -> bool:
    try:
        peer.version()
    except DitaError:
        return False
    return True

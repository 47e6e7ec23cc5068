"""The settings that a sweep tries of each peer, as the table in docs/peers.md: python -m dita.eval.peers.grid."""

from __future__ import annotations

import dataclasses

from dita.eval.labels import words
from dita.eval.peers import peers
from dita.eval.rows import markdown_table
from dita.eval.settings import varying


def grid() -> str:
    """Write each installed peer's settings, mild to strong, as a GitHub table.

    Returns:
        Lines ending in a newline, one a peer: its package, the settings that are the same throughout and those that
        are tried. Numbers measured on the pipeline are left out.

    Example:
        >>> print(grid().splitlines()[0])
        | peer | package | fixed | tried, from mild to strong |
    """
    cells = []
    for peer in peers():
        ladder = peer.ladder()
        tried = varying(ladder)
        moving = {part.split("=")[0] for part in tried[0].split()}
        shown = [field.name for field in dataclasses.fields(peer) if field.repr and field.name not in moving]
        fixed = words(peer, {name: ladder[0].settings[name] for name in shown}, shown) if shown else ""
        cells.append([peer.name, peer.package, fixed, ", ".join(f"`{label}`" for label in tried)])
    head = ["peer", "package", "fixed", "tried, from mild to strong"]
    return markdown_table(head, cells, left=head)


if __name__ == "__main__":
    print(grid(), end="")

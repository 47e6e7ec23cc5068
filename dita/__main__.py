"""`python -m dita` is the command line."""

from __future__ import annotations

from dita.cli import app

if __name__ == "__main__":
    app(prog_name="dita")

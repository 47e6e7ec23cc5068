"""Solvers: steps taken without the transformer, or several at a time."""

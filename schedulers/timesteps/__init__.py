"""Timesteps: which ones are run, and which the transformer is told."""

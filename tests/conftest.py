"""No test reaches the Hugging Face hub; set before anything imports its client."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from hypothesis import settings

# The same examples in every run, however slow the machine is.
settings.register_profile("dita", deadline=None, derandomize=True, database=None)
settings.load_profile("dita")

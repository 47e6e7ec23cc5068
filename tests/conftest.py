"""No test reaches the Hugging Face hub; set before anything imports its client."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from hypothesis import settings

# The same examples in every run, however slow the machine is.
settings.register_profile("dita", deadline=None, derandomize=True, database=None)
# make nightly: other examples every night.
settings.register_profile("nightly", deadline=None, max_examples=5000, print_blob=True)
settings.load_profile("dita")

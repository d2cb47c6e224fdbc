"""Settings of every test of the laboratory."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reached for the network would fail, not hang

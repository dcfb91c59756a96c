"""Names of what a run's folder holds."""

from __future__ import annotations

SETTINGS = "settings.toml"
RESUME = "resume"
STATE = "state.json"
FINAL = "final"
BEST = "best"

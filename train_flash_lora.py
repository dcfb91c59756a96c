"""Distil a few-step LoRA: ``fewstep train`` with Stable Diffusion 1.5 as the default base."""

from __future__ import annotations

import sys

from fewstep.cli import script
from fewstep.config import STABLE_DIFFUSION

if __name__ == "__main__":
    sys.exit(script("train_flash_lora.py", "train", default_base=STABLE_DIFFUSION))

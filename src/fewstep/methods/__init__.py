"""Distillation methods: one file each, and one line here."""

from __future__ import annotations

from fewstep.methods.kstep import KStep, StudentSampler
from fewstep.methods.trajectory import Trajectory

METHODS: dict[StudentSampler, type[KStep]] = {"lcm": KStep, "ddim": Trajectory}
"""Which one trains a student for a sampler."""

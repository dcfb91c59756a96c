"""Distillation methods: one file each, and one line here."""

from __future__ import annotations

from fewstep.methods.kstep import KStep

METHODS = {"kstep": KStep}

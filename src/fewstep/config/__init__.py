"""One frozen settings class a command: defaults, units, help texts and checks in one place.

Command line, TOML file and Python all fill the same objects; a field's ``description`` is its help text. Whatever is
wrong is raised as one `InputError` of one line: what came, what is allowed, the fix. Nothing here imports torch.

Fields that may be ``None`` are filled in by the procedure, from the base model or from another field; the resolved
object is what gets printed and saved as ``settings.toml``.
"""

from __future__ import annotations

from fewstep.config.adapters import AdapterEntry, load_adapters
from fewstep.config.base import BaseModelSettings, Checked, Settings
from fewstep.config.drawing import (
    AdapterSettings,
    BenchSettings,
    ExportSettings,
    GenerateSettings,
    ReportSettings,
    SamplingSettings,
    adapter_entries,
)
from fewstep.config.embedded import DemoSettings, PretrainSettings
from fewstep.config.kinds import EMBEDDED_BASE, FAST_OPTIONS, STABLE_DIFFUSION, Start
from fewstep.config.spelling import allowed, nearest, refusal, spell
from fewstep.config.toml import command_line, load_toml, merged, settings_toml
from fewstep.config.training import CacheSettings, DoctorSettings, TrainCommand, TrainSettings

__all__ = [
    "EMBEDDED_BASE",
    "FAST_OPTIONS",
    "STABLE_DIFFUSION",
    "AdapterEntry",
    "AdapterSettings",
    "BaseModelSettings",
    "BenchSettings",
    "CacheSettings",
    "Checked",
    "DemoSettings",
    "DoctorSettings",
    "ExportSettings",
    "GenerateSettings",
    "PretrainSettings",
    "ReportSettings",
    "SamplingSettings",
    "Settings",
    "Start",
    "TrainCommand",
    "TrainSettings",
    "adapter_entries",
    "allowed",
    "command_line",
    "load_adapters",
    "load_toml",
    "merged",
    "nearest",
    "refusal",
    "settings_toml",
    "spell",
]

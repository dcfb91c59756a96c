"""fewstep: distil a text-to-image diffusion model into a LoRA that draws in 1 to 8 steps, and measure what it cost.

>>> import fewstep
>>> result = fewstep.distill(fewstep.TrainSettings(max_steps=300))
>>> fewstep.generate(fewstep.GenerateSettings(prompt="a red house on the left, a night sky, a moon"))

Everything is loaded on first use: importing this package takes no time and no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.benchmark import BenchmarkResult, benchmark
    from fewstep.config import BenchSettings, DemoSettings, GenerateSettings, PretrainSettings, TrainSettings
    from fewstep.errors import CheckpointError, DataError, FewstepError, InputError, Interrupted
    from fewstep.generate import GenerateResult, generate
    from fewstep.train import DistillResult, distill
    from fewstep.ui import ConsoleReporter

__version__ = "0.1.0"

__all__ = [
    "BenchSettings",
    "BenchmarkResult",
    "CheckpointError",
    "ConsoleReporter",
    "DataError",
    "DemoSettings",
    "DistillResult",
    "FewstepError",
    "GenerateResult",
    "GenerateSettings",
    "InputError",
    "Interrupted",
    "PretrainSettings",
    "TrainSettings",
    "__version__",
    "benchmark",
    "distill",
    "generate",
]

_MODULES = {
    "BenchSettings": "config",
    "BenchmarkResult": "benchmark",
    "CheckpointError": "errors",
    "ConsoleReporter": "ui",
    "DataError": "errors",
    "DemoSettings": "config",
    "DistillResult": "train",
    "FewstepError": "errors",
    "GenerateResult": "generate",
    "GenerateSettings": "config",
    "InputError": "errors",
    "Interrupted": "errors",
    "PretrainSettings": "config",
    "TrainSettings": "config",
    "benchmark": "benchmark",
    "distill": "train",
    "generate": "generate",
}


class _Package(ModuleType):
    """This package: ``fewstep.generate`` is the function, whether or not the module of that name is loaded.

    Importing a module binds its name in its package; where a function of ours has that name, the binding is skipped.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

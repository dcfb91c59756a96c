"""The bases that have a name, and what a base may be able to do beyond being a diffusion model.

This file and the bases' own packages are the only places that know such a name.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

BASES = {"scenes": "fewstep.scenes.abilities:SCENES"}
"""Name -> MODULE:OBJECT with its `Abilities`. Its diffusers folder is `base/` in the package of that module."""


class Abilities(Protocol):
    """What a base may offer besides its networks; a base without any has None in place of this."""

    def prompts(self, count: int, seed: int) -> list[str]:
        """`count` captions that were not trained on."""
        ...

    def training_item(self, seed: int, index: int) -> tuple[np.ndarray, str]:
        """Picture uint8 [H, W, 3] and caption number `index` of the base's own endless data."""
        ...

    def training_caption(self, seed: int, index: int) -> str:
        """That caption, without the work of drawing."""
        ...

    def reference_pictures(self, prompts: list[str], per_prompt: int, seed: int) -> np.ndarray:
        """`per_prompt` right pictures for each prompt, uint8 [len(prompts) * per_prompt, H, W, 3]."""
        ...

    def unknown_words(self, prompts: list[str]) -> list[str]:
        """The words in `prompts` that the base was never taught, each once."""
        ...

    def answers(self, pixels: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """What is right in pictures [B, 3, H, W] in 0..1: bool [B] for each attribute, "intact" and "all_right"."""
        ...

    def features(self) -> nn.Module:
        """A network from pictures [B, 3, H, W] in 0..1 to features [B, 64] for distances between distributions."""
        ...

    def alignment_model(self) -> Path:
        """The folder of the CLIPModel that judges alignment."""
        ...

    def adapter(self) -> Path | None:
        """The folder of the few-step adapter that is shipped with the base; None where there is none."""
        ...

    def beside(self, base: Path) -> Abilities:
        """The same for a rebuilt base in the folder `base`: judges that were trained with it come before these."""
        ...


def folder_of(name: str) -> Path:
    """The diffusers folder of the registered base `name`, found without importing it."""
    package = BASES[name].partition(":")[0].rpartition(".")[0]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"base {name!r}: no package {package}")
    return Path(spec.submodule_search_locations[0]) / "base"


def abilities_of(name: str, rebuilt: Path | None = None) -> Abilities:
    """The abilities of the registered base `name`, or of one that was `rebuilt` in a folder of its own."""
    module, _, attribute = BASES[name].partition(":")
    found: Abilities = getattr(import_module(module), attribute)
    return found if rebuilt is None else found.beside(rebuilt)

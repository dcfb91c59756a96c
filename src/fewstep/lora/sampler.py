"""How an adapter is to be sampled: by a scheduler beside it, and by its own file should that be all there is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from ..arms import Sampler
from ..quiet import quiet_libraries
from ..schedule import TIMESTEP_SCALING
from ..timesteps import ORIGINAL_STEPS

FOLDER = "scheduler"

NOISE_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")
"""What a base's scheduler may say of noise levels other than its timesteps'; with these no timesteps can be given."""


STATED = "fewstep_sampling"
"""The entry of a safetensors header."""


@dataclass(frozen=True)
class StatedSampling:
    """What an adapter's own file says of how it was trained to be sampled; see `save_scheduler`."""

    sampler: Sampler
    span: float
    step_counts: tuple[int, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def stated_sampling(weights: Path) -> StatedSampling | None:
    """What the header of an adapter's file says; None where it says nothing, or nothing that is known here."""
    try:
        with safe_open(weights, "pt") as file:
            stated = json.loads((file.metadata() or {})[STATED])
        sampler, span, counts = stated["sampler"], float(stated["span"]), tuple(map(int, stated["step_counts"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
    if sampler not in ("lcm", "tcd", "ddim") or not 0 < span <= 1 or any(count < 1 for count in counts):
        return None
    return StatedSampling(sampler, span, counts)


def save_scheduler(
    folder: Path,
    base_config: Mapping[str, Any],
    sampler: Literal["lcm", "ddim"],
    span: float = 1.0,
    step_counts: Sequence[int] = (),
) -> None:
    """Write `scheduler/` into an adapter's folder, for stock pipelines and for our own.

    Args:
        base_config: of the base's scheduler: betas and prediction type.
        sampler: how the adapter was trained to be sampled. A stock pipeline draws then what ours draws: nothing is
            clipped, whatever the base's own scheduler does, and DDIM takes "trailing" timesteps and ends at x0 itself.
        span: below 1 the timesteps are none that a stock scheduler finds by itself: `pipeline(..., timesteps=[...])`.
        step_counts: that the adapter promises.

    DDIM's own scheduler takes no timesteps, and steps by T // n: where n does not divide T it lands beside the
    timesteps that it visits, and beside x0. DPM-Solver++ of order 1 is the same step, and its scheduler does neither.
    """
    with quiet_libraries():
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler

    base, unclipped = dict(base_config), {"clip_sample": False, "thresholding": False}
    uneven = any(base.get("num_train_timesteps", 1000) % steps for steps in step_counts)
    if sampler == "lcm":
        scheduler = LCMScheduler.from_config(
            base, **unclipped, original_inference_steps=ORIGINAL_STEPS, timestep_scaling=TIMESTEP_SCALING
        )
    elif span < 1 or uneven:
        first_order = {"algorithm_type": "dpmsolver++", "solver_order": 1, "final_sigmas_type": "zero"}
        own_sigmas = dict.fromkeys(NOISE_LEVELS, False)
        plain = {"timestep_spacing": "trailing", "thresholding": False}
        scheduler = DPMSolverMultistepScheduler.from_config(base, **first_order, **own_sigmas, **plain)
    else:
        scheduler = DDIMScheduler.from_config(base, timestep_spacing="trailing", set_alpha_to_one=True, **unclipped)
    scheduler.save_pretrained(str(folder / FOLDER))

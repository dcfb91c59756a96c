"""The scheduler that lies beside an adapter and says how it is to be sampled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..quiet import quiet_libraries

FOLDER = "scheduler"


def save_scheduler(
    folder: Path, base_config: Mapping[str, Any], sampler: Literal["lcm", "ddim"], span: float = 1.0
) -> None:
    """Write `scheduler/` into an adapter's folder, for stock pipelines and for our own.

    Args:
        base_config: of the base's scheduler: betas and prediction type.
        sampler: how the adapter was trained to be sampled. DDIM's scheduler takes "trailing" timesteps, ends at x0
            itself and clips nothing: then a stock pipeline draws what `sampling.ddim_sample` draws.
        span: below 1 the timesteps are none that a stock scheduler finds by itself, and DDIM's takes no others. The
            same step is that of DPM-Solver++ of order 1, whose scheduler does: `pipeline(..., timesteps=[...])`.
    """
    with quiet_libraries():
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler

    if sampler == "ddim" and span < 1:
        first_order = {"algorithm_type": "dpmsolver++", "solver_order": 1, "final_sigmas_type": "zero"}
        plain = {"timestep_spacing": "trailing", "thresholding": False}
        scheduler = DPMSolverMultistepScheduler.from_config(dict(base_config), **first_order, **plain)
    elif sampler == "ddim":
        exact = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False, "thresholding": False}
        scheduler = DDIMScheduler.from_config(dict(base_config), **exact)
    else:
        scheduler = LCMScheduler.from_config(dict(base_config))
    scheduler.save_pretrained(str(folder / FOLDER))

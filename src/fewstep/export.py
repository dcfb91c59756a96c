"""`fewstep export`: an adapter as one file that other tools read, proven to be the same adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep import lora
from fewstep.arms import sampler_timesteps
from fewstep.backbone import Backbone
from fewstep.config import ExportSettings
from fewstep.errors import CheckpointError, InputError
from fewstep.opening import open_base, promised_steps, recorded_sampling
from fewstep.reporting import LOG, Reporter


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """The file, and how many modules it changes."""

    file: Path
    modules: int


def export(settings: ExportSettings, *, reporter: Reporter = LOG, backbone: Backbone | None = None) -> ExportResult:
    """Write the adapter in kohya's layout, and read it back: the same weights and scales in the same modules.

    Args:
        settings: which adapter, on which base, to which file.
        reporter: told how the adapter is to be sampled, which other tools do not read from the file.
        backbone: a base that is loaded already; with an adapter attached, that is the one where none is named.

    Raises:
        InputError: the file is there already, or no adapter or base came that can be used.
        CheckpointError: an adapter that cannot be used, or that reads back as another one.
    """
    file = settings.outfile
    if file.exists():
        raise InputError(f"outfile {str(file)!r} is there already; allowed is a new one; choose another name")
    opened = open_base(settings, backbone=backbone, with_adapter=True, step_counts=(), reporter=reporter)
    backbone = opened.backbone
    wanted = recorded_sampling(opened.source, reporter)
    counts = (promised_steps(opened.source) if opened.source else None) or ()
    stated = lora.StatedSampling(wanted.sampler, wanted.span, counts)
    tensors = lora.kohya_tensors(backbone.unet)
    lora.save_kohya(tensors, file, {lora.STATED: stated.to_json()} if wanted.known else {})
    try:
        info = lora.load_adapter(backbone, file)
        _compare(lora.kohya_tensors(backbone.unet), tensors, file)
    except BaseException:  # stopped, or out of memory: what has not been compared is not kept
        file.unlink()
        raise
    reporter.say(f"exported: {file}, {info.modules} modules, rank {info.rank}, alpha {info.alpha:g}")
    if counts:
        steps = 4 if 4 in counts else max(counts)
        timesteps = sampler_timesteps(wanted.sampler, steps, backbone.schedule.num_train_timesteps, wanted.span)
        alpha_bar = backbone.schedule.alphas_cumprod[list(timesteps)].double()
        sigmas = ((1 - alpha_bar) / alpha_bar).sqrt().tolist()
        reporter.say(
            f"to be sampled with {wanted.sampler}, guidance (CFG) 1, in {steps} steps at timesteps "
            f"{' '.join(map(str, timesteps))}, as sigmas {', '.join(f'{sigma:.4g}' for sigma in sigmas)}, 0"
        )
    return ExportResult(file=file, modules=info.modules)


def _compare(read_back: Mapping[str, Tensor], written: Mapping[str, Tensor], file: Path) -> None:
    """Equal names and weights, bit for bit, and alphas as far as fp32 can say them."""
    same = read_back.keys() == written.keys() and all(
        torch.allclose(read_back[name], value, rtol=1e-6, atol=0)
        if name.endswith(".alpha")
        else torch.equal(read_back[name], value)
        for name, value in written.items()
    )
    if not same:
        raise CheckpointError(f"{str(file)!r} reads back as another adapter than was written; it was not kept")

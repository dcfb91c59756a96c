"""`fewstep pretrain`: the embedded base and its judges, rebuilt from nothing in seven resumable stages.

1. vae, vae-refine: drawings to latents and back, down two learning rate curves;
2. judges: the reader with its features, and the alignment model;
3. denoiser-half, denoiser: the text encoder, then the UNet on cached latents;
4. refine-half, refine: the UNet's training goes on under a second learning rate curve, then the figures that say what
   the base can do.

Every batch is a function of (seed, step): a stage that was stopped goes on as if it had not been. On a GPU the stages
take as many steps, with larger batches.
"""

from __future__ import annotations

from fewstep.pretrain.run import PretrainResult, pretrain

__all__ = ["PretrainResult", "pretrain"]

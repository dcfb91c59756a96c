"""The first stage of the embedded base: an `AutoencoderKL` from 128 × 128 pictures to 16 × 16 × 4 latents."""

from __future__ import annotations

import copy

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from fewstep.scenes.layout import SIZE

KL_WEIGHT = 1e-4
"""Weight of the mean KL per latent value. Leaves posterior noise of a few per cent: the decoder learns to
bear small errors of the UNet, at a cost of about 0.2 dB."""

SIZES: dict[str, dict[str, object]] = {
    "full": {"block_out_channels": (16, 32, 64, 128), "layers_per_block": 1, "norm_num_groups": 8},
    "tiny": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
}


def build_vae(size: str) -> AutoencoderKL:
    """An untrained VAE with factor 8 and 4 latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=SIZE,
        scaling_factor=1.0,
        **SIZES[size],
    )


def to_pixels(batch: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] to fp32 [N, 3, H, W] in −1…1."""
    return torch.from_numpy(np.array(batch)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def vae_losses(vae: AutoencoderKL, pixels: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Reconstruction and KL losses for pixels [B, 3, H, W] in −1…1 and posterior noise [B, 4, H/8, W/8]."""
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.mean.float() + posterior.std.float() * noise
    error = vae.decode(latents).sample.float() - pixels
    mse = error.square().mean()
    kl = posterior.kl().mean() / latents[0].numel()
    return {"loss": mse + 0.1 * error.abs().mean() + KL_WEIGHT * kl, "mse": mse, "kl": kl}


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> AutoencoderKL:
    """Give every latent channel mean 0 and std 1 by folding (z − mean) / std into the 1×1 convolutions.

    Args:
        mean, std: per-channel statistics [4] of the latents before.

    Returns:
        A copy of `vae` whose encoder emits standardised latents and whose decoder takes them.
    """
    folded = copy.deepcopy(vae)
    channels = len(mean)
    quant, post = folded.quant_conv, folded.post_quant_conv
    assert isinstance(quant, nn.Conv2d) and quant.bias is not None
    assert isinstance(post, nn.Conv2d) and post.bias is not None
    # quant_conv emits [mean | log variance]: scale the means, shift the log variances by −2 log std.
    quant.weight[:channels] /= std.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    # post_quant_conv(std·z + mean) = (W·std)·z + (b + W·mean).
    post.bias += torch.einsum("oi,i->o", post.weight[:, :, 0, 0], mean)
    post.weight *= std.view(1, -1, 1, 1)
    return folded

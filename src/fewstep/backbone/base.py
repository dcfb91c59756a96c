"""A base model: its frozen networks, its noise schedule, and the few things that are done with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..quiet import quiet_libraries
from ..transfer import upload
from .compiled import UNetCall, eager
from .threads import in_parts, is_small, whole

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from ..schedule import NoiseSchedule
    from ..solver import Denoiser
    from .registry import Abilities


@dataclass(frozen=True, eq=False, kw_only=True)
class Backbone:
    """A text-to-image latent diffusion model of Stable Diffusion's make; its own weights never change.

    Attributes:
        name: the base as it was asked for: a Hub id, a path, or a registered name.
        why: where that name came from, in a few words.
        unet, vae, text_encoder, tokenizer: Stable Diffusion's parts. Weights are in `dtype`, without gradients, in
            evaluation mode; adapters are attached to `unet` in fp32. A VAE that overflows in `dtype` is in fp32.
        scheduler_config: the base's own, with the prediction type that is in force.
        schedule: its noise schedule, on `device`.
        device, dtype: where and in which precision the networks run; fp32, fp16 or bf16.
        guidance_scale: the teacher's guidance where none is asked for.
        resolution: side of the pictures in pixels where none is asked for.
        teacher_steps: DDIM steps of the teacher where none are asked for.
        abilities: what the base can do besides; None for most.
        fingerprint: 32 hexadecimal digits that change with the base's weights and configurations.
        revision: of the Hub's repository, if one was asked for.
        compiled: what the denoiser calls in the UNet's place: a compiled form of it. None for the UNet itself.
    """

    name: str
    why: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]
    schedule: NoiseSchedule
    device: torch.device
    dtype: torch.dtype
    guidance_scale: float
    resolution: int
    teacher_steps: int
    abilities: Abilities | None
    fingerprint: str
    revision: str | None = None
    compiled: UNetCall | None = None

    def __post_init__(self) -> None:
        for network in (self.unet, self.vae, self.text_encoder):
            network.eval().requires_grad_(False)

    @property
    def downscale(self) -> int:
        """Pixels a side of a latent pixel: the VAE's factor, 8."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a square picture; without `resolution`, at the base's own."""
        side = (self.resolution if resolution is None else resolution) // self.downscale
        return int(self.unet.config.in_channels), side, side

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt that the text encoder sees, the two special ones included."""
        return min(int(self.tokenizer.model_max_length), int(self.text_encoder.config.max_position_embeddings))

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, L, D] fp32 of `prompts`, in one call; longer ones are cut: see `token_overflow`."""
        self._wake(self.text_encoder)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        embeddings: Tensor = self.text_encoder(upload(tokens.input_ids, self.device))[0]
        return embeddings.float()

    def token_overflow(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens at the end of each prompt the text encoder does not see; 0 where it sees all."""
        with quiet_libraries():  # the tokenizer warns on long texts, which is what we are counting
            lengths = [len(tokens) for tokens in self.tokenizer(list(prompts), truncation=False).input_ids]
        return [max(0, length - self.max_tokens) for length in lengths]

    def unread(self, prompts: Sequence[str]) -> list[str]:
        """The text at the end of each prompt that the text encoder does not see, as its tokens spell it; mostly ''."""
        with quiet_libraries():
            tokens = self.tokenizer(list(prompts), truncation=False).input_ids
        # What is kept ends with the end token, as the whole does.
        return [self.tokenizer.decode(one[self.max_tokens - 1 : -1]).strip() for one in tokens]

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, 4, h, w] fp32 of `pixels`, scaled as the UNet wants them; never clamped.

        Args:
            pixels: [B, 3, H, W] in -1..1.
            noise: standard normal [B, 4, h, w] with which to draw from the VAE's posterior; its mean without.
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        def forward(pixels: Tensor) -> Tensor:
            moments: Tensor = self.vae.encode(pixels).latent_dist.parameters
            return moments

        self._wake(self.vae)
        run = in_parts if is_small(self.vae) else whole
        posterior = DiagonalGaussianDistribution(run(forward, (pixels.to(self.device, self._vae_dtype),)))
        latents: Tensor = posterior.mean.float()
        if noise is not None:
            latents = latents + posterior.std.float() * noise.to(self.device)
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] fp32 in 0..1 of scaled `latents` [B, 4, h, w]."""

        def forward(unscaled: Tensor) -> Tensor:
            pixels: Tensor = self.vae.decode(unscaled, return_dict=False)[0]
            return pixels

        self._wake(self.vae)
        unscaled = latents.to(self.device) / self.vae.config.scaling_factor
        run = in_parts if is_small(self.vae) else whole
        return (run(forward, (unscaled.to(self._vae_dtype),)).float() / 2 + 0.5).clamp(0, 1)

    @property
    def _vae_dtype(self) -> torch.dtype:
        """`dtype`, or fp32 where that is too narrow for the VAE: see `steady_vae`."""
        found: torch.dtype = next(self.vae.parameters()).dtype
        return found

    def use_channels_last(self) -> None:
        """Keep the weights of UNet and VAE in the memory order channels-last; what they compute stays the same."""
        for network in (self.unet, self.vae):
            network.to(memory_format=torch.channels_last)

    @property
    def is_channels_last(self) -> bool:
        return bool(self.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last))

    def rest(self, network: nn.Module) -> None:
        """Take the VAE or the text encoder off the device; it is back when it is asked for anything."""
        if self.device.type != "cpu":
            network.to("cpu")

    def _wake(self, network: nn.Module) -> None:
        if next(network.parameters()).device.type != self.device.type:
            network.to(self.device)

    def denoiser(self, adapter: bool = True) -> Denoiser:
        """The UNet as a function of x_t [B, C, H, W], t int64 [B], cond [B, L, D] to its raw output [B, C, H, W] fp32.

        Args:
            adapter: with the active adapter, the student; else with adapters off, the teacher, whatever is attached.
                Each call restores what it found. Around many teacher calls hold `adapters_off(unet)`, which makes the
                switching inside free.
        """

        call = self.compiled or eager(self.unet)
        run = in_parts if self.compiled is None and is_small(self.unet) else whole
        # Where all weights are in `dtype`, fused ones too, autocast would only take the norms through fp32.
        plain = not adapter or all(parameter.dtype == self.dtype for parameter in self.unet.parameters())

        def forward(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            if plain:
                return call(x_t.to(self.dtype), t, cond.to(self.dtype))
            with self.autocast():
                return call(x_t, t, cond)

        def denoise(x_t: Tensor, t: Tensor, cond: Tensor, /) -> Tensor:
            with nullcontext() if adapter else adapters_off(self.unet):
                return run(forward, (x_t, t, cond), self.unet.parameters()).float()

        return denoise

    def adapters_off(self) -> AbstractContextManager[None]:
        """`adapters_off` of the UNet: the base alone inside, computed as the student is."""
        return adapters_off(self.unet)

    def autocast(self) -> AbstractContextManager[Any]:
        """Run networks in `dtype`: weights kept in fp32, the adapter's, are cast on the way; nothing at fp32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def pipeline(self) -> StableDiffusionPipeline:
        """A stock StableDiffusionPipeline around these very modules, with the teacher's scheduler."""
        with quiet_libraries():
            from diffusers import DDIMScheduler, StableDiffusionPipeline

            return StableDiffusionPipeline(
                vae=self.vae,
                text_encoder=self.text_encoder,
                tokenizer=self.tokenizer,
                unet=self.unet,
                scheduler=DDIMScheduler.from_config(self.scheduler_config, timestep_spacing="trailing"),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )


@contextmanager
def adapters_off(unet: UNet2DConditionModel) -> Iterator[None]:
    """The base alone inside: every adapter is disabled, and afterwards as it was, `requires_grad` included.

    Nothing happens where no adapter is attached or where they are off already, so it can be nested. It has to be left
    before `backward()` of a loss of the student: recomputation under gradient checkpointing runs what is active then.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    attached = (module for module in unet.modules() if isinstance(module, BaseTunerLayer))
    first = next(attached, None) if getattr(unet, "peft_config", None) else None
    if first is None or first.disable_adapters:
        yield
        return
    layers = [first, *attached]
    try:
        for layer in layers:
            # What `unet.disable_adapters()` does, but for `requires_grad`, which takes 30 ms in which a GPU waits.
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False

"""The alignment model of the embedded base: a small `CLIPModel` trained on drawings and their captions."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPVisionConfig

from fewstep.quiet import quiet_libraries
from fewstep.scenes.layout import SIZE
from fewstep.scenes.text import forget_last_call, text_config

VISION_SIZES = {
    "full": {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 4, "num_attention_heads": 4},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
}
PROJECTION = 64
MEAN_STD = 0.5


def build_alignment_model(tokenizer: CLIPTokenizer, size: str) -> CLIPModel:
    """An untrained CLIP model for 128 × 128 pictures and the embedded base's words."""
    text = text_config(tokenizer, size)
    text.num_hidden_layers = min(2, text.num_hidden_layers)
    vision = CLIPVisionConfig(image_size=SIZE, patch_size=16, projection_dim=PROJECTION, **VISION_SIZES[size])
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=PROJECTION))


def save_alignment_model(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """A folder that the alignment metric opens exactly as it opens `openai/clip-vit-base-patch32`."""
    with quiet_libraries():
        model.half().save_pretrained(folder)
    forget_last_call(tokenizer)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[MEAN_STD] * 3,
        image_std=[MEAN_STD] * 3,
    ).save_pretrained(folder)
    model.float()


def alignment_losses(model: CLIPModel, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """CLIP's symmetric contrastive loss (Radford et al. 2021, figure 3) for pixels [B, 3, 128, 128] in −1…1."""
    output = model(pixel_values=pixels, input_ids=input_ids, attention_mask=attention_mask, return_loss=True)
    return {"loss": output.loss}

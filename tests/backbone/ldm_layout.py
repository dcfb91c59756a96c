"""Write a base in LDM layout, as single-file checkpoints of Stable Diffusion 1.5 are: the inverse of what is loaded."""

from __future__ import annotations

import re

from torch import Tensor

from fewstep.backbone import Backbone

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _resnet(rest: str) -> str:
    part, _, kind = rest.rpartition(".")
    return f"{RESNET[part]}.{kind}"


def _unet_key(key: str, layers: int, with_attention: set[str]) -> str:
    stem, _, kind = key.rpartition(".")
    if stem in ENDS:
        return f"{ENDS[stem]}.{kind}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", key):
        number = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{number}.{match[3] if number == 1 else _resnet(match[3])}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)", key)
    assert match is not None, key
    way, block, what, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if what == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}"
    if what == "upsamplers":
        place = 2 if f"up_blocks.{block}" in with_attention else 1
        return f"output_blocks.{block * (layers + 1) + layers}.{place}.{rest}"
    place = block * (layers + 1) + number + (1 if way == "down" else 0)
    kind = f"1.{rest}" if what == "attentions" else f"0.{_resnet(rest)}"
    return f"{'input' if way == 'down' else 'output'}_blocks.{place}.{kind}"


def _vae_key(key: str, blocks: int) -> str:
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    key = re.sub(r"encoder\.down_blocks\.(\d)\.resnets", r"encoder.down.\1.block", key)
    key = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", key)
    key = re.sub(r"decoder\.up_blocks\.(\d)\.resnets", lambda m: f"decoder.up.{blocks - 1 - int(m[1])}.block", key)
    key = re.sub(
        r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.up.{blocks - 1 - int(m[1])}.upsample", key
    )
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    for ours, theirs in ATTENTION.items():
        key = key.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    return key


def to_ldm(backbone: Backbone) -> dict[str, Tensor]:
    """All weights of `backbone` under the names of an LDM-layout file."""
    unet, vae, text = (part.state_dict() for part in (backbone.unet, backbone.vae, backbone.text_encoder))
    with_attention = {key.split(".attentions")[0] for key in unet if ".attentions." in key}
    layers, blocks = backbone.unet.config.layers_per_block, len(backbone.vae.config.block_out_channels)
    out = {f"model.diffusion_model.{_unet_key(key, layers, with_attention)}": value for key, value in unet.items()}
    for key, value in vae.items():
        name = f"first_stage_model.{_vae_key(key, blocks)}"
        linear = ".mid.attn_1." in name and value.ndim == 2
        out[name] = value[:, :, None, None] if linear else value  # LDM's attention is made of 1x1 convolutions
    for key, value in text.items():
        out[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    return {key: value.detach().clone().contiguous() for key, value in out.items()}

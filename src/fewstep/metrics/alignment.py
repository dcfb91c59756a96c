"""How well a picture fits its caption: the cosine of a CLIP model's image and text embeddings.

Reported as 100 x max(0, cos). Beside it stands its floor: the same pictures against everyone else's captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fewstep.metrics.pretrained import as_arrays, fingerprint, load_pretrained

TEXTS_AT_ONCE = 32


class CLIPAlignment:
    """A CLIP model by folder or Hub id, with its own tokenizer and image preprocessing (Pillow, no torchvision).

    Args:
        model: folder or Hub id in transformers' layout.
        device: where to run it; always in fp32, so that scores do not depend on the precision of a run.
        allow_pickle: also take weights that are not safetensors.
        fetch: whether a Hub id that is not in the cache is fetched.
        flag: that named it, for errors.
        name: how results speak of it, the beginning of its fingerprint added. None: as it was asked for.

    Attributes:
        logit_scale: what the model multiplies cosines with; PickScore's score is the product.
        fingerprint: of its weights.

    Raises:
        ModelNotAtHand: the weights are not at hand.
        CheckpointError: they are not those of a CLIP model.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: torch.device | str = "cpu",
        allow_pickle: bool = False,
        fetch: bool = True,
        flag: str = "--clip_model_id",
        name: str | None = None,
    ) -> None:
        # Heavy, and only needed by those who score pictures.
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        self.device = torch.device(device)
        self._model, self._tokenizer, self._processor = load_pretrained(
            str(model),
            CLIPModel,
            CLIPTokenizer,
            CLIPImageProcessorPil,
            flag=flag,
            allow_pickle=allow_pickle,
            fetch=fetch,
        )
        self.fingerprint = fingerprint(self._model)
        self.name = f"{name} ({self.fingerprint[:8]})" if name else str(model)
        self._model.to(self.device)
        self.logit_scale = float(self._model.logit_scale.exp())
        self._length = int(self._model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of unit length [P, D] fp32 on the CPU; what exceeds the model's length is cut (`overlong`)."""
        parts = []
        for first in range(0, len(prompts), TEXTS_AT_ONCE):
            tokens = self._tokenizer(
                list(prompts[first : first + TEXTS_AT_ONCE]),
                padding="max_length",
                max_length=self._length,
                truncation=True,
                return_tensors="pt",
            ).to(self.device)
            found = self._model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            parts.append(torch.nn.functional.normalize(found, dim=-1).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """Embeddings of unit length [B, D] fp32 on the CPU, of pixels [B, 3, H, W]: uint8, or floating in 0 ... 1."""
        inputs = self._processor(images=as_arrays(pixels), input_data_format="channels_last", return_tensors="pt")
        found = self._model.get_image_features(pixel_values=inputs["pixel_values"].to(self.device)).pooler_output
        return torch.nn.functional.normalize(found, dim=-1).cpu()

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine [B] of each picture with its own prompt."""
        return (self.images(pixels) * self.texts(prompts)).sum(dim=-1)

    def overlong(self, prompts: Sequence[str]) -> list[int]:
        """Numbers of the prompts that this model can only read in part."""
        lengths = [len(tokens) for tokens in self._tokenizer(list(prompts), truncation=False)["input_ids"]]
        return [number for number, length in enumerate(lengths) if length > self._length]


def align_x100(cosine: Tensor) -> Tensor:
    """The reported score: 100 x max(0, cos)."""
    return 100 * cosine.clamp_min(0)


def alignment_and_floor(
    images: Tensor, texts: Tensor, numbers: Sequence[int], prompts: Sequence[str]
) -> dict[str, Tensor]:
    """Each picture's score with its own caption and its mean score with all others: the shuffled-caption floor.

    The mean over all other captions is what shuffling gives on average, without the luck of one shuffle. Captions that
    read the same as a picture's own are nobody else's and do not count.

    Args:
        images: unit embeddings [B, D].
        texts: unit embeddings [P, D].
        numbers: which of the P prompts is whose, [B].
        prompts: the P texts.

    Returns:
        ``score`` [B], and ``floor`` [B] where there are two different prompts; both 0 ... 100.
    """
    scores = align_x100(images @ texts.T)  # [B, P]
    found = {"score": scores[torch.arange(len(numbers)), torch.tensor(list(numbers))]}
    if len(set(prompts)) > 1:
        foreign = torch.tensor([[prompts[number] != other for other in prompts] for number in numbers])
        found["floor"] = (scores * foreign).sum(dim=1) / foreign.sum(dim=1)
    return found

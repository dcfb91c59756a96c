"""The words of the embedded base: a CLIP tokenizer with a small vocabulary, and its text encoder.

The text encoder is trained before the UNet, to say every attribute that a caption names, and then frozen. Trained from
scratch together with the UNet it had not learnt to say where things stand after 192,000 pictures.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch.nn.functional as F
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fewstep.scenes.attributes import VALUES, Attributes
from fewstep.scenes.captions import PHRASINGS, write_caption

MAX_TOKENS = 48
_CLIP_WORDS = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
START, END = "<|startoftext|>", "<|endoftext|>"

TEXT_SIZES = {
    "full": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
}


def _every_word() -> list[str]:
    """Captions that together use every value in every phrasing."""
    longest = max(len(values) for values in VALUES.values())
    examples = [
        Attributes(**{name: values[i % len(values)] for name, values in VALUES.items()}) for i in range(longest)
    ]
    return [write_caption(example, phrasing) for example in examples for phrasing in range(len(PHRASINGS))]


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Train byte-level BPE with CLIP's rules on all caption words (each becomes one token) and save it.

    Any other text still has tokens, down to single bytes. The ids are the same in every process.
    """
    symbols = sorted(ByteLevel.alphabet())
    symbols += [symbol + "</w>" for symbol in symbols]
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>", unk_token=END))
    bpe.normalizer = Lowercase()
    words = Split(pattern=_CLIP_WORDS, behavior="removed", invert=True)
    bpe.pre_tokenizer = Sequence([words, ByteLevel(add_prefix_space=False)])
    trainer = BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        end_of_word_suffix="</w>",
        # Of equally frequent pairs the one with the lower ids is merged first. Symbols that are no special tokens would
        # be numbered as a hash table lists their words, which differs from one training to the next.
        special_tokens=symbols,
        show_progress=False,
    )
    bpe.train_from_iterator(_every_word(), trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokens = [*symbols, *("".join(merge) for merge in merges), START, END]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS, pad_token=END)
    tokenizer.save_pretrained(folder)
    return tokenizer


def forget_last_call(tokenizer: CLIPTokenizer) -> None:
    """Take back what its last call padded and cut to: saved with it, that would change what a base is told by."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()


def text_config(tokenizer: CLIPTokenizer, size: str) -> CLIPTextConfig:
    """The configuration of a small CLIP text transformer for this tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="quick_gelu",
        projection_dim=TEXT_SIZES[size]["hidden_size"],
        **TEXT_SIZES[size],
    )


def build_text_encoder(tokenizer: CLIPTokenizer, size: str) -> CLIPTextModel:
    """An untrained text encoder."""
    return CLIPTextModel(text_config(tokenizer, size))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [B, L], padded and cut to the base's context as a pipeline does it."""
    tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    ids: Tensor = tokens.input_ids
    return ids


class CaptionReader(nn.Module):
    """A text encoder with a linear head an attribute on its end-of-text state; the heads are thrown away."""

    def __init__(self, tokenizer: CLIPTokenizer, size: str) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer, size)
        width = self.text_encoder.config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in VALUES.items()})

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Tokens [B, L] to logits [B, values] by attribute."""
        state = self.text_encoder(input_ids).pooler_output
        return {name: head(state) for name, head in self.heads.items()}


def caption_losses(reader: CaptionReader, input_ids: Tensor, attributes: Tensor) -> dict[str, Tensor]:
    """Cross entropy of every attribute, for tokens [B, L] and attribute indices [B, A] in the order of `VALUES`."""
    logits = reader(input_ids)
    losses = [F.cross_entropy(logits[name].float(), attributes[:, i]) for i, name in enumerate(VALUES)]
    right = [(logits[name].argmax(1) == attributes[:, i]).float().mean() for i, name in enumerate(VALUES)]
    return {"loss": sum(losses[1:], start=losses[0]), "right": sum(right[1:], start=right[0]) / len(right)}

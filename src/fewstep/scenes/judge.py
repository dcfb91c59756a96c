"""The judge of the embedded base: reads every attribute off a picture, and its 64 features for distances.

One convolutional trunk with two heads. The *reader* classifies what a caption can ask for and counts
buildings and lights; the *features* are a 64-dimensional bottleneck from which all drawing parameters,
captioned or not, and the picture's sharpness and contrast are regressed, so that a distance between
feature distributions sees exactly what few sampling steps destroy. Over real drawings the features are
uncorrelated with variance 1: what hardly varies among real pictures, such as their sharpness, weighs the
more when it is off. It is trained on drawings and on VAE reconstructions of drawings, never on generated
pictures.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.files import write_tensors_atomic, write_text_atomic
from fewstep.scenes.attributes import VALUES
from fewstep.scenes.drawings import Drawing

FEATURES = 64
SOFTNESS = 2
"""How many of the regressed parameters tell how soft a picture is: sharpness and contrast, the last ones."""
COUNTED = ("birds", "flowers")
CLASSES: dict[str, int] = {name: len(values) + (name in COUNTED) for name, values in VALUES.items()}
"""Classes a head tells apart; a counted thing has one more, for four or more."""
CLASSES |= {"buildings": 3, "lights": 3}  # none, one, two or more
IGNORED = -100  # a label that a flawed drawing leaves undefined, e.g. the kind of two moons

WIDTHS = {"full": (24, 48, 96, 128), "tiny": (8, 8, 16, 16)}


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Judge(nn.Module):
    """Pictures in, attribute logits and features out.

    Args:
        size: "full" or "tiny".
        parameters: number of drawing parameters that the features are trained to regress.
    """

    def __init__(self, size: str, parameters: int) -> None:
        super().__init__()
        a, b, c, d = WIDTHS[size]
        self.edges = nn.Conv2d(3, a, 5, stride=2, padding=2)
        self.to_16 = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(a, b, 3, stride=2, padding=1),
            _Residual(b),
            nn.Conv2d(b, c, 3, stride=2, padding=1),
            _Residual(c),
        )
        self.to_8 = nn.Sequential(nn.Conv2d(c, d, 3, stride=2, padding=1), _Residual(d))
        self.squeeze = nn.Conv2d(d, 32, 1)
        # Flattened places tell where things are, pooled maps how many there are, the edges' energies how sharp they
        # are: a blur divides fine ones by more than coarse ones, which in their logarithms is a difference.
        self.merge = nn.Sequential(nn.Linear(32 * 64 + a + c + d, 256), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, count) for name, count in CLASSES.items()})
        self.bottleneck = nn.Linear(256, FEATURES)
        self.regression = nn.Linear(FEATURES, parameters)

    def _embed(self, pixels: Tensor) -> Tensor:
        edges = self.edges(pixels * 2 - 1)
        at_16 = self.to_16(edges)
        at_8 = self.to_8(at_16)
        energies = (edges.float().var((2, 3)) + 1e-4).log()
        parts = [self.squeeze(at_8).flatten(1), energies, F.silu(at_16).mean((2, 3)), F.silu(at_8).mean((2, 3))]
        embedding: Tensor = self.merge(torch.cat(parts, 1))
        return embedding

    def forward(self, pixels: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Pixels [B, 3, 128, 128] in 0…1 to logits by attribute, features [B, 64], parameters [B, P]."""
        embedding = self._embed(pixels)
        features = self.bottleneck(embedding)
        return {name: head(embedding) for name, head in self.heads.items()}, features, self.regression(features)


Found = tuple[dict[str, Tensor], Tensor, Tensor]
"""What a judge finds in pictures: logits by attribute, features, parameters."""


class Glance(nn.Module):
    """A finished judge. Of the pictures that it saw last it tells again what it saw: several ask for each batch."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge
        self._last: tuple[Tensor, Found] | None = None

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Found:
        """As the judge."""
        if self._last is None or not torch.equal(self._last[0], pixels):
            self._last = (pixels.clone(), self.judge(pixels))
        return self._last[1]


class Features(nn.Module):
    """The judge as a feature extractor: pixels [B, 3, 128, 128] in 0…1 to [B, 64]."""

    num_features = FEATURES

    def __init__(self, judge: Glance) -> None:
        super().__init__()
        self.judge = judge

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.judge(pixels)[1]
        return features.float().clone()  # whoever asks has their own: files take no two names for one tensor


def read(logits: dict[str, Tensor]) -> dict[str, Tensor]:
    """The most likely class of every head: int64 [B] by name."""
    return {name: each.argmax(1) for name, each in logits.items()}


def labels(drawing: Drawing) -> dict[str, int]:
    """The class of every head for one drawing; IGNORED where a flaw leaves no single answer."""
    layout = drawing.layout
    found = dict(zip(VALUES, drawing.attributes.indices(), strict=True))
    if len(layout.buildings) != 1:
        found |= dict.fromkeys(("building", "colour", "place", "windows"), IGNORED)
    if len(layout.lights) != 1:
        found["light"] = IGNORED
    found["birds"] = int((layout.birds[:, 0] == layout.birds[:, 0]).sum())
    found["flowers"] = int((layout.flowers[:, 0] == layout.flowers[:, 0]).sum())
    return found | {"buildings": len(layout.buildings), "lights": len(layout.lights)}


def answers(found: dict[str, Tensor], wanted: list[dict[str, str]]) -> dict[str, Tensor]:
    """Which pictures show what their captions ask for.

    Args:
        found: readings [B] by head.
        wanted: the attributes that each caption names; one it leaves open counts as right.

    Returns:
        Booleans [B]: one entry an attribute, "intact" (one building, one light) and "all_right".
    """
    result = {}
    for name, values in VALUES.items():
        asked = torch.tensor([values.index(want[name]) if name in want else -1 for want in wanted])
        result[name] = (found[name].cpu() == asked) | (asked < 0)
    result["intact"] = (found["buildings"].cpu() == 1) & (found["lights"].cpu() == 1)
    result["all_right"] = torch.stack(list(result.values())).all(0)
    return result


def judge_losses(judge: Judge, pixels: Tensor, targets: dict[str, Tensor], parameters: Tensor) -> dict[str, Tensor]:
    """Cross entropy over the heads plus the mean squared errors of what a picture was drawn from and how soft it is.

    The two numbers of softness weigh as much as all others together: a hundredth of the loss never gets learnt.

    Args:
        pixels: [B, 3, 128, 128] in 0…1.
        targets: class indices [B] by head, IGNORED where undefined.
        parameters: [B, P] with mean 0 and std 1, NaN where a picture does not show them; the last `SOFTNESS` are its
            sharpness and contrast.
    """
    logits, _, guessed = judge(pixels)
    reading = torch.stack([F.cross_entropy(logits[n].float(), targets[n], ignore_index=IGNORED) for n in CLASSES]).sum()
    known = parameters.isfinite()
    errors = (guessed.float() - parameters.nan_to_num()).square() * known
    drawn, soft = (
        part.sum() / some.sum().clamp(min=1)
        for part, some in ((errors[:, :-SOFTNESS], known[:, :-SOFTNESS]), (errors[:, -SOFTNESS:], known[:, -SOFTNESS:]))
    )
    return {"loss": reading + 2 * drawn + 2 * soft, "reading": reading, "regression": drawn, "softness": soft}


@torch.no_grad()
def whiten_features(judge: Judge, features: Tensor) -> None:
    """Make the covariance of real pictures' `features` [N, 64] the identity and their mean 0, by folding it in.

    With f = W e + b, mean μ and covariance V Λ Vᵀ, the bottleneck becomes S (W e + b − μ), S = V Λ^{−½} Vᵀ, and the
    regression takes S⁻¹ back, so that it predicts what it did.
    """
    exact = features.double()
    centre = exact.mean(0)
    spread, axes = torch.linalg.eigh(torch.cov(exact.T))
    root = spread.clamp(min=1e-6 * float(spread.max())).sqrt()
    shrink, stretch = axes @ torch.diag(1 / root) @ axes.T, axes @ torch.diag(root) @ axes.T
    narrow, wide = judge.bottleneck, judge.regression
    wide.bias.add_((wide.weight.double() @ centre).float())
    wide.weight.copy_((wide.weight.double() @ stretch).float())
    narrow.bias.copy_((shrink @ (narrow.bias.double() - centre)).float())
    narrow.weight.copy_((shrink @ narrow.weight.double()).float())


def gaussian_blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Blur each picture [B, 3, H, W] with its own standard deviation [B] in pixels (0: unchanged)."""
    batch, channels, height, width = pixels.shape
    reach = torch.arange(-4, 5, dtype=pixels.dtype, device=pixels.device)
    kernel = torch.exp(-0.5 * (reach / sigma.clamp(min=1e-3)[:, None]).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    stacked = F.pad(pixels.reshape(1, batch * channels, height, width), (4, 4, 4, 4), mode="replicate")
    stacked = F.conv2d(stacked, kernel[:, None, None, :], groups=batch * channels)
    stacked = F.conv2d(stacked, kernel[:, None, :, None], groups=batch * channels)
    return stacked.reshape(batch, channels, height, width)


def soften(pixels: Tensor, sigma: Tensor, contrast: Tensor) -> Tensor:
    """Blur by `sigma` [B] pixels and scale the contrast about each picture's mean by `contrast` [B]."""
    blurred = gaussian_blur(pixels, sigma)
    mean = blurred.mean((1, 2, 3), keepdim=True)
    return ((blurred - mean) * contrast.view(-1, 1, 1, 1) + mean).clamp(0, 1)


def save_judge(judge: Judge, size: str, folder: Path) -> None:
    """The judge's weights in fp16 and what is needed to build it again."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half() for name, value in judge.state_dict().items()}
    write_tensors_atomic(folder / "model.safetensors", weights)
    config = {"size": size, "parameters": judge.regression.out_features}
    write_text_atomic(folder / "config.json", json.dumps(config) + "\n")


def load_judge(folder: Path, device: torch.device | str = "cpu") -> Judge:
    """The judge as `save_judge` wrote it, in fp32."""
    judge = Judge(**json.loads((folder / "config.json").read_text()))
    judge.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    return judge.to(device).eval().requires_grad_(False)

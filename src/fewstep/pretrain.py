"""`fewstep pretrain`: the embedded base and its judges, rebuilt from nothing in four resumable stages.

1. vae: drawings to latents and back;
2. judges: the reader with its features, and the alignment model;
3. denoiser: the text encoder, then the UNet on cached latents;
4. refine: the UNet's training goes on under a second learning rate curve, then the figures that say what the base can
   do.

Every batch is a function of (seed, step): a stage that was stopped goes on as if it had not been. On a GPU the stages
take as many steps, with larger batches.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from fewstep.backbone import choose_device, load_backbone
from fewstep.config import PretrainSettings
from fewstep.files import write_text_atomic
from fewstep.proving import draw_arm, prove_base, untrained_arm
from fewstep.randomness import generator
from fewstep.reporting import SILENT, Reporter
from fewstep.scenes import measure
from fewstep.scenes.abilities import SceneAbilities
from fewstep.scenes.alignment import alignment_losses, build_alignment_model, save_alignment_model
from fewstep.scenes.attributes import sample_attributes
from fewstep.scenes.captions import random_caption
from fewstep.scenes.denoiser import CAPTION_DROPOUT, SCHEDULER, Denoiser, denoiser_losses, latents_of
from fewstep.scenes.drawings import (
    drawn_in_chunks,
    drawn_pixels,
    flawed_drawings,
    numbered_attributes,
    numbered_drawing,
)
from fewstep.scenes.export import save_base, save_defaults
from fewstep.scenes.judge import CLASSES, SOFTNESS, Judge, judge_losses, labels, save_judge, soften, whiten_features
from fewstep.scenes.landmarks import numbered_landmarks, standardised_levels
from fewstep.scenes.layout import FLAWS, parameters
from fewstep.scenes.loop import Loss, Make, Plan, averaged, batch_indices, run
from fewstep.scenes.text import CaptionReader, build_tokenizer, caption_losses, tokenize
from fewstep.scenes.vae import build_vae, fold_latent_statistics, to_pixels, vae_losses
from fewstep.schedule import NoiseSchedule

GUIDANCE = 4.0
"""The teacher's default: the strongest that still gets about as much right as the best of GUIDANCES. It costs some
distance to real pictures, as Stable Diffusion's 7.5 does, and is what few steps without training cannot follow."""

GUIDANCES = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
"""What the figures compare it with."""

WHITENED = 4_096
"""Drawings over which the judge's features are made uncorrelated with variance 1."""

STAGES = ("vae", "judges", "denoiser", "refine")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much each stage draws and trains."""

    drawings: int
    latents: int
    flawed: int
    reconstructed: int
    tested: int
    swept: int
    proved: int
    larger_on_gpu: int  # how many times as large a batch
    minutes: dict[str, int]  # by stage, on two cores with bf16 matrix units; without them about twice that
    vae: Plan
    judge: Plan
    alignment: Plan
    text: Plan
    denoiser: Plan
    refine: Plan


SIZES = {
    "full": Sizes(
        drawings=20_000,
        latents=40_000,
        flawed=6_000,
        reconstructed=10_000,
        tested=2_000,
        swept=200,
        proved=256,
        larger_on_gpu=8,
        minutes={"vae": 35, "judges": 20, "denoiser": 80, "refine": 85},
        vae=Plan(steps=4_200, batch_size=8, learning_rate=2e-3, ema_decay=0.998),
        judge=Plan(steps=2_200, batch_size=64, parts=2, learning_rate=2e-3),
        alignment=Plan(steps=500, batch_size=96, learning_rate=1e-3),
        text=Plan(steps=400, batch_size=64, learning_rate=1e-3, ema_decay=0.98),
        denoiser=Plan(steps=4_900, batch_size=64, parts=2, learning_rate=2e-3, ema_decay=0.999),
        refine=Plan(steps=4_500, batch_size=64, parts=2, learning_rate=1.5e-3, ema_decay=0.999),
    ),
    "tiny": Sizes(
        drawings=64,
        latents=96,
        flawed=24,
        reconstructed=32,
        tested=16,
        swept=4,
        proved=8,
        larger_on_gpu=1,
        minutes=dict.fromkeys(STAGES, 1),
        vae=Plan(steps=20, batch_size=4, learning_rate=2e-3, ema_decay=0.9),
        judge=Plan(steps=10, batch_size=8, parts=2, learning_rate=2e-3, ema_decay=0.9),
        alignment=Plan(steps=6, batch_size=8, learning_rate=1e-3, ema_decay=0.9),
        text=Plan(steps=6, batch_size=8, learning_rate=1e-3, ema_decay=0.9),
        denoiser=Plan(steps=20, batch_size=8, parts=2, learning_rate=1e-3, ema_decay=0.9),
        refine=Plan(steps=10, batch_size=8, parts=2, learning_rate=1e-3, ema_decay=0.9),
    ),
}


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """Where the base was written, and what it can do."""

    folder: Path
    figures: dict[str, Any]


def pretrain(settings: PretrainSettings, *, reporter: Reporter = SILENT) -> PretrainResult:
    """Train the stages asked for and write `base/`, `judge/`, `alignment/` and `figures.json` to the output folder."""
    reporter.say("settings: " + ", ".join(f"{name}={value}" for name, value in settings))
    work = _Workshop(settings, reporter)
    stages = STAGES if settings.stage == "all" else (settings.stage,)
    for stage in stages:
        minutes = work.sizes.minutes[stage]
        fewer = "" if work.device.type == "cpu" else f", far fewer on {work.device}"
        reporter.say(f"{stage}: about {minutes} minutes on two cores{fewer}; stopped, it goes on from its last save")
        started = time.monotonic()
        train = {"vae": work.train_vae, "judges": work.train_judges, "denoiser": work.train_denoiser}
        train |= {"refine": work.refine_denoiser}
        figures = train[stage]()
        taken = (time.monotonic() - started) / 60
        work.record(stage, figures | {"minutes_of_the_last_run": round(taken, 1)})
    return PretrainResult(folder=settings.output_dir, figures=work.figures)


class _Workshop:
    """The stages, and what they hand to one another through the output folder."""

    def __init__(self, settings: PretrainSettings, reporter: Reporter) -> None:
        self.settings, self.reporter = settings, reporter
        self.sizes, self.size, self.seed = SIZES[settings.size], settings.size, settings.seed
        self.out, self.work = settings.output_dir, settings.output_dir / "work"
        self.device = choose_device(settings.device)
        self.fast = _bf16(settings, self.device)
        self.card = self.out / "figures.json"
        self.figures: dict[str, Any] = json.loads(self.card.read_text()) if self.card.exists() else {}

    # Three disjoint streams of drawings: trained on, tested on, tested on and of held-out combinations.
    @property
    def train_seed(self) -> int:
        return self.seed

    @property
    def test_seed(self) -> int:
        return self.seed + 1_000_003

    def record(self, stage: str, figures: dict[str, Any]) -> None:
        command = f"fewstep pretrain --size {self.size} --stage {stage} --seed {self.seed}"
        self.figures[stage] = {"command": command, "device": self.device.type, "bf16": self.fast} | figures
        write_text_atomic(self.card, json.dumps(self.figures, indent=1) + "\n")
        for name, value in self.figures[stage].items():
            self.reporter.say(f"{stage}: {name} = {value}")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, self.fast)

    def plan(self, stage: str) -> Plan:
        """How a stage, or a model of it, is trained on the device at hand."""
        plan: Plan = getattr(self.sizes, stage)
        if self.device.type == "cpu":
            return plan
        return replace(plan, batch_size=plan.batch_size * self.sizes.larger_on_gpu, parts=1)

    def run(self, module: nn.Module, make: Make, loss: Loss, plan: Plan, name: str) -> nn.Module:
        """Train `module` under autocast in the folder `name`; it stays on the device."""

        def cast(*batch: Any) -> dict[str, Tensor]:
            with self.autocast():
                return loss(*batch)

        return run(module, make, cast, plan, self.work / name, self.reporter, self.device)

    def drawings(self) -> np.ndarray:
        self.reporter.say(f"drawing {self.sizes.drawings} pictures")
        return drawn_pixels(self.train_seed, self.sizes.drawings, self.work / "drawings.npy")

    # ------------------------------------------------------------------------------------------------------------ vae

    def train_vae(self) -> dict[str, Any]:
        pixels, plan = self.drawings(), self.plan("vae")
        torch.manual_seed(self.seed)
        vae = build_vae(self.size)

        def make(step: int, _part: int) -> tuple[Tensor, Tensor]:
            batch = to_pixels(pixels[np.sort(batch_indices(self.seed, step, plan.batch_size, len(pixels)).numpy())])
            if step % 2:  # a mirrored landscape is as good
                batch = batch.flip(-1)
            noise = torch.randn(plan.batch_size, 4, 16, 16, generator=generator(self.seed, "posterior", step))
            return batch, noise

        self.run(vae, make, partial(vae_losses, vae), plan, "vae")
        with self.autocast():
            latents = latents_of(vae, to_pixels(pixels[:1024]))
        vae = fold_latent_statistics(vae.cpu(), latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
        vae.save_pretrained(self.work / "vae" / "folded")
        test = drawn_pixels(self.test_seed, self.sizes.tested)
        return {"psnr_db": measure.psnr(vae, test), "latent_std": latents.std((0, 2, 3)).tolist()}

    def load_vae(self) -> AutoencoderKL:
        folder = self.work / "vae" / "folded"
        if not folder.exists():
            raise FileNotFoundError(f"{folder} is not there; run --stage vae first")
        return AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False).to(self.device)

    # --------------------------------------------------------------------------------------------------------- judges

    def train_judges(self) -> dict[str, Any]:
        vae = self.load_vae()
        figures = self._train_judge(vae)
        return figures | self._train_alignment()

    def _train_judge(self, vae: AutoencoderKL) -> dict[str, Any]:
        sizes, plan = self.sizes, self.plan("judge")
        total = sizes.drawings + sizes.flawed
        kinds = [None] * sizes.drawings + [FLAWS[i % len(FLAWS)] for i in range(sizes.flawed)]
        with self.reporter.progress("labels", total) as bar:
            examples = []
            pixels = np.empty((total, 128, 128, 3), np.uint8)
            for index, drawing in enumerate(flawed_drawings(self.train_seed, kinds)):
                pixels[index] = drawing.pixels
                examples.append((labels(drawing), parameters(drawing.attributes, drawing.layout)))
                bar.advance()
        targets = {name: torch.tensor([label[name] for label, _ in examples]) for name in CLASSES}
        numbers = torch.from_numpy(np.stack([numbers for _, numbers in examples]))
        known = numbers.isfinite()
        centre = numbers.nan_to_num().sum(0) / known.sum(0)
        spread = ((numbers - centre).nan_to_num().square().sum(0) / known.sum(0)).sqrt().clamp(min=1e-3)
        # Pictures beyond `total` are reconstructions of an even spread of those before.
        source = torch.linspace(0, total - 1, sizes.reconstructed).long()
        with self.autocast():
            rebuilt = measure.reconstruct(vae, pixels[source.numpy()])
        everything = np.concatenate([pixels, rebuilt])
        origin = torch.cat([torch.arange(total), source])
        torch.manual_seed(self.seed)
        judge = Judge(self.size, numbers.shape[1] + SOFTNESS)

        def make(step: int, part: int) -> tuple[Any, ...]:
            picked = batch_indices(self.seed, step, plan.batch_size, len(everything)).chunk(plan.parts)[part]
            picked = picked.sort().values
            random = generator(self.seed, "soften", step, part)
            soft = torch.rand(len(picked), generator=random) < 0.4
            sigma = torch.rand(len(picked), generator=random) * 1.6 * soft
            contrast = 1 + (torch.rand(len(picked), generator=random) - 0.5) * 0.4 * soft
            rows = origin[picked]
            # A reconstruction's own blur is unknown: its sharpness is not regressed.
            sharpness = torch.where(picked < total, (sigma - 0.3) / 0.5, torch.nan)
            softness = torch.stack([sharpness, (contrast - 1) / 0.07], 1)
            wanted = torch.cat([(numbers[rows] - centre) / spread, softness], 1)
            asked = {name: values[rows] for name, values in targets.items()}
            return torch.from_numpy(everything[picked.numpy()]), sigma, contrast, asked, wanted

        def loss(
            batch: Tensor, sigma: Tensor, contrast: Tensor, asked: dict[str, Tensor], wanted: Tensor
        ) -> dict[str, Tensor]:
            softened = soften(batch.permute(0, 3, 1, 2).float() / 255, sigma, contrast)
            return judge_losses(judge, softened, asked, wanted)

        self.run(judge, make, loss, plan, "judge")
        judge.cpu()
        real = to_pixels(pixels[: min(sizes.drawings, WHITENED)])
        whiten_features(judge, torch.cat([judge((some + 1) / 2)[1] for some in real.split(64)]))
        save_judge(judge, self.size, self.out / "judge")
        test = [numbered_drawing(self.test_seed, index, "unseen") for index in range(sizes.tested)]
        return measure.reading(judge, vae, test)

    def _train_alignment(self) -> dict[str, Any]:
        plan = self.plan("alignment")
        pixels = self.drawings()
        tokenizer = build_tokenizer(self.work / "tokenizer")
        torch.manual_seed(self.seed)
        model = build_alignment_model(tokenizer, self.size)

        def make(step: int, _part: int) -> tuple[Tensor, ...]:
            picked = batch_indices(self.seed + 1, step, plan.batch_size, len(pixels)).sort().values.tolist()
            tokens = tokenizer(self._captions(step, picked), padding=True, return_tensors="pt")
            return to_pixels(pixels[picked]), tokens.input_ids, tokens.attention_mask

        self.run(model, make, partial(alignment_losses, model), plan, "alignment")
        save_alignment_model(model.cpu(), tokenizer, self.out / "alignment")
        curve = (self.work / "alignment" / "curve.jsonl").read_text().splitlines()
        return {"alignment_loss": json.loads(curve[-1])["loss"]}

    def _captions(self, step: int, picked: list[int]) -> list[str]:
        """A caption of each drawing, in a phrasing drawn anew each step."""
        rng = np.random.default_rng((self.seed, step, 2))
        return [random_caption(rng, numbered_attributes(self.train_seed, index)) for index in picked]

    # ------------------------------------------------------------------------------------------------------- denoiser

    def train_denoiser(self) -> dict[str, Any]:
        denoiser = self._untrained_denoiser(self._train_text())
        self._train_unet(denoiser, "denoiser", self.plan("denoiser"), self.seed)
        return self._fresh_loss(denoiser)

    def refine_denoiser(self) -> dict[str, Any]:
        """Go on from the averaged weights with fresh moments, other batches and noise."""
        denoiser = self._untrained_denoiser(CaptionReader(self.tokenizer, self.size).text_encoder)
        denoiser.load_state_dict(averaged(self.work / "denoiser"))
        self._train_unet(denoiser, "refine", self.plan("refine"), self.seed + 1)
        denoiser.landmarks.detach()
        save_base(self.load_vae().cpu(), denoiser.cpu(), self.tokenizer, SCHEDULER, self.out / "base")
        return self._fresh_loss(denoiser) | self._prove()

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return build_tokenizer(self.work / "tokenizer")

    def _untrained_denoiser(self, text_encoder: CLIPTextModel) -> Denoiser:
        torch.manual_seed(self.seed)
        return Denoiser(text_encoder, self.size)

    def _train_unet(self, denoiser: Denoiser, name: str, plan: Plan, seed: int) -> None:
        latents = self._cached_latents(self.load_vae())
        landmarks = standardised_levels(numbered_landmarks(self.train_seed, len(latents)))
        schedule = NoiseSchedule.from_config(SCHEDULER).to(self.device)
        denoiser.use_plain_attention(self.fast and self.device.type == "cpu")

        def make(step: int, part: int) -> tuple[Any, ...]:
            picked = batch_indices(seed, step, plan.batch_size, len(latents)).chunk(plan.parts)[part]
            random = generator(seed, "denoiser", step, part)
            noise = torch.randn(len(picked), *latents.shape[1:], generator=random)
            t = torch.randint(schedule.num_train_timesteps, (len(picked),), generator=random)
            dropped = torch.rand(len(picked), generator=random) < CAPTION_DROPOUT
            captions = self._captions(step, picked.tolist())
            captions = ["" if drop else caption for drop, caption in zip(dropped.tolist(), captions, strict=True)]
            clean, ids = latents[picked].float(), tokenize(self.tokenizer, captions)
            return clean, noise, t, ids, [level[picked] for level in landmarks], ~dropped

        self.run(denoiser, make, partial(denoiser_losses, denoiser, schedule), plan, name)
        denoiser.use_plain_attention(False)

    def _train_text(self) -> CLIPTextModel:
        """A text encoder whose end-of-text state says every attribute of its caption."""
        plan = self.plan("text")
        torch.manual_seed(self.seed)
        reader = CaptionReader(self.tokenizer, self.size)

        def make(step: int, _part: int) -> tuple[Tensor, Tensor]:
            rng = np.random.default_rng((self.seed, step, 6))
            drawn = [sample_attributes(rng) for _ in range(plan.batch_size)]
            ids = tokenize(self.tokenizer, [random_caption(rng, attributes) for attributes in drawn])
            return ids, torch.tensor([attributes.indices() for attributes in drawn])

        self.run(reader, make, partial(caption_losses, reader), plan, "text")
        return reader.text_encoder

    def _fresh_loss(self, denoiser: Denoiser) -> dict[str, Any]:
        """Overfitting: the loss on drawings never trained on over that on trained ones, same noise and timesteps."""
        vae = self.load_vae()
        latents = self._cached_latents(vae)
        count = min(1024, len(latents), self.sizes.tested)
        denoiser.to(self.device)
        schedule = NoiseSchedule.from_config(SCHEDULER).to(self.device)
        random = generator(self.seed, "fresh")
        noise = torch.randn(count, *latents.shape[1:], generator=random)
        t = torch.randint(schedule.num_train_timesteps, (count,), generator=random)
        fresh = [numbered_drawing(self.test_seed, index) for index in range(count)]
        with torch.no_grad(), self.autocast():
            drawn = to_pixels(np.stack([drawing.pixels for drawing in fresh]))
            unseen = latents_of(vae, drawn)
        seen = [numbered_attributes(self.train_seed, index) for index in range(count)]
        sums = {"trained": 0.0, "fresh": 0.0}
        for name, rows, attributes in (
            ("trained", latents[:count].float(), seen),
            ("fresh", unseen, [drawing.attributes for drawing in fresh]),
        ):
            rng = np.random.default_rng((self.seed, 5))
            ids = tokenize(self.tokenizer, [random_caption(rng, one) for one in attributes])
            for i in range(0, count, 64):
                x0, eps, at, words = (part[i : i + 64].to(self.device) for part in (rows, noise, t, ids))
                with torch.no_grad():
                    losses = denoiser_losses(denoiser, schedule, x0, eps, at, words)
                sums[name] += float(losses["denoising"]) * len(at) / count
        return {"loss": sums, "fresh_over_trained": round(sums["fresh"] / sums["trained"], 4)}

    def _prove(self) -> dict[str, Any]:
        """Write the teacher's guidance beside the base, and measure the base at it and beside others."""
        abilities, sizes, seed = SceneAbilities(self.out), self.sizes, self.test_seed
        base = load_backbone(str(self.out / "base"), device=self.settings.device, dtype="no")
        base = replace(base, abilities=abilities)
        some = abilities.prompts(sizes.swept, seed + 1)
        sweep = {
            guidance: draw_arm(base, untrained_arm("dpmpp", 16, guidance), some, seed, reporter=self.reporter).share
            for guidance in GUIDANCES
        }
        save_defaults(self.out / "base", guidance_scale=GUIDANCE, teacher_steps=50)
        proved = prove_base(
            replace(base, guidance_scale=GUIDANCE),
            abilities.prompts(sizes.proved, seed),
            abilities.prompts(sizes.proved, seed, "composed"),
            seed=seed,
            reporter=self.reporter,
        )
        return {"all_right_by_guidance": {str(guidance): share for guidance, share in sweep.items()}} | proved

    def _cached_latents(self, vae: AutoencoderKL) -> Tensor:
        """Latents of the drawings that the UNet is trained on, computed once: fp16 [N, 4, 16, 16]."""
        file, count = self.work / "latents.safetensors", self.sizes.latents
        if not file.exists():
            chunks = []
            with self.reporter.progress("latents", count) as bar, self.autocast():
                for pixels in drawn_in_chunks(self.train_seed, count):
                    chunks.append(latents_of(vae, to_pixels(pixels)).half())
                    bar.advance(len(pixels))
            save_file({"latents": torch.cat(chunks).contiguous()}, file)
        return load_file(file)["latents"]


def _bf16(settings: PretrainSettings, device: torch.device) -> bool:
    """Whether to train under bf16 autocast: asked for, or on a GPU or a processor with bf16 matrix units."""
    if settings.mixed_precision == "auto":
        return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_amx_tile_supported())
    return settings.mixed_precision == "bf16"

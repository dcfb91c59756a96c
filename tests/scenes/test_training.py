"""The stages of `fewstep pretrain`, at the tiny size."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from fewstep.config import PretrainSettings
from fewstep.errors import InputError
from fewstep.pretrain import pretrain
from fewstep.reporting import SILENT
from fewstep.scenes.judge import Features, Glance, Judge, gaussian_blur, load_judge, read, soften, whiten_features
from fewstep.scenes.loop import Plan, averaged, batch_indices, made_ahead, run
from fewstep.scenes.text import build_tokenizer
from fewstep.scenes.vae import build_vae, fold_latent_statistics

CPU = torch.device("cpu")


def test_tokenizer_has_one_token_a_caption_word(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    words = "a purple lighthouse in the middle with three lit windows , sunset sky"
    assert len(tokenizer(words).input_ids) == len(words.split()) + 2
    assert len(tokenizer("Łódź 2026!").input_ids) > 2  # other text falls back to bytes


def test_folding_standardises_latents_and_changes_no_picture() -> None:
    torch.manual_seed(0)
    vae = build_vae("tiny").eval()
    mean, std = torch.tensor([0.3, -1.0, 0.1, 2.0]), torch.tensor([0.5, 2.0, 1.5, 0.8])
    folded = fold_latent_statistics(vae, mean, std)
    pixels = torch.rand(2, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        before, after = vae.encode(pixels).latent_dist, folded.encode(pixels).latent_dist
        column = (1, -1, 1, 1)
        torch.testing.assert_close(after.mean, (before.mean - mean.view(column)) / std.view(column))
        torch.testing.assert_close(after.std, before.std / std.view(column))
        torch.testing.assert_close(
            folded.decode(after.mean).sample, vae.decode(before.mean).sample, atol=1e-4, rtol=1e-4
        )


def test_an_epoch_shows_everything_once() -> None:
    seen = torch.cat([batch_indices(0, step, 7, 35) for step in range(5)])
    assert sorted(seen.tolist()) == list(range(35))
    across = torch.cat([batch_indices(0, step, 8, 35) for step in range(35)])  # 8 epochs, batches over their ends
    assert torch.bincount(across).tolist() == [8] * 35


def test_a_stopped_stage_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def train(folder: Path, stop_at: int | None = None, until: int | None = None) -> nn.Module:
        torch.manual_seed(0)
        module = nn.Linear(3, 1)

        def make(step: int, _part: int) -> tuple[torch.Tensor]:
            if step == stop_at:
                raise Stop
            return (torch.randn(4, 3, generator=torch.Generator().manual_seed(step)),)

        def loss(x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (module(x) - x.sum(1, keepdim=True)).square().mean()}

        plan = Plan(steps=12, batch_size=4, learning_rate=0.1, save_seconds=0 if until is None else 1e9)
        return run(module, make, loss, plan, folder, SILENT, CPU, until)

    straight = train(tmp_path / "straight")
    with pytest.raises(Stop):
        train(tmp_path / "cut", stop_at=7)
    resumed = train(tmp_path / "cut")
    train(tmp_path / "halves", until=6)
    with pytest.raises(InputError, match="not trained to its end: the stage halves does that; run --stage halves"):
        averaged(tmp_path / "halves", 12)
    halves = train(tmp_path / "halves")
    assert averaged(tmp_path / "halves", 12)
    for one in (resumed, halves):
        assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), one.parameters(), strict=True))


@pytest.mark.parametrize(
    ("stage", "missing"), [("judges", "vae"), ("denoiser", "vae"), ("refine", "vae"), ("refine", "denoiser")]
)
def test_a_stage_says_which_one_comes_before_it(tmp_path: Path, stage: str, missing: str) -> None:
    if (stage, missing) == ("refine", "denoiser"):
        build_vae("tiny").save_pretrained(tmp_path / "work" / "vae" / "folded")
    with pytest.raises(InputError, match=f"run --stage {missing} first"):
        pretrain(PretrainSettings(size="tiny", stage=stage, output_dir=tmp_path, device="cpu"))  # type: ignore[arg-type]
    assert not (tmp_path / "work" / "text").exists()  # nothing was trained in vain


def test_a_batch_in_parts_trains_as_the_whole_batch_does(tmp_path: Path) -> None:
    def train(parts: int) -> nn.Module:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))

        def make(step: int, part: int) -> tuple[torch.Tensor]:
            return (torch.randn(4, 3, generator=torch.Generator().manual_seed(step)).chunk(parts)[part],)

        def loss(x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (module(x) - x.prod(1, keepdim=True)).square().mean()}

        plan = Plan(steps=20, batch_size=4, parts=parts, learning_rate=0.05, warmup=1, ema_decay=0.5)
        return run(module, make, loss, plan, tmp_path / str(parts), SILENT, CPU)

    threads = torch.get_num_threads()
    whole, halves = train(1), train(2)
    assert torch.get_num_threads() == threads
    torch.manual_seed(0)
    untrained = nn.Linear(3, 8)
    assert not torch.allclose(untrained.weight, whole[0].weight, atol=1e-2)  # type: ignore[index]
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_batches_made_ahead_are_those_made_at_their_step() -> None:
    def make(step: int, part: int) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return x, [x + part, x * step], {"step": torch.tensor(step)}

    for step, (x, (same, times), named) in zip(range(3, 9), made_ahead(make, range(3, 9)), strict=True):
        wanted, (_, multiplied), _ = make(step, 0)
        assert torch.equal(x, wanted) and torch.equal(same, wanted) and torch.equal(times, multiplied)
        assert int(named["step"]) == step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_stage_trains_on_a_gpu_as_it_does_on_the_cpu(tmp_path: Path) -> None:
    def train(device: str) -> nn.Module:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))

        def make(step: int, _part: int) -> tuple[torch.Tensor]:
            return (torch.randn(4, 3, generator=torch.Generator().manual_seed(step)),)

        def loss(x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (module(x) - x.prod(1, keepdim=True)).square().mean()}

        plan = Plan(steps=20, batch_size=4, learning_rate=0.05, warmup=1, ema_decay=0.5)
        return run(module, make, loss, plan, tmp_path / device, SILENT, torch.device(device))

    for a, b in zip(train("cpu").parameters(), train("cuda").cpu().parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_whitening_changes_the_features_scale_and_nothing_else() -> None:
    torch.manual_seed(0)
    judge = Judge("tiny", 7).eval()
    pictures = torch.rand(300, 3, 128, 128)
    with torch.no_grad():
        reading, features, parameters = judge(pictures)
        whiten_features(judge, features)
        again, white, same = judge(pictures)
    torch.testing.assert_close(white.mean(0), torch.zeros(64), atol=1e-3, rtol=0)
    covariance = torch.cov(white.T.double())
    torch.testing.assert_close(covariance.diagonal(), torch.ones(64).double(), atol=0.05, rtol=0)
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 0.05
    torch.testing.assert_close(same, parameters, atol=1e-3, rtol=1e-3)
    assert all(torch.equal(reading[name], again[name]) for name in reading)


def test_the_same_pictures_are_looked_at_once() -> None:
    torch.manual_seed(0)
    looks: list[int] = []
    judge = Judge("tiny", 7).eval()
    judge.register_forward_hook(lambda *_: looks.append(1))
    glance, pictures = Glance(judge), torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        logits, features, _ = judge(pictures)
    found = glance(pictures)
    assert torch.equal(found[0]["birds"], logits["birds"]) and torch.equal(Features(glance)(pictures.clone()), features)
    assert len(looks) == 2  # the judge's own, and one of two
    one, other = (Features(glance)(pictures) for _ in range(2))
    assert len(looks) == 2 and one.data_ptr() != other.data_ptr()
    pictures[0] = 0  # in place: other pictures now
    assert not torch.equal(Features(glance)(pictures), features) and len(looks) == 3
    assert Features(glance)(pictures[:1]).shape == (1, 64) and len(looks) == 4


def test_softening_blurs_and_flattens() -> None:
    picture = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sharp = gaussian_blur(picture, torch.zeros(2))
    torch.testing.assert_close(sharp, picture)
    blurred = gaussian_blur(picture, torch.tensor([0.0, 1.5]))
    torch.testing.assert_close(blurred[0], picture[0])
    assert blurred[1].std() < 0.5 * picture[1].std()
    flat = soften(picture, torch.zeros(2), torch.tensor([1.0, 0.5]))
    assert flat[1].std().item() == pytest.approx(0.5 * picture[1].std().item(), rel=0.01)


def test_pretraining_from_nothing_gives_a_base_that_a_stock_pipeline_draws_with(tmp_path: Path) -> None:
    result = pretrain(PretrainSettings(output_dir=tmp_path, size="tiny", seed=0, mixed_precision="no"))
    assert set(result.figures) == {"vae", "judges", "denoiser-half", "denoiser", "refine-half", "refine"}
    assert json.loads((tmp_path / "figures.json").read_text()) == result.figures
    assert 5 < result.figures["vae"]["psnr_db"] < 40
    assert set(result.figures["refine"]["arms"]) >= {"ddim-50-guided", "lcm-2-unguided"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red house", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (128, 128, 3)
    assert read(load_judge(tmp_path / "judge")(torch.rand(2, 3, 128, 128))[0])["birds"].shape == (2,)
    # Everything is there: the same command again trains nothing and finds the same figures.
    again = pretrain(PretrainSettings(output_dir=tmp_path, size="tiny", seed=0, mixed_precision="no", stage="vae"))
    assert again.figures["vae"]["psnr_db"] == pytest.approx(result.figures["vae"]["psnr_db"])

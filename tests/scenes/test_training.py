"""The stages of `fewstep pretrain`, at the tiny size."""

from __future__ import annotations

import json
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTokenizer

from fewstep import generate
from fewstep.backbone import load_backbone
from fewstep.config import GenerateSettings, PretrainSettings
from fewstep.errors import CheckpointError, InputError
from fewstep.locks import alone_in
from fewstep.pretrain import denoiser as pretrain_denoiser
from fewstep.pretrain import pretrain
from fewstep.pretrain.latents import cached_latents
from fewstep.pretrain.workshop import Workshop
from fewstep.reporting import SILENT, Reporter
from fewstep.scenes.abilities import FOLDER, SCENES, SceneAbilities
from fewstep.scenes.drawings import flawed_drawings
from fewstep.scenes.judge import (
    CLASSES,
    Features,
    Glance,
    Judge,
    gaussian_blur,
    load_judge,
    read,
    soften,
    whiten_features,
)
from fewstep.scenes.layout import FLAWS
from fewstep.scenes.loop import Plan, averaged, batch_indices, made_ahead, run, steps_done
from fewstep.scenes.measure import flaws_seen
from fewstep.scenes.text import build_tokenizer, forget_last_call, tokenize
from fewstep.scenes.vae import build_vae, fold_latent_statistics
from tests.benchmark.fakes import Notes

CPU = torch.device("cpu")


def workshop(folder: Path) -> Workshop:
    return Workshop(
        PretrainSettings(output_dir=folder, size="tiny", seed=0, device="cpu", mixed_precision="no"), SILENT
    )


def test_tokenizer_has_one_token_a_caption_word(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    words = "a purple lighthouse in the middle with three lit windows , sunset sky"
    assert len(tokenizer(words).input_ids) == len(words.split()) + 2
    assert len(tokenizer("Łódź 2026!").input_ids) > 2  # other text falls back to bytes


def test_tokenizer_is_the_shipped_one_however_often_it_is_trained(tmp_path: Path) -> None:
    shipped = json.loads((FOLDER / "base" / "tokenizer" / "tokenizer.json").read_text())["model"]
    for number in range(20):  # within one process, too, a hash table lists the words in another order each time
        build_tokenizer(tmp_path / str(number))
        trained = json.loads((tmp_path / str(number) / "tokenizer.json").read_text())["model"]
        assert trained["vocab"] == shipped["vocab"]
        assert trained["merges"] == shipped["merges"]


def test_a_tokenizer_that_is_there_is_not_trained_again(tmp_path: Path) -> None:
    first = workshop(tmp_path).tokenizer
    captions = ["a red house", "no birds and one flower", "Łódź 2026!"]
    assert torch.equal(tokenize(first, captions), tokenize(build_tokenizer(tmp_path / "other"), captions))
    file = tmp_path / "work" / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["house</w>"], vocab["red</w>"] = vocab["red</w>"], vocab["house</w>"]
    file.write_text(json.dumps(content))
    again = workshop(tmp_path).tokenizer
    before, after = (tokenizer("red house").input_ids[1:-1] for tokenizer in (first, again))
    assert after == before[::-1]
    assert (again.model_max_length, again.pad_token) == (first.model_max_length, first.pad_token)


def test_a_base_that_was_moved_alone_has_the_shipped_judges(tmp_path: Path) -> None:
    assert SCENES.beside(FOLDER / "base").folder == FOLDER
    assert SCENES.beside(tmp_path / "base").folder == FOLDER
    for name in ("judge", "alignment"):
        (tmp_path / name).mkdir()
    assert SCENES.beside(tmp_path / "base").folder == tmp_path
    assert SceneAbilities(tmp_path).adapter() is None


def test_what_a_stage_leaves_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(self: CLIPTokenizer, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CLIPTokenizer, "save_pretrained", cut)
        with pytest.raises(KeyboardInterrupt):
            _ = workshop(tmp_path).tokenizer
    assert list((tmp_path / "work").iterdir()) == []
    assert len(workshop(tmp_path).tokenizer("a red house").input_ids) == 5

    def stopped(_: int) -> None:
        raise KeyboardInterrupt

    vae = build_vae("tiny").eval()
    vae.save_pretrained(tmp_path / "work" / "vae-refine" / "folded")
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.files.os.fsync", stopped)
        with pytest.raises(KeyboardInterrupt):
            cached_latents(workshop(tmp_path), vae)
    assert not list((tmp_path / "work").glob("*latents*"))
    assert cached_latents(workshop(tmp_path), vae).shape == (96, 4, 16, 16)


def test_latents_of_another_vae_are_computed_anew(tmp_path: Path) -> None:
    shop = workshop(tmp_path)
    found = []
    for seed in (0, 1, 1):
        torch.manual_seed(seed)
        vae = build_vae("tiny").eval().requires_grad_(False)
        vae.save_pretrained(shop.folded)
        found.append(cached_latents(shop, vae))
        written = (shop.work / "latents.safetensors").stat().st_mtime_ns
    assert not torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    cached_latents(shop, vae)
    assert (shop.work / "latents.safetensors").stat().st_mtime_ns == written


def test_work_goes_on_only_as_it_was_begun(tmp_path: Path) -> None:
    shop = workshop(tmp_path)
    shop.begin()
    note = (shop.work / "made_from.json").read_text()
    assert json.loads(note) | {"size": "tiny", "seed": 0} == json.loads(note)  # and the drawings' hash
    shop.begin()  # the same again
    for changes, told in (
        ({"seed": 1}, "seed 1 came, the work in .* was begun with 0; allowed is the same; choose another --output_dir"),
        ({"size": "full"}, "size full came, the work in .* was begun with tiny; "),
        ({"size": "full", "seed": 1}, "size full and seed 1 came, the work in .* was begun with tiny and 0; "),
    ):
        settings = PretrainSettings(output_dir=tmp_path, stage="judges", **({"size": "tiny", "seed": 0} | changes))  # type: ignore[arg-type]
        with pytest.raises(InputError, match=f"^{told}"):
            pretrain(settings)
    assert (shop.work / "made_from.json").read_text() == note
    (shop.work / "made_from.json").write_text(json.dumps(json.loads(note) | {"drawings_sha256": "ab"}))
    with pytest.raises(InputError, match=r"^drawings_sha256 .* came, the work in .* was begun with ab; "):
        shop.begin()


def test_work_from_before_the_note_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "work" / "vae").mkdir(parents=True)
    workshop(tmp_path).begin()
    assert json.loads((tmp_path / "work" / "made_from.json").read_text())["size"] == "tiny"


@pytest.mark.parametrize(
    ("file", "content", "stage", "fix"),
    [
        ("work/vae/state.safetensors", b"cut", "vae", "trains vae from its start"),
        ("work/drawings.npy", b"\x93NUMPY", "vae", "drawn again"),
        ("work/made_from.json", b"{", "vae", "another --output_dir"),
        ("figures.json", b"", "vae", "measures its figures anew"),
        ("work/vae-refine/folded/config.json", b"{", "judges", "run --stage vae-refine again"),
        ("work/tokenizer/tokenizer.json", b"{", "judges", "the whole work folder"),
    ],
)
def test_work_that_is_damaged_is_told_from_a_bug(
    tmp_path: Path, begun: Path, file: str, content: bytes, stage: str, fix: str
) -> None:
    shutil.copytree(begun, tmp_path / "out")
    (tmp_path / "out" / file).write_bytes(content)
    settings = {"output_dir": tmp_path / "out", "size": "tiny", "seed": 0, "device": "cpu", "mixed_precision": "no"}
    with pytest.raises(CheckpointError, match=f"{file.split('/')[1 if '/' in file else 0]}.*{fix}") as told:
        pretrain(PretrainSettings(**settings, stage=stage))
    assert "\n" not in str(told.value)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the VAE's stages leave, and the tokenizer."""
    folder = tmp_path_factory.mktemp("begun")
    vae = PretrainSettings(output_dir=folder, size="tiny", seed=0, device="cpu", mixed_precision="no", stage="vae")
    pretrain(vae)
    pretrain(vae.replace(stage="vae-refine"))
    assert workshop(folder).tokenizer
    return folder


def test_a_training_does_not_go_on_where_what_it_builds_on_was_trained_anew(tmp_path: Path, begun: Path) -> None:
    shutil.copytree(begun, tmp_path / "out")
    settings = {"output_dir": tmp_path / "out", "size": "tiny", "seed": 0, "device": "cpu", "mixed_precision": "no"}
    pretrain(PretrainSettings(**settings, stage="vae-refine"))  # the same VAE
    anew = tmp_path / "out" / "work" / "vae" / "state.safetensors"
    save_file({name: value + 1 if "ema/" in name else value for name, value in load_file(anew).items()}, anew)
    with pytest.raises(
        InputError, match=r"vae-refine.* was not begun on the vae that is there now; .*; remove .*vae-refine'"
    ):
        pretrain(PretrainSettings(**settings, stage="vae-refine"))
    shutil.rmtree(tmp_path / "out" / "work" / "vae-refine")
    pretrain(PretrainSettings(**settings, stage="vae-refine"))


def test_going_on_in_another_precision_is_told(tmp_path: Path, begun: Path) -> None:
    shutil.copytree(begun, tmp_path / "out")
    settings = PretrainSettings(output_dir=tmp_path / "out", size="tiny", seed=0, device="cpu", stage="vae")
    state = tmp_path / "out" / "work" / "vae" / "state.safetensors"

    def warned(precision: str) -> list[str]:
        pretrain(settings.replace(mixed_precision=precision), reporter=notes)
        return notes.warned

    notes = Notes()
    assert warned("bf16") == [], "nothing is trained any more"
    save_file(load_file(state) | {"step": torch.tensor(18)}, state)
    assert warned("no") == []
    save_file(load_file(state) | {"step": torch.tensor(18)}, state)
    (line,) = warned("bf16")
    assert "vae was begun with --mixed_precision no and goes on with bf16" in line


def test_latents_that_cannot_be_read_say_what_to_do(tmp_path: Path, begun: Path) -> None:
    shutil.copytree(begun, tmp_path / "out")
    shop = workshop(tmp_path / "out")
    cached_latents(shop, shop.load_vae())
    (shop.work / "latents.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"latents\.safetensors.*computed again"):
        cached_latents(shop, shop.load_vae())


class Says(Judge):
    """A judge that says `always` of every picture, and of all other heads class 0."""

    def __init__(self, **always: int) -> None:
        super().__init__("tiny", 7)
        self.always = always

    def forward(self, pixels: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        said = {
            name: nn.functional.one_hot(torch.full((len(pixels),), self.always.get(name, 0)), count).float()
            for name, count in CLASSES.items()
        }
        return said, torch.zeros(len(pixels), 64), torch.zeros(len(pixels), 7)


@pytest.mark.parametrize(
    ("always", "share"),
    [({"buildings": 1, "lights": 1}, 0.0), ({"buildings": 1}, 1.0), ({"buildings": 1, "lights": 1, "birds": 4}, 1.0)],
)
def test_a_judge_that_sees_no_flaws_is_told(always: dict[str, int], share: float) -> None:
    flaws = [*FLAWS, *FLAWS]
    figures = flaws_seen(Says(**always), list(flawed_drawings(0, flaws)), flaws)
    assert figures["flawed_tested"] == 12
    assert figures["reader_sees_flawed"] == share
    assert figures["reader_sees_by_flaw"] == dict.fromkeys(FLAWS, share)


def test_two_do_not_work_in_one_folder_nor_in_half_precision_alone(tmp_path: Path) -> None:
    settings = PretrainSettings(size="tiny", output_dir=tmp_path, device="cpu", stage="vae")
    with alone_in(tmp_path), pytest.raises(InputError, match="is being written to by process"):
        pretrain(settings)
    with pytest.raises(InputError, match="mixed_precision fp16 came; allowed is auto, no or bf16"):
        pretrain(settings.replace(mixed_precision="fp16"))


def test_large_seeds_order_as_well() -> None:
    assert sorted(batch_indices(2**62, 0, 8, 8).tolist()) == list(range(8))


def test_a_tokenizer_is_saved_as_if_it_had_not_been_used(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path / "fresh")
    unused = (tmp_path / "fresh" / "tokenizer.json").read_bytes()
    tokenize(tokenizer, ["a red house"])
    tokenizer(["a red house", "a sea"], padding=True)
    forget_last_call(tokenizer)
    tokenizer.save_pretrained(tmp_path / "used")
    assert (tmp_path / "used" / "tokenizer.json").read_bytes() == unused


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


class StopsAt:
    """A reporter whose bar is stopped by a signal after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    @contextmanager
    def progress(self, name: str, total: int) -> Iterator[StopsAt]:
        yield self

    def advance(self, count: int = 1, **values: float) -> None:
        self.left -= count
        if self.left <= 0:
            raise KeyboardInterrupt


def test_a_stopped_stage_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def train(
        folder: Path, stop_at: int | None = None, until: int | None = None, reporter: Reporter = SILENT
    ) -> nn.Module:
        torch.manual_seed(0)
        module = nn.Linear(3, 1)

        def make(step: int, _part: int) -> tuple[torch.Tensor]:
            if step == stop_at:
                raise Stop
            return (torch.randn(4, 3, generator=torch.Generator().manual_seed(step)),)

        def loss(x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (module(x) - x.sum(1, keepdim=True)).square().mean()}

        plan = Plan(steps=12, batch_size=4, learning_rate=0.1, save_seconds=0 if until is None else 1e9)
        return run(module, make, loss, plan, folder, reporter, CPU, until)

    straight = train(tmp_path / "straight")
    with pytest.raises(Stop):
        train(tmp_path / "cut", stop_at=7)
    resumed = train(tmp_path / "cut")
    train(tmp_path / "halves", until=6)
    with pytest.raises(InputError, match="not trained to its end: the stage halves does that; run --stage halves"):
        averaged(tmp_path / "halves", 12)
    halves = train(tmp_path / "halves")
    assert averaged(tmp_path / "halves", 12)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "asked", until=12, reporter=StopsAt(5))
    assert steps_done(tmp_path / "asked") == 5, "a bar that is stopped saves what was done"
    (line,) = (tmp_path / "asked" / "curve.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 5 and json.loads(line)["loss"] > 0, "however short the stage was"
    asked = train(tmp_path / "asked")
    for one in (resumed, halves, asked):
        assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), one.parameters(), strict=True))


@pytest.mark.parametrize(
    ("stage", "missing"),
    [
        ("vae-refine", "vae"),
        ("judges", "vae-refine"),
        ("denoiser", "vae-refine"),
        ("refine", "vae-refine"),
        ("refine-half", "judges"),
        ("refine", "judges"),
        ("refine", "denoiser"),
    ],
)
def test_a_stage_says_which_one_comes_before_it(tmp_path: Path, stage: str, missing: str) -> None:
    if missing in ("judges", "denoiser"):
        build_vae("tiny").save_pretrained(tmp_path / "work" / "vae-refine" / "folded")
    if missing == "denoiser":
        for judge in ("judge", "alignment"):
            (tmp_path / judge).mkdir()
    with pytest.raises(InputError, match=f"run --stage {missing} first"):
        pretrain(PretrainSettings(size="tiny", stage=stage, output_dir=tmp_path, device="cpu"))  # type: ignore[arg-type]
    trained = [name for name in ("text", "denoiser", "refine") if (tmp_path / "work" / name).exists()]
    assert trained == []  # nothing in vain


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


def test_a_stage_does_not_go_on_in_batches_of_another_size(tmp_path: Path) -> None:
    """As another device would take."""

    def trained(batch_size: int, until: int) -> nn.Module:
        plan = Plan(steps=4, batch_size=batch_size, learning_rate=1e-3)
        torch.manual_seed(0)
        module = nn.Linear(2, 1)

        def make(step: int, _part: int) -> tuple[torch.Tensor]:
            return (torch.randn(batch_size, 2, generator=torch.Generator().manual_seed(step)),)

        def loss(x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": module(x).square().mean()}

        return run(module, make, loss, plan, tmp_path / "stage", SILENT, CPU, until)

    trained(2, 2)
    with pytest.raises(InputError, match=r"batches of 16 came, .* was trained in batches of 2, .*--device"):
        trained(16, 4)
    trained(2, 4)
    trained(16, 4)  # it is at its end: nothing is trained any more


def test_batches_made_ahead_are_those_made_at_their_step() -> None:
    def make(step: int, part: int) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        deaf = all(signal.getsignal(one) == signal.SIG_IGN for one in (signal.SIGINT, signal.SIGTERM))
        return x, [x + part, x * step], {"step": torch.tensor(step), "deaf": torch.tensor(deaf)}

    for step, (x, (same, times), named) in zip(range(3, 9), made_ahead(make, range(3, 9)), strict=True):
        wanted, (_, multiplied), _ = make(step, 0)
        assert torch.equal(x, wanted) and torch.equal(same, wanted) and torch.equal(times, multiplied)
        assert int(named["step"]) == step
        assert named["deaf"], "a job's end reaches its workers too, and the main process has to save"


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


def test_pretraining_from_nothing_gives_a_base_that_a_stock_pipeline_draws_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = pretrain(PretrainSettings(output_dir=tmp_path, size="tiny", seed=0, mixed_precision="no"))
    assert set(result.figures) == {"vae", "vae-refine", "judges", "denoiser-half", "denoiser", "refine-half", "refine"}
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
    # Opened by its folder it has the judges that were trained with it, and no adapter that was trained on another.
    opened = load_backbone(tmp_path / "base", device="cpu")
    assert opened.abilities == SceneAbilities(tmp_path)
    assert opened.abilities.alignment_model() == tmp_path / "alignment"
    with pytest.raises(InputError, match="ships none"):
        generate(GenerateSettings(prompt="a red house", base_model=str(tmp_path / "base"), outdir=tmp_path / "g"))
    assert (opened.guidance_scale, opened.teacher_steps) == (4.0, 50)
    # What judges is whole, whoever looks; nothing half-written is left.
    assert result.figures["judges"]["flawed_tested"] == 12
    assert not list(tmp_path.rglob("*.partial"))
    tokenizers = [tmp_path / folder / "tokenizer.json" for folder in ("work/tokenizer", "base/tokenizer", "alignment")]
    one, *others = [json.loads(file.read_text())["model"] for file in tokenizers]
    assert others == [one, one]
    config = (FOLDER / "base" / "tokenizer" / "tokenizer_config.json").read_text()
    assert json.loads((tmp_path / "base" / "tokenizer" / "tokenizer_config.json").read_text()) == json.loads(config)
    # Where nothing is left to train, where things stand in 40,000 drawings is not worked out again.
    monkeypatch.setattr(pretrain_denoiser, "numbered_landmarks", None)
    halves = PretrainSettings(output_dir=tmp_path, size="tiny", seed=0, mixed_precision="no", stage="refine-half")
    assert pretrain(halves).figures["refine-half"]["steps"] == 5
    # Everything is there: the same command again trains nothing and finds the same figures.
    again = pretrain(PretrainSettings(output_dir=tmp_path, size="tiny", seed=0, mixed_precision="no", stage="vae"))
    assert again.figures["vae"]["psnr_db"] == pytest.approx(result.figures["vae"]["psnr_db"])

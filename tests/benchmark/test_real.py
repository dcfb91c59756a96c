"""Real pictures that come with data: prompts, ceiling and references on a base that makes none of its own."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fewstep.backbone import Backbone
from fewstep.benchmark import benchmark
from fewstep.errors import DataError, InputError
from fewstep.report import picture_path
from tests.benchmark.fakes import Notes, make_adapter
from tests.benchmark.test_benchmark import pixels, settings
from tests.data.makers import noise

COUNT = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of the base's size with a caption each."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(COUNT):
        noise((64, 64), number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"caption {number}")
    return folder


@pytest.fixture
def bare(base: Backbone, tmp_path: Path) -> tuple[Backbone, dict[str, object]]:
    """A base without abilities, and what takes their place."""
    adapter = make_adapter(tmp_path / "adapter", base)
    clip = base.abilities.alignment_model()  # type: ignore[union-attr]
    plain = {"prompts_file": None, "num_prompts": 5, "num_images": 1, "frechet_images": None, "lora_path": adapter,
             "clip_model_id": str(clip), "steps": (1,), "solver_steps": 0, "timing_repeats": 1}  # fmt: skip
    return replace(base, abilities=None), plain


def test_captions_are_prompts_and_pictures_the_ceiling(
    bare: tuple[Backbone, dict[str, object]], data: Path, tmp_path: Path
) -> None:
    base, plain = bare
    result = benchmark(settings(tmp_path, data_dir=data, **plain), backbone=base)
    prompts, real = result.record.prompts, result.record.real
    assert len(set(prompts)) == 5 and all(prompt.startswith("caption ") for prompt in prompts)
    assert real is not None and real.alignment is not None and real.all_right is None
    for number, prompt in enumerate(prompts):
        own = np.asarray(noise((64, 64), int(prompt.removeprefix("caption "))), dtype=np.int16)
        assert np.array_equal(pixels(picture_path(result.folders["real"], number, 0)), own)
    # At equal N, against the captions' own pictures; the real arm's distance is that of five others to them.
    student = result.record.summary["student-1"]
    assert student.frechet is not None and (student.frechet.pictures, student.frechet.references) == (5, 5)
    assert real.frechet is not None and real.frechet.pictures == 5
    assert real.frechet.raw.value > 0 and real.frechet.through_vae.value > 0
    assert set(real.distances) == {"kid", "cmmd"} and set(student.distances) > {"kid", "precision", "recall"}
    assert result.record.settings["frechet_images"] == 1

    again = benchmark(settings(tmp_path, data_dir=data, resume=True, **plain), backbone=base)
    assert again.rows == result.rows
    others = benchmark(settings(tmp_path, data_dir=data, outdir=tmp_path / "2", seed=7, **plain), backbone=base)
    assert others.record.prompts != prompts


def test_other_pictures_of_the_same_captions_are_not_mixed(
    bare: tuple[Backbone, dict[str, object]], data: Path, tmp_path: Path
) -> None:
    base, plain = bare
    plain |= {"compare_baseline": False}
    benchmark(settings(tmp_path, data_dir=data, **plain), backbone=base)
    other = tmp_path / "data"
    other.mkdir()
    for number in range(COUNT):
        noise((72, 64), 100 + number).save(other / f"{number}.png")
        (other / f"{number}.txt").write_text(f"caption {number}")
    with pytest.raises(InputError, match="real_pictures"):
        benchmark(settings(tmp_path, data_dir=other, resume=True, **plain), backbone=base)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_images": 2}, InputError, "num_images 2 came with data, .* raise --num_prompts"),
        ({"frechet_images": 5}, InputError, "frechet_images 5 came with data"),
        ({"num_prompts": 7}, InputError, "num_prompts 7 came, the data has 12 pictures; allowed are at most half"),
        ({"data_dir": "nowhere"}, DataError, "nowhere"),
    ],
)
def test_data_that_does_not_do(
    bare: tuple[Backbone, dict[str, object]],
    data: Path,
    tmp_path: Path,
    change: dict[str, object],
    error: type[Exception],
    words: str,
) -> None:
    base, plain = bare
    with pytest.raises(error, match=words):
        benchmark(settings(tmp_path, **(plain | {"data_dir": data} | change)), backbone=base)
    assert not (tmp_path / "out").exists()


def test_captions_alone_take_no_further_pictures(
    bare: tuple[Backbone, dict[str, object]], data: Path, tmp_path: Path
) -> None:
    base, plain = bare
    alone = plain | {"data_dir": data, "num_prompts": COUNT, "num_images": 2, "frechet_images": 0}
    result = benchmark(settings(tmp_path, **alone), backbone=base)
    assert sorted(result.record.prompts) == sorted(f"caption {number}" for number in range(COUNT))
    assert result.record.real is None
    with pytest.raises(InputError, match="num_prompts 13 came, the data has 12 pictures; allowed are at most as many"):
        benchmark(settings(tmp_path, outdir=tmp_path / "more", **(alone | {"num_prompts": 13})), backbone=base)


def damaged(folder: Path, data: Path, *numbers: int) -> Path:
    """A copy of the data with pictures whose header and end are whole and whose middle is not."""
    shutil.copytree(data, folder)
    for number in numbers:
        content = bytearray((folder / f"{number}.png").read_bytes())
        content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
        (folder / f"{number}.png").write_bytes(content)
    return folder


def test_damaged_pictures_are_found_before_anything_is_drawn(
    bare: tuple[Backbone, dict[str, object]], data: Path, tmp_path: Path
) -> None:
    base, plain = bare
    notes = Notes()
    plain |= {"num_prompts": 4, "compare_baseline": False, "data_dir": damaged(tmp_path / "data", data, *range(4))}
    result = benchmark(settings(tmp_path, max_dropped=0.5, **plain), backbone=base, reporter=notes)
    left = [line for line in notes.warned if "no good and left out" in line]
    assert left and all(line.split()[0] in {f"{number}.png" for number in range(4)} for line in left)
    assert not {f"caption {number}" for number in range(4)} & set(result.record.prompts)
    with pytest.raises(DataError, match=r"turned out to be no good.*\d\.png: .*raise --max_dropped"):
        benchmark(settings(tmp_path, outdir=tmp_path / "strict", **plain), backbone=base)
    assert not (tmp_path / "strict").exists()
    with pytest.raises(InputError, match="num_prompts 5 came, 8 pictures of the data are good"):
        benchmark(settings(tmp_path, max_dropped=0.5, **(plain | {"num_prompts": 5})), backbone=base)


def test_prompts_come_from_one_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data_dir and prompts_file came together"):
        settings(tmp_path, data_dir=tmp_path)

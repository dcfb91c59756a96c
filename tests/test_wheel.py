"""The built wheel, installed where this checkout is out of sight, has everything it needs in it."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fewstep import __version__

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    # Without the variables through which this checkout could be found after all.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_", "PYTEST_"))}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd, env=clean)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(*pip, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a new environment that holds the wheel and sees our dependencies, but not this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / Path(sys.executable).name
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, wheel, cwd=folder)
    # Folders named in a .pth file are searched, but .pth files in them, such as that of our own checkout, are not read.
    packages = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip())
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return scripts


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    source = ROOT / "src"
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    ours = {name for name in files if "__pycache__" not in name and not name.split("/")[-1].startswith(".")}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("fewstep/")}
    assert packed == ours
    assert "fewstep/py.typed" in packed


def test_the_command_runs(installed: Path, tmp_path: Path) -> None:
    assert run(installed / "fewstep", "--version", cwd=tmp_path) == f"fewstep {__version__}\n"
    assert "--num_inference_steps" in run(installed / "fewstep", "train", "--help", cwd=tmp_path)


def test_the_package_is_the_installed_one(installed: Path, tmp_path: Path) -> None:
    found = run(installed / "python", "-c", "import fewstep; print(fewstep.__file__)", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(installed.parent)


def test_it_draws_with_what_came_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    run(installed / "fewstep", "generate", "--prompt", "a red house", "--steps", "1", "--outdir", "out", cwd=tmp_path)
    assert list((tmp_path / "out").rglob("*.png"))

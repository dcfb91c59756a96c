"""Pickled files that would unpack to more than they are."""

from __future__ import annotations

import ast
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.backbone.folder import load_folder
from fewstep.backbone.single_file import load_single_file
from fewstep.errors import CheckpointError
from fewstep.lora import layouts
from fewstep.lora.source import locate
from fewstep.pickles import is_bomb
from tests.train.tiny import make_base


def squeezed(file: Path) -> Path:
    """What torch saved, packed once more: zeros to a thousandth."""
    torch.save({"x": torch.zeros(2**18)}, file)
    assert not is_bomb(file)
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert file.stat().st_size < 10_000
    return file


def test_what_torch_saves_is_none_and_what_is_no_zip_neither(tmp_path: Path) -> None:
    shared = torch.zeros(1000)
    torch.save({"a": shared, "b": shared[:3], "c": torch.ones(5)}, tmp_path / "a.pt")
    torch.save({"a": shared}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "c.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    assert not any(is_bomb(tmp_path / f"{name}.pt") for name in "abc")


def test_it_is_refused_before_it_is_opened_wherever_pickles_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("it was opened")

    bomb = squeezed(tmp_path / "bomb.ckpt")
    base = make_base(tmp_path / "base")
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    squeezed(base / "unet" / "diffusion_pytorch_model.bin")
    monkeypatch.setattr(torch, "load", opened)
    words = "is compressed, and unpacks to more than it is"
    with pytest.raises(CheckpointError, match=words):
        layouts.read(locate(bomb), [], allow_pickle=True)
    with pytest.raises(CheckpointError, match=words):
        load_single_file(bomb, dtype=torch.float32, allow_pickle=True)
    with pytest.raises(CheckpointError, match=words):
        load_folder(base, name="base", dtype=torch.float32, allow_pickle=True)


PICKLERS = ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")


def calls() -> list[tuple[str, str, dict[str, object]]]:
    """(file, what is called, its keywords whose values are written out) of every call in the package."""
    found = []
    root = Path(fewstep.__file__).parent
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                constants = {one.arg: one.value.value for one in node.keywords if isinstance(one.value, ast.Constant)}
                found.append((str(file.relative_to(root)), ast.unparse(node.func), constants))
    return found


def test_nothing_of_ours_pickles_or_runs_what_came_with_weights() -> None:
    loads = []
    for file, name, keywords in calls():
        end = name.rpartition(".")[2]
        assert end not in ("save_state", "load_state", "unsafe_load") and name != "torch.save", (file, name)
        assert name.rpartition(".")[0] not in PICKLERS or end not in ("load", "loads", "dump", "dumps", "open"), file
        assert keywords.get("trust_remote_code", False) is False, (file, name)
        assert end != "load" or keywords.get("allow_pickle", False) is False, (file, name)  # numpy's
        if name == "torch.load":
            loads.append(file)
            assert keywords["weights_only"] is True, file
    assert loads == ["backbone/single_file.py", "lora/layouts.py"], "each behind allow_pickle, and looked at for bombs"

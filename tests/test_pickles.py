"""Pickled files that would unpack to more than they are."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

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

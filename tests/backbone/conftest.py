"""A tiny base with random weights, as an object and as a diffusers folder; and no network anywhere."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from fewstep.backbone import Backbone, random_backbone
from fewstep.quiet import quiet_libraries
from fewstep.scenes.abilities import FOLDER as SCENES


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever opens a connection fails the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def tiny() -> Backbone:
    """Shared: do not change it. With a small vocabulary in the place of CLIP's, which takes half a second to read."""
    tokenizer = CLIPTokenizer.from_pretrained(SCENES / "base" / "tokenizer", model_max_length=77)
    return replace(random_backbone("tiny", seed=5), tokenizer=tokenizer)


@pytest.fixture(scope="session")
def saved_tiny(tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: do not change it."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    with quiet_libraries():
        tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved_tiny: Path, tmp_path: Path) -> Path:
    """The tiny base as a diffusers folder, to be changed at will."""
    return Path(shutil.copytree(saved_tiny, tmp_path / "base"))


@pytest.fixture
def offline_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, Path | None], Path]:
    """An empty Hub cache and HF_HUB_OFFLINE=1; call it with an id and a folder to put that into the cache.

    As when it was fetched by a tool that left the safety checker out, whose files the cache knows of all the same.
    """
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def put(repo_id: str, content: Path | None) -> Path:
        if content is not None:
            repository = cache / f"models--{repo_id.replace('/', '--')}"
            commit = "0123456789abcdef0123456789abcdef01234567"
            shutil.copytree(content, repository / "snapshots" / commit)
            (repository / "refs").mkdir(parents=True)
            (repository / "refs" / "main").write_text(commit)
            listed = [file.relative_to(content).as_posix() for file in content.rglob("*") if file.is_file()]
            listed += ["safety_checker/config.json", "safety_checker/model.safetensors"]
            tree = {"format_version": 1, "files": {name: {"size": 1, "blob_id": "0" * 40} for name in listed}}
            (repository / "trees").mkdir()
            (repository / "trees" / f"{commit}.json").write_text(json.dumps(tree))
        return cache

    return put

"""Files that a user hands over: whatever is in them, the result is clean or an error of one line."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from fewstep import checkpoint
from fewstep.backbone import Backbone, load_backbone
from fewstep.cli import COMMANDS
from fewstep.config import TrainSettings, load_adapters, merged, settings_toml
from fewstep.data import open_data
from fewstep.errors import FewstepError
from fewstep.lora import load_adapter
from tests.data import makers
from tests.faults.harness import WEIGHTS

Record = Callable[[str, object], None]

AWKWARD = [
    *(
        b"",
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\n",
        b"\r",
        b'"',
        b"\\",
        b"'",
        b"=",
        b",",
        b"[",
        b"]",
        b"{",
        b"}",
        b"#",
    ),
    *(b"[" * 3_000, b'{"a":' * 3_000, b"9" * 5_000, b"1e999", b"NaN", b"-1", b"0", b"null", b"true", b"\\ud800"),
    *(b"../../x", b"/etc/passwd", b"a" * 300, "\u202e\u0301".encode(), b'{"a": [1]}', b"[[adapter]]\n", b"1979-05-27"),
]
"""What parsers stumble over."""


def close_to(*whole: bytes) -> SearchStrategy[bytes]:
    """Anything at all, and whole files with a few parts cut out, doubled or replaced by something awkward."""

    @st.composite
    def edited(draw: st.DrawFn) -> bytes:
        content = draw(st.sampled_from(whole))
        for _ in range(draw(st.integers(0, 4))):
            start = draw(st.integers(0, len(content)))
            end = draw(st.integers(start, min(len(content), start + 40)))
            middle = draw(st.sampled_from(AWKWARD) | st.binary(max_size=8) | st.just(content[start:end] * 2))
            content = content[:start] + middle + content[end:]
        return content

    return st.binary(max_size=200) | edited()


def holds(inputs: SearchStrategy[Any], read: Callable[[Any], object], record_property: Record) -> None:
    """Every input is read, or refused by an error of ours that is one line."""
    tried = 0

    @settings(deadline=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def is_clean(given: Any) -> None:
        nonlocal tried
        tried += 1
        try:
            read(given)
        except FewstepError as error:
            refused = str(error)
            assert "\n" not in refused

    is_clean()
    record_property("inputs tried", tried)


def test_any_settings_file(tmp_path: Path, record_property: Record) -> None:
    file = tmp_path / "run.toml"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        for command in COMMANDS.values():
            merged(command.settings, {}, config=file)

    many = TrainSettings(data_dir=Path("/some/data"), lora_targets=("to_q", "to_k"), lora_alpha=4, resolution=512)
    holds(close_to(settings_toml(many).encode(), b"max_steps = 7\n"), read, record_property)


def test_any_list_of_adapters(tmp_path: Path, record_property: Record) -> None:
    file = tmp_path / "adapters.toml"
    whole = b'[[adapter]]\nid = "one"\nlora_path = "a"\nsteps = [1, 2]\n[[adapter]]\nid = "two"\nlora_id = "a/b"\n'

    def read(content: bytes) -> None:
        file.write_bytes(content)
        load_adapters(file)

    holds(close_to(whole), read, record_property)


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl", "prompts"])
def test_any_captions(name: str, tmp_path: Path, record_property: Record) -> None:
    folder = makers.write(tmp_path / "data", {"a.png": makers.numbered(1), "b.png": makers.numbered(2)})
    file, more = folder / name, b""
    if name == "a.txt":
        makers.write(folder, {"b.txt": "a red house"})
        more = "ein Häuschen\r\n am\tSee \u200b".encode()
    elif name == "metadata.jsonl":
        more = b'{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "text": ["two", "three"]}\n'
    else:
        more = b"a red house\n\n two  houses\n"
    place: dict[str, Any] = {"prompts_file": file} if name == "prompts" else {"data_dir": folder}
    asked = makers.Settings(max_dropped=1.0, **place)

    def read(content: bytes) -> None:
        file.write_bytes(content)
        data = open_data(asked, makers.Base()).data
        for index in range(len(data)):
            _, captions = data.item(index)
            assert captions and all(caption == " ".join(caption.split()) and caption for caption in captions)

    holds(close_to(more), read, record_property)


def test_any_coco_annotations(tmp_path: Path, record_property: Record) -> None:
    makers.write(tmp_path / "train2017", {"a.png": makers.numbered(1), "b.png": makers.numbered(2)})
    file = tmp_path / "annotations" / "captions_train2017.json"
    file.parent.mkdir()
    texts = [{"image_id": number, "id": number + 5, "caption": f"picture {number}"} for number in (1, 2, 2)]
    whole = makers.coco([{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}], texts)
    asked = makers.Settings(data_dir=tmp_path, max_dropped=1.0)

    def read(content: bytes) -> None:
        file.write_bytes(content)
        data = open_data(asked, makers.Base()).data
        for index in range(len(data)):
            assert data.item(index)[1]

    holds(close_to(whole.encode()), read, record_property)


READERS = (checkpoint.recorded, checkpoint.recorded_base, checkpoint.recorded_steps, checkpoint.verify)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_any_manifest(
    reader: Callable[[Path], object], undisturbed: Path, tmp_path: Path, record_property: Record
) -> None:
    whole = (undisturbed / "lora" / "final" / checkpoint.MANIFEST).read_bytes()

    def read(content: bytes) -> None:
        (tmp_path / checkpoint.MANIFEST).write_bytes(content)
        reader(tmp_path)

    holds(close_to(whole, b'{"schema_version": 3, "files": {}}'), read, record_property)


def test_any_settings_beside_an_adapter(tmp_path: Path, record_property: Record) -> None:
    def read(content: bytes) -> None:
        (tmp_path / checkpoint.SETTINGS).write_bytes(content)
        checkpoint.recorded_base(tmp_path)
        checkpoint.recorded_steps(tmp_path)

    holds(close_to(b'base_model = "scenes"\nnum_inference_steps = [1, 2]\n'), read, record_property)


# ------------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def backbone(base: Path) -> Backbone:
    return load_backbone(base, device="cpu")


RENAMED = [
    *(("lora_A", "lora_B"), ("lora_A", "lora_mid"), ("attn1", "attn7"), (".weight", ".alpha")),
    *(("unet.", ""), ("unet.", "text_encoder."), ("unet.", "base_model.model.")),
]


def with_header(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def adapters(draw: st.DrawFn, whole: bytes) -> bytes:
    """An adapter of which names, shapes, types, metadata and numbers are changed, in a file that is well formed."""
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    header: dict[str, Any] = json.loads(whole[8:end])
    metadata = header.pop("__metadata__")
    names = sorted(header)
    if draw(st.booleans()):
        names = names[:2]
    data, entries = b"", {}
    for name in names:
        begin, stop = header[name]["data_offsets"]
        kind, shape, content = header[name]["dtype"], header[name]["shape"], whole[end + begin : end + stop]
        if draw(st.integers(0, 9)) == 0:
            kind = draw(st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "U8", "F8_E4M3", "C64"]))
            shape = draw(st.just([0, *shape[1:]]) | st.lists(st.sampled_from([0, 1, 2, 4, 16, 32]), max_size=4))
            size = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "C64": 8}.get(kind, 1)
            for side in shape:
                size *= side
            content = (draw(st.sampled_from([b"\x00", b"\xff", b"\x7f\xc0", b"\x01"])) * size)[:size]
        if draw(st.integers(0, 19)) == 0:
            old, new = draw(st.sampled_from([*RENAMED, (name, "x" * 2_000)]))
            name = name.replace(old, new)
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    metadata |= draw(
        st.just({})
        | st.dictionaries(
            st.just("lora_adapter_metadata"),
            st.text(max_size=20)
            | st.builds(json.dumps, configurations)
            | st.sampled_from(["[" * 3_000, "{}", '{"lora_alpha": 1e999}', '{"unet.lora_alpha": null}']),
        )
    )
    return with_header({"__metadata__": metadata, **entries}, data)


numbers = st.sampled_from([0, -1, 4, 1e-300, 1e300, 10**400, float("nan"), None, "4", [], True])
configurations = st.fixed_dictionaries(
    {"unet.lora_alpha": numbers},
    optional={
        "unet.alpha_pattern": st.dictionaries(st.sampled_from(["to_q", "(", "(a+)+$", ".*", ""]), numbers) | numbers,
        "unet.use_rslora": numbers,
        "unet.r": numbers,
    },
)


def test_any_adapter(undisturbed: Path, backbone: Backbone, tmp_path: Path, record_property: Record) -> None:
    whole = (undisturbed / "lora" / "final" / WEIGHTS).read_bytes()
    file = tmp_path / WEIGHTS

    def read(content: bytes) -> None:
        file.write_bytes(content)
        info = load_adapter(backbone, file, warn=lambda _: None)
        assert 0 < info.change < float("inf") and info.rank > 0

    holds(adapters(whole) | close_to(whole), read, record_property)

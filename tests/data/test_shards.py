"""Shards: the right caption to every picture wherever it stands, and no damage that passes for the end."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.data import Batches, Slices, open_data
from fewstep.data.folder import scan_folder
from fewstep.data.pairs import Pair
from fewstep.data.report import Drops
from fewstep.data.shards import scan_shards
from fewstep.errors import DataError, FewstepError, InputError

from .makers import Base, Settings, encoded, noise, number_of, numbered, picture, write, write_numbered
from .test_open_data import contents


def shard(
    path: Path, members: Sequence[tuple[str, bytes | str | tarfile.TarInfo]], kind: int = tarfile.PAX_FORMAT
) -> Path:
    """A .tar of these members in this order; a header of one's own stands for itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            raw = content if isinstance(content, bytes) else content.encode()
            header = tarfile.TarInfo(name)
            header.size = len(raw)
            tar.addfile(header, io.BytesIO(raw))
    return path


def header(name: str, kind: bytes) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, "elsewhere"
    return made


def scan(place: Path, **options: str) -> tuple[list[Pair], Counter[str]]:
    drops = Drops()
    scanned = scan_folder(place, drops, **options)  # type: ignore[arg-type]
    counts = Counter[str]()
    for reason in drops.report("", 0, 0).dropped:
        counts[reason.reason] += reason.count
    return scanned.pairs, counts


def pairs(number: int) -> list[tuple[str, bytes | str]]:
    return [(f"{number:04d}.png", numbered(number)), (f"{number:04d}.txt", f"number {number}")]


# --------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_pair_by_stem_in_any_order_and_shard_by_shard(tmp_path: Path, kind: int) -> None:
    mixed = [member for number in (3, 1, 2) for member in pairs(number)]
    shard(tmp_path / "a.tar", [*mixed[::2], *mixed[:0:-2], ("readme.md", "x")], kind)
    shard(tmp_path / "b.tar", [("./sub/0001.PNG", numbered(9)), ("./sub/0001.txt", "nine"), *pairs(1)], kind)
    opened = open_data(Settings(data_dir=tmp_path), Base())
    assert contents(opened) == [
        (1, ("number 1",)), (2, ("number 2",)), (3, ("number 3",)), (1, ("number 1",)), (9, ("nine",)),
    ]  # fmt: skip
    assert [opened.data.name(i) for i in (0, 4)] == ["a.tar/0001.png", "b.tar/sub/0001.PNG"]
    assert list(opened.report.lines()) == [f"pictures in 2 shards in {tmp_path}: 5 pictures, 5 captions"]
    one = open_data(Settings(data_dir=tmp_path / "a.tar"), Base())
    assert contents(one) == [(i, (f"number {i}",)) for i in (1, 2, 3)]
    assert one.fingerprint != opened.fingerprint


def test_long_names_and_names_that_are_not_utf8(tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xfcber")
    members = [("d/" * 200 + f"{odd}.png", numbered(5)), ("d/" * 200 + f"{odd}.txt", "five")]
    for number, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path = shard(tmp_path / f"{number}.tar", members, kind)
        opened = open_data(Settings(data_dir=path), Base())
        assert contents(opened) == [(5, ("five",))]
        assert opened.data.name(0).isprintable()


def test_captions_in_json(tmp_path: Path) -> None:
    members: list[tuple[str, bytes | str]] = [
        ("0.png", numbered(0)), ("0.json", json.dumps({"caption": ["zero", "nil", " "], "width": 3})),
        ("1.png", numbered(1)), ("1.json", '{"caption": "not this", "alt": "uno"}'), ("1.txt", "one"),
        ("2.png", numbered(2)), ("2.json", "{"),
        ("3.png", numbered(3)), ("3.json", "[]"),
        ("4.png", numbered(4)), ("4.json", '{"width": 3}'),
        ("5.png", numbered(5)), ("5.json", b"\xff"),
        ("6.png", numbered(6)), ("6.json", b" " * (2**20 + 1)),
    ]  # fmt: skip
    found, dropped = scan(shard(tmp_path / "x.tar", members))
    assert found == [Pair("x.tar/0.png", ("zero", "nil")), Pair("x.tar/1.png", ("one",))]
    assert dropped == {
        "caption is empty": 1,
        "file of captions is not JSON": 1,
        "file of captions is not a JSON object": 1,
        "caption is not text": 1,
        "caption is not UTF-8": 1,
        "file of captions is longer than 1048576 bytes": 1,
    }
    named, _ = scan(tmp_path / "x.tar", caption_column="alt")
    assert named == [Pair("x.tar/1.png", ("uno",))]


def test_which_key_is_asked_for_where_it_is_not_clear(tmp_path: Path) -> None:
    shard(tmp_path / "x.tar", [("0.png", numbered(0)), ("0.json", '{"text": "a", "prompt": "b"}')])
    with pytest.raises(InputError, match=r"several columns .*prompt, text.*--caption_column"):
        scan(tmp_path)
    with pytest.raises(InputError, match="image_column 'jpg' came"):
        scan(tmp_path, image_column="jpg")
    with pytest.raises(InputError, match=r"no caption_column 'capt'; allowed: prompt, text; .*--caption_column NAME"):
        scan(tmp_path, caption_column="capt")


def test_members_of_endings_that_are_not_read_are_named(tmp_path: Path) -> None:
    members: list[tuple[str, bytes | str | tarfile.TarInfo]] = [
        *pairs(0), ("0000.heic", b"the same"), ("1.heic", b""), ("1.txt", "one"),
        ("2.png", numbered(2)), ("2.caption", "two"), ("", header("3.heic", tarfile.SYMTYPE)),
    ]  # fmt: skip
    found, dropped = scan(shard(tmp_path / "x.tar", members))
    assert found == [Pair("x.tar/0000.png", ("number 0",))]
    assert dropped == {
        ".heic files are not read (convert them to .jpg or .png)": 1,
        ".caption files are not read (rename them to .txt)": 1,
        "a link or a sparse file in its tar": 1,
    }


def test_what_belongs_to_nobody_is_counted(tmp_path: Path) -> None:
    members: list[tuple[str, bytes | str | tarfile.TarInfo]] = [
        ("twice.png", numbered(1)), ("twice.txt", "first"), ("twice.png", numbered(2)),
        ("two.txt", "a"), ("two.txt", "b"), ("two.png", numbered(3)),
        ("alone.png", numbered(4)), ("orphan.txt", "of nothing"),
        ("mute.png", numbered(5)), ("mute.txt", "  "), ("latin.png", numbered(6)), ("latin.txt", b"\xfc"),
        ("long.png", numbered(7)), ("long.txt", b"x" * 2_000_000),
        ("._0001.png", b"a mac's"), ("../../escape.png", numbered(8)), ("../../escape.txt", "out"),
        ("", header("link.png", tarfile.SYMTYPE)), ("", header("hard.txt", tarfile.LNKTYPE)),
        ("", header("folder.png", tarfile.DIRTYPE)), ("/abs.png", numbered(9)), ("/abs.txt", "below all the same"),
    ]  # fmt: skip
    found, dropped = scan(shard(tmp_path / "x.tar", members))
    assert found == [Pair("x.tar/abs.png", ("below all the same",))]
    assert dropped == {
        "another picture has the same stem": 2,
        "several caption files of the same stem": 1,
        "no caption file of the same stem": 1,
        "no picture of the same stem": 1,
        "caption is empty": 1,
        "caption is not UTF-8": 1,
        "file of captions is longer than 1048576 bytes": 1,
        "a link or a sparse file in its tar": 2,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar"]


def test_bad_pictures_are_dropped_and_the_others_keep_their_captions(tmp_path: Path) -> None:
    members = [member for number in range(6) for member in pairs(number)]
    whole = encoded(noise(), "JPEG")
    members += [("cut.jpg", whole[: len(whole) // 2]), ("cut.txt", "cut"), ("a.bmp", encoded(picture(), "BMP"))]
    members += [
        ("a.txt", "a bitmap"),
        ("none.png", b""),
        ("none.txt", "x"),
        ("tiny.png", encoded(picture(size=(1, 1)))),
    ]
    members += [("tiny.txt", "x")]
    opened = open_data(Settings(data_dir=shard(tmp_path / "x.tar", members), max_dropped=0.4), Base())
    assert contents(opened)[:6] == [(i, (f"number {i}",)) for i in range(6)]
    assert opened.data.item(6)[1] == ("a bitmap",)
    assert len(opened.data) == 7
    assert [reason.reason for reason in opened.report.dropped] == [
        "empty file", "smaller than 8 pixels", "truncated or damaged",
    ]  # fmt: skip
    again = pickle.loads(pickle.dumps(opened.data))  # noqa: S301  # as worker processes get it where they are not forked
    assert number_of(again.item(4)[0]) == 4


def test_shards_beside_pictures_are_one_too_many(tmp_path: Path) -> None:
    shard(write_numbered(tmp_path, 2) / "x.tar", pairs(1))
    with pytest.raises(InputError, match=r"holds pictures and also shards, such as x\.tar"):
        scan(tmp_path)


# ------------------------------------------------------------------------------------------------------ what is refused


def whole_tar(path: Path) -> bytes:
    return shard(path, [member for number in range(4) for member in pairs(number)]).read_bytes()


@pytest.mark.parametrize("kept", [0, 1, 511, 512, 700, 1024, 1536, 3072, 4000, 8191, 8192, 8192 + 511])
def test_a_shard_that_was_cut_short_is_an_error_wherever(tmp_path: Path, kept: int) -> None:
    raw = whole_tar(tmp_path / "x.tar")
    assert len(raw.rstrip(b"\0")) <= 8192 < len(raw)
    (tmp_path / "x.tar").write_bytes(raw[:kept])
    with pytest.raises(DataError, match=r"x\.tar is cut short or damaged .*allowed is a whole \.tar") as caught:
        scan(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_header_is_not_the_end(tmp_path: Path) -> None:
    raw = bytearray(whole_tar(tmp_path / "x.tar"))
    raw[2048 + 3] ^= 1  # in the second picture's name: its checksum is wrong
    (tmp_path / "x.tar").write_bytes(raw)
    with pytest.raises(DataError, match="no end mark at byte 2048"):
        scan(tmp_path)


def test_shards_in_one_file_are_not_read_by_half(tmp_path: Path) -> None:
    raw = whole_tar(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(raw + raw)
    with pytest.raises(DataError, match="no end mark"):
        scan(tmp_path)


@pytest.mark.parametrize("squeezed", [True, False])
def test_what_is_no_tar_is_an_error(tmp_path: Path, squeezed: bool) -> None:
    raw = gzip.compress(whole_tar(tmp_path / "x.tar")) if squeezed else b"<html>not found</html>" * 100
    (tmp_path / "x.tar").write_bytes(raw)
    with pytest.raises(DataError, match="not compressed"):
        scan(tmp_path)
    (tmp_path / "x.tar").unlink()
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        scan(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize("size", [-(2**40), -512, 2**21, 2**62])
def test_a_header_that_lies_about_its_length_is_an_error_and_no_endless_loop(
    tmp_path: Path, kind: bytes, size: int
) -> None:
    lying = tarfile.TarInfo("a.png")
    lying.type, lying.size = kind, size
    (tmp_path / "x.tar").write_bytes(lying.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(DataError, match=r"cut short or damaged|cannot be read"):
        scan(tmp_path)


def test_a_length_below_nothing_is_an_error_even_where_it_skips_nothing(tmp_path: Path) -> None:
    lying = tarfile.TarInfo("a.png")
    lying.size = -1
    (tmp_path / "x.tar").write_bytes(lying.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(DataError, match="a header points back"):
        scan(tmp_path)


def test_a_file_with_holes_is_counted(tmp_path: Path) -> None:
    """GNU's old sparse header: 512 bytes in the tar that claim to be a terabyte."""
    sparse = tarfile.TarInfo("a.png")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
    raw = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    raw[386:398], raw[398:410] = b"00000000000\0", b"00000001000\0"
    raw[483:495] = b"17777777777\0"
    raw[148:156] = b" " * 8
    raw[148:156] = f"{sum(raw):06o}\0 ".encode()
    (tmp_path / "x.tar").write_bytes(bytes(raw) + bytes(512) + bytes(10240))
    found, dropped = scan(shard(tmp_path / "y.tar", pairs(1)).parent)
    assert [pair.name for pair in found] == ["y.tar/0001.png"]
    assert dropped == {"a link or a sparse file in its tar": 1}


@given(st.binary(max_size=300), st.data())
@settings(deadline=None, max_examples=150)
def test_any_damage_is_pairs_that_are_right_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    raw = bytearray(whole_tar(path))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    at = data.draw(st.integers(0, len(raw)))
    raw[at : at + len(junk)] = junk
    path.write_bytes(raw)
    with suppress(FewstepError):
        for pair in scan_shards([path], Drops())[1]:
            assert pair.captions


# ------------------------------------------------------------------------------------------------------- during a run


def test_a_shard_that_vanishes_or_changes_ends_the_run(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", [member for number in range(6) for member in pairs(number)])
    opened = open_data(Settings(data_dir=path), Base())
    batches = iter(Batches(opened.data, Slices(batch_size=2), seed=1, start=0, end=9))
    next(batches)
    others = [member for number in range(10, 16) for member in pairs(number)]
    shard(path, others)
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match=r"x\.tar was changed after the data was scanned"):
        list(batches)
    path.unlink()
    with pytest.raises(DataError, match=r"x\.tar was there .* cannot be read now: No such file"):
        opened.data.item(0)


def test_damage_inside_a_picture_is_found_when_it_is_decoded(tmp_path: Path) -> None:
    raw = bytearray(encoded(noise()))
    raw[len(raw) // 2 : len(raw) // 2 + 40] = b"\0" * 40
    members = [member for number in range(5) for member in pairs(number)]
    path = shard(tmp_path / "x.tar", [*members, ("bad.png", bytes(raw)), ("bad.txt", "bad")])
    opened = open_data(Settings(data_dir=path, max_dropped=0.2), Base())
    loaded = Batches(opened.data, Slices(batch_size=3), seed=5, start=0, end=4, allowance=opened.allowance)
    for batch in loaded:
        for pixels, caption in zip(batch.pictures, batch.captions, strict=True):
            assert caption == f"number {number_of(pixels.numpy())}"
    assert list(loaded.replaced) == ["x.tar/bad.png"]


def test_pictures_in_a_folder_of_their_own_need_no_shards(tmp_path: Path) -> None:
    write(tmp_path, {"notes.md": "x", ".hidden.tar": b"x"})
    with pytest.raises(DataError, match=r"0 pictures and 0 caption files; .*\.tar shards"):
        scan(tmp_path)

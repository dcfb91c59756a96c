"""Captions: any bytes become a clean caption or a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.data.captions import MAX_CHARACTERS, CaptionError, clean, clean_list, decode, guess_column, read
from fewstep.errors import InputError


def assert_clean(caption: str) -> None:
    assert caption
    assert caption == caption.strip()
    assert caption == " ".join(caption.split())
    assert "\0" not in caption
    caption.encode("utf-8")
    assert clean(caption) == caption


@given(st.binary())
def test_any_bytes_are_clean_or_refused(raw: bytes) -> None:
    try:
        caption = decode(raw)
    except CaptionError:
        return
    assert_clean(caption)


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_any_text_is_clean_or_refused(text: str) -> None:
    try:
        caption = clean(text)
    except CaptionError:
        return
    assert_clean(caption)
    assert [letter for letter in caption if letter.isalnum()] == [letter for letter in text if letter.isalnum()]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_any_cell_gives_captions_or_reasons(value: object) -> None:
    good, reasons = clean_list(value)
    assert good or reasons
    for caption in good:
        assert_clean(caption)


def test_white_space_is_evened_out() -> None:
    assert decode(b"\xef\xbb\xbf  a red\thouse\r\n\r\nby the\x00 lake \n") == "a red house by the lake"
    assert clean("ein\u00a0Haus\u3000am See") == "ein Haus am See"


@pytest.mark.parametrize("text", ["", "   \n", "\x00\x01", "\u200b", "\ufeff\u200d ", "\u0301"])
def test_what_cannot_be_seen_is_empty(text: str) -> None:
    with pytest.raises(CaptionError, match="empty"):
        clean(text)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("Größe".encode("latin-1"), "not UTF-8"),
        ("a house".encode("utf-16"), "not UTF-8"),
        (b"x" * (MAX_CHARACTERS + 1), "longer than"),
        (b"\xff" * (5 * MAX_CHARACTERS), "longer than"),
    ],
)
def test_refused_with_the_reason(raw: bytes, reason: str) -> None:
    with pytest.raises(CaptionError, match=reason):
        decode(raw)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(CaptionError, match="Unicode"):
        clean("a \ud83d house")


def test_ten_kilobytes_are_kept_whole() -> None:
    text = "word " * 2000
    assert decode(text.encode()) == text.strip()


def test_an_unreadable_file_is_a_reason(tmp_path: Path) -> None:
    with pytest.raises(CaptionError, match="cannot be read"):
        read(tmp_path / "missing.txt")


def test_lists_keep_each_caption_once_and_in_order() -> None:
    assert clean_list(["b", "a ", "", "b", 3]) == (["b", "a"], ["caption is empty", "caption is not text"])
    assert clean_list([]) == ([], ["caption is empty"])


def test_the_column_of_captions_is_found_or_asked_for() -> None:
    assert guess_column(["id", "caption", "image"], "x") == "caption"
    with pytest.raises(InputError, match=r"several .*text, prompt.*--caption_column"):
        guess_column(["text", "prompt"], "x")
    with pytest.raises(InputError, match="no columns that may be"):
        guess_column(["id", "url"], "x")

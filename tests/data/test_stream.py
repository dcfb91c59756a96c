"""Shards that are fetched as they are needed: the order is the seed's, and a server may fail in any way it likes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.client import InvalidURL
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from datasets import data_files

from fewstep.benchmark.real import pictures_of_data
from fewstep.config import BenchSettings, TrainSettings
from fewstep.data import Batches, OpenedData, Slices, StreamedPictures, hub, open_data, remote, stream
from fewstep.data.remote import expand
from fewstep.errors import DataError, InputError
from fewstep.reporting import SILENT
from fewstep.train.start import captions_to_show

from .makers import Base, Settings, number_of, numbered
from .test_hub import parquet
from .test_shards import pairs, shard

SHARDS, EACH = 6, 5


class Server:
    """Serves a folder, and fails as it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str, str]] = []
        """Method, path and Range of all that was asked for."""
        self.refusals: list[int] = []
        """Status codes of the next answers to GET."""
        self.cuts: list[int] = []
        """After how many bytes the next answers to GET break off."""
        self.heads, self.ranges = True, True
        """Whether HEAD and Range are known."""
        self.lengths = True
        """Whether HEAD says a length."""
        self.versions = True
        """Whether it says when a file was changed."""
        ours = self

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def send_header(self, keyword: str, value: str) -> None:
                unsaid = {"Last-Modified"} if not ours.versions else set()
                unsaid |= {"Content-Length"} if self.command == "HEAD" and not ours.lengths else set()
                if keyword not in unsaid:
                    super().send_header(keyword, value)

            def do_HEAD(self) -> None:
                ours.asked.append(("HEAD", self.path, ""))
                if ours.heads:
                    super().do_HEAD()
                else:
                    self.send_error(405)

            def do_GET(self) -> None:
                wanted = self.headers.get("Range") or ""
                ours.asked.append(("GET", self.path, wanted))
                if ours.refusals:
                    self.send_error(ours.refusals.pop(0))
                    return
                path = ours.folder / self.path.lstrip("/").partition("?")[0]
                if not path.is_file():
                    self.send_error(404)
                    return
                content = path.read_bytes()
                first = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted and ours.ranges else 0
                self.send_response(206 if wanted and ours.ranges else 200)
                self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
                last = 0 if wanted.endswith("-0") and ours.ranges else len(content) - 1
                if wanted and ours.ranges:
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
                body = content[first : last + 1]
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: ours.cuts.pop(0)] if ours.cuts else body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def fetched(self) -> list[str]:
        return [path for method, path, wanted in self.asked if method == "GET" and not wanted.endswith("-0")]

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    datasets.disable_progress_bars()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Six shards of five pictures: shard 2 has 20 to 24."""
    for number in range(SHARDS):
        members = [member for i in range(EACH) for member in pairs(10 * number + i)]
        shard(tmp_path / "www" / f"set-{number:02d}.tar", members)
    found = Server(tmp_path / "www")
    yield found
    found.stop()


def opened(server: Server, **changes: Any) -> OpenedData:
    asked = {"dataset_name": f"{server.address}/set-{{00..{SHARDS - 1:02d}}}.tar?key=secret", **changes}
    return open_data(Settings(**asked), Base())


def batches(found: OpenedData, slices: Slices | None = None, start: int = 0, end: int = 15, **options: Any) -> Batches:
    return Batches(found.data, slices or Slices(batch_size=4), seed=5, start=start, end=end, **options)


def replace_shard(server: Server, number: int) -> None:
    """By another one of the same length: every caption is another picture's."""
    file = server.folder / f"set-{number:02d}.tar"
    before = file.stat()
    members = [member for i in range(EACH) for member in pairs(10 * number + i)]
    texts = [member for member in members if str(member[0]).endswith(".txt")]
    others = dict(zip([name for name, _ in texts], [text for _, text in [*texts[1:], texts[0]]], strict=True))
    shard(file, [(name, others.get(name, content)) for name, content in members])
    os.utime(file, (before.st_atime, before.st_mtime + 10))
    assert file.stat().st_size == before.st_size


def samples(loaded: Batches) -> list[tuple[tuple[int, int], str]]:
    """((update, position), caption), checked against the pixels."""
    found = []
    for batch in loaded:
        for position, pixels, caption in zip(batch.positions, batch.pictures, batch.captions, strict=True):
            assert caption == f"number {number_of(pixels.numpy())}"
            found.append(((batch.update, position), caption))
    return found


# ------------------------------------------------------------------------------------------------------------ the order


def test_an_epoch_has_every_picture_once_and_the_next_another_order(server: Server) -> None:
    found = opened(server)
    assert isinstance(found.data, StreamedPictures) and len(found.data) == SHARDS * EACH
    seen = [caption for _, caption in samples(batches(found, end=15))]
    everything = {f"number {10 * s + i}" for s in range(SHARDS) for i in range(EACH)}
    assert set(seen[:20]) <= everything and len(set(seen[:20])) == 20, "four shards at a time, mixed"
    assert len({caption[:-1] for caption in seen[:5]}) > 1
    assert Counter(seen) == dict.fromkeys(everything, 2), "two epochs"
    assert seen[:30] != seen[30:]


def test_order_follows_from_the_seed_alone_however_it_is_loaded(server: Server) -> None:
    whole = samples(batches(opened(server)))
    assert samples(batches(opened(server), workers=2)) == whole
    assert samples(batches(opened(server), start=7)) == whole[28:], "a resumed run"
    halves = [
        sample
        for rank in range(2)
        for sample in samples(batches(opened(server), Slices(batch_size=2, processes=2, rank=rank)))
    ]
    assert sorted(halves) == sorted(whole)
    other = Batches(opened(server).data, Slices(batch_size=4), seed=6, start=0, end=15)
    assert samples(other) != whole


def test_a_resumed_run_fetches_the_shards_of_its_buffer_and_no_others(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "WINDOW", 2)
    monkeypatch.setattr(stream, "_in_background", lambda work: None)
    found = opened(server)
    before = set(server.fetched())
    assert len(before) == 1, "one shard says what the data is like"
    next(iter(batches(found, start=10)))  # place 40: in the fifth buffer of ten places
    data = found.data
    assert isinstance(data, StreamedPictures)
    wanted = {f"/set-{number:02d}.tar?key=secret" for number in data._shards_of(5, 4)}
    assert set(server.fetched()) - before == wanted - before


def test_captions_to_look_at_cost_a_resumed_run_no_shard(server: Server) -> None:
    found = opened(server)
    assert samples(batches(found, start=2, end=3))
    asked = len(server.fetched())
    captions = captions_to_show(3, TrainSettings(dataset_name="x"), SimpleNamespace(abilities=None), found)
    assert captions == ["number 0", "number 1", "number 2"]
    assert samples(batches(found, start=2, end=3)) and len(server.fetched()) == asked


def test_no_more_is_kept_than_is_needed(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stream, "WINDOW", 1)
    monkeypatch.setattr(stream, "_in_background", lambda work: work())
    most = 0
    for _ in batches(opened(server), end=30):
        most = max(most, len(list((tmp_path / "cache").rglob("*.tar"))))
    assert most == 3, "the last, this one, and the next"


def test_another_process_may_take_a_shard_away(server: Server, tmp_path: Path) -> None:
    whole = samples(batches(opened(server)))
    found = opened(server)
    seen = []
    for update in range(15):
        for place in (tmp_path / "cache" / "fewstep" / "shards").glob("*/*/[0-9]*"):
            if place.is_dir():
                stream._remove(place)
        seen += samples(batches(found, start=update, end=update + 1))
    assert seen == whole


def served(tmp_path: Path, shards: int, each: int) -> Server:
    for number in range(shards):
        members = [member for i in range(each) for member in pairs((number * each + i) % 256)]
        shard(tmp_path / "many" / f"set-{number:02d}.tar", members)
    return Server(tmp_path / "many")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("shards", "each", "batch", "workers"), [(24, 8, 8, 8), (24, 16, 24, 4)])
def test_many_workers_on_small_shards_take_nothing_from_each_other(
    shards: int, each: int, batch: int, workers: int, tmp_path: Path
) -> None:
    server = served(tmp_path, shards, each)
    try:
        found = opened(server, dataset_name=f"{server.address}/set-{{00..{shards - 1}}}.tar")
        epoch = shards * each // batch
        assert samples(batches(found, Slices(batch_size=batch), end=2 * epoch, workers=workers)) == samples(
            batches(found, Slices(batch_size=batch), end=2 * epoch)
        )
    finally:
        server.stop()


def test_what_others_may_still_be_at_is_kept(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stream, "WINDOW", 1)
    monkeypatch.setattr(stream, "_in_background", lambda work: work())
    server = served(tmp_path, 40, EACH)

    def kept(slices: Slices, workers: int) -> tuple[int, bool]:
        """How many buffers before the twentieth are here once it is read, and whether what was read ahead is."""
        data = opened(server, dataset_name=f"{server.address}/set-{{00..39}}.tar").data
        assert isinstance(data, StreamedPictures)
        Batches(data, slices, seed=5, start=0, end=15, workers=workers)

        def here(window: int) -> bool:
            return (data._home / f"{data._shards_of(5, window)[0]:06d}").is_dir()

        for window in range(21):
            data.index_at(5, window * EACH)
        behind = next(n for n in range(20) if not here(19 - n))
        for window in (25, 20):
            data.index_at(5, window * EACH)
        return behind, here(25)

    assert kept(Slices(batch_size=4), 0) == (1, False), "the one before, and the next"
    assert kept(Slices(batch_size=4), 3) == (6, True), "seven micro-batches of four, over shards of five"
    assert kept(Slices(batch_size=1, processes=4, accumulation=2), 1) == (5, True), "six of four"
    server.stop()


@pytest.mark.skipif(os.name != "posix", reason="elsewhere nobody tells which processes have ended")
def test_where_another_process_of_the_run_is_its_shards_are_kept(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before the updates nothing keeps processes together: one may be far behind in what it caches."""
    monkeypatch.setattr(stream, "WINDOW", 1)
    monkeypatch.setattr(stream, "_in_background", lambda work: work())
    server = served(tmp_path, 12, EACH)
    data = opened(server, dataset_name=f"{server.address}/set-{{00..11}}.tar").data
    assert isinstance(data, StreamedPictures)

    def here() -> set[int]:
        return {window for window in range(12) if (data._home / f"{data._shards_of(5, window)[0]:06d}").is_dir()}

    data.index_at(5, 2 * EACH)
    with subprocess.Popen(["sleep", "60"]) as other:
        (data._home / f"{other.pid}.window").write_text("5 2")
        for window in (3, 4, 5, 6):
            data.index_at(5, window * EACH)
        assert here() == {2, 3, 5, 6, 7}, "its own, the next, and this one's"
        other.kill()
    data.index_at(5, 8 * EACH)
    assert here() == {7, 8, 9} and not (data._home / f"{other.pid}.window").exists()
    server.stop()


def test_a_shard_that_is_taken_away_while_it_is_looked_over_is_fetched_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, look = samples(batches(opened(server))), remote.RemoteShards.open
    taken: Counter[int] = Counter()

    def interrupted(self: remote.RemoteShards, number: int, folder: Path) -> stream.OpenedShard:
        taken[number] += 1
        if taken[number] < 9:
            stream._remove(folder)
        return look(self, number, folder)

    monkeypatch.setattr(remote.RemoteShards, "open", interrupted)
    assert samples(batches(opened(server))) == whole
    monkeypatch.setattr(stream, "_REPEATS", 3)
    taken.clear()
    with pytest.raises(DataError, match=r"set-00\.tar cannot be read"):
        opened(server)


def test_what_somebody_else_has_fetched_again_is_left_in_its_place(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy that was looked over is gone; another one stands where it was."""
    found, look = opened(server), remote.RemoteShards.open
    seen: list[bytes] = []

    def replaced(self: remote.RemoteShards, number: int, folder: Path) -> stream.OpenedShard:
        if not seen:
            file = next(folder.glob("*.tar"))
            seen.append(file.read_bytes())
            stream._remove(folder)
            folder.mkdir()
            (folder / file.name).write_bytes(seen[0])
            raise DataError("gone")
        return look(self, number, folder)

    monkeypatch.setattr(remote.RemoteShards, "open", replaced)
    # Fetching ahead may come between the two copies, and fetch one.
    monkeypatch.setattr(stream, "_in_background", lambda work: None)
    server.asked.clear()
    samples(batches(found, end=1))
    assert seen and len(server.fetched()) == len(set(server.fetched())), "none was fetched twice"


def test_two_runs_on_one_source_take_nothing_from_each_other(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stream, "WINDOW", 1)
    monkeypatch.setattr(stream, "_in_background", lambda work: work())
    shards = tmp_path / "cache" / "fewstep" / "shards"

    def here() -> set[Path]:
        return set(shards.rglob("*.tar"))

    found = opened(server)
    first = samples(batches(found, end=4))
    mine = here()
    assert len(mine) == 3

    def other_run() -> None:
        samples(Batches(opened(server).data, Slices(batch_size=4), seed=6, start=0, end=15))

    for _ in range(2):
        other = multiprocessing.get_context("fork").Process(target=other_run)
        other.start()
        other.join(60)
        assert other.exitcode == 0
        assert mine < here() and len(here()) <= 6, "of runs that have ended, what one left"
    assert first + samples(batches(found, start=4)) == samples(batches(opened(server)))


def test_a_run_takes_over_what_one_that_has_ended_left(server: Server) -> None:
    def ended() -> None:
        samples(batches(opened(server), end=1))

    before = multiprocessing.get_context("fork").Process(target=ended)
    before.start()
    before.join(60)
    assert before.exitcode == 0
    server.asked.clear()
    samples(batches(opened(server), end=1))
    assert not [path for path in server.fetched() if "set-00" in path], "the first shard was here"


def test_the_processes_of_a_run_share_what_they_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = stream._run()
    assert alone.endswith(f"-{os.getpid()}")
    monkeypatch.setattr(stream, "is_initialized", lambda: True)
    monkeypatch.setattr(stream, "get_world_size", lambda: 2)
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert stream._run().endswith(f"-29500-{os.getppid()}") and stream._run() != alone


def test_an_item_is_of_its_shards_very_content(server: Server, tmp_path: Path) -> None:
    def numbers() -> dict[int, set[int]]:
        """Shard to the items that an epoch draws from it."""
        data = opened(server).data
        assert isinstance(data, StreamedPictures)
        drawn: dict[int, set[int]] = {}
        for place in range(2 * SHARDS * EACH):
            index = data.index_at(5, place)
            drawn.setdefault(index % SHARDS, set()).add(index)
        return drawn

    server.versions = False
    fingerprint, before = opened(server).fingerprint, numbers()
    assert [len(items) for items in before.values()] == [EACH] * SHARDS
    assert numbers() == before, "the same in every run"
    replace_shard(server, 3)
    shutil.rmtree(tmp_path / "cache")
    assert opened(server).fingerprint == fingerprint, "nobody says so before the shard is here"
    after = numbers()
    assert {shard_ for shard_ in before if before[shard_] != after[shard_]} == {3}
    assert not before[3] & after[3]


def test_an_item_whose_shard_has_changed_since_it_was_drawn_is_refused(server: Server, tmp_path: Path) -> None:
    server.versions = False
    data = opened(server).data
    assert isinstance(data, StreamedPictures)
    drawn = [data.index_at(5, place) for place in range(SHARDS * EACH)]
    of_three = next(index for index in drawn if index % SHARDS == 3)
    of_four = next(index for index in drawn if index % SHARDS == 4)
    replace_shard(server, 3)
    shutil.rmtree(tmp_path / "cache")
    data._opened.clear()
    assert data.item(of_four)
    for read in (data.item, data.captions):
        with pytest.raises(DataError, match=r"set-03\.tar was changed after the data was scanned; training data must"):
            read(of_three)


def test_a_shard_with_more_and_one_with_fewer_pictures(server: Server, tmp_path: Path) -> None:
    for number, count in ((1, 2), (2, 9)):
        members = [member for i in range(count) for member in pairs(10 * number + i)]
        shard(tmp_path / "www" / f"set-{number:02d}.tar", members)
    loaded = samples(batches(opened(server), end=60))
    counted = Counter(caption for _, caption in loaded)
    assert len(loaded) == 240 and set(counted) == {
        f"number {10 * s + i}" for s, count in enumerate((5, 2, 9, 5, 5, 5)) for i in range(count)
    }
    found = opened(server)
    assert {found.data.item(index)[1] for index in (1, 13)} == {("number 10",)}, "the third of two is the first"


def test_workers_that_are_not_forked_get_it_whole(server: Server) -> None:
    found = opened(server)
    again = pickle.loads(pickle.dumps(found.data))  # noqa: S301
    index = again.index_at(5, 3)
    assert index == found.data.index_at(5, 3) and again.captions(index) == found.data.captions(index)  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------------------- the server


def test_what_passes_is_waited_for_and_what_came_is_not_fetched_again(server: Server) -> None:
    server.refusals = [503, 429]
    server.cuts = [1500]
    found = opened(server)
    assert server.asked[-4:] == [
        ("GET", "/set-00.tar?key=secret", ""),
        ("GET", "/set-00.tar?key=secret", ""),
        ("GET", "/set-00.tar?key=secret", ""),
        ("GET", "/set-00.tar?key=secret", "bytes=1500-"),
    ]
    assert found.data.captions(0) == ("number 0",)


def test_servers_without_head_or_without_ranges(server: Server) -> None:
    server.heads = False
    with_ranges = opened(server).fingerprint
    server.ranges, server.cuts = False, [10] * SHARDS + [1500]
    found = opened(server, dataset_name=f"{server.address}/set-{{00..05}}.tar?key=other")
    assert samples(batches(found)) and found.fingerprint == with_ranges


def test_a_server_that_says_a_length_only_when_it_sends(server: Server) -> None:
    server.lengths, server.cuts = False, [1500]
    found = opened(server)
    assert server.asked[-1] == ("GET", "/set-00.tar?key=secret", "bytes=1500-")
    assert samples(batches(found))


def test_a_server_that_goes_away_is_one_line_without_secrets(server: Server) -> None:
    found = opened(server)
    server.stop()
    with pytest.raises(
        DataError, match=r"/set-0\d\.tar cannot be had: .*refused, 5 times in a row; .*latest"
    ) as caught:
        samples(batches(found))
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"cannot be had: .*refused, 5 times in a row"):
        samples(batches(found, workers=2))


def test_a_shard_that_is_not_there_is_said_before_the_run(server: Server) -> None:
    with pytest.raises(DataError, match=r"/set-06\.tar cannot be had: the server says 404 .*; check the URL"):
        opened(server, dataset_name=f"{server.address}/set-{{00..06}}.tar")
    assert not server.fetched()


def test_a_shard_that_changes_during_the_run(server: Server, tmp_path: Path) -> None:
    found = opened(server)
    for number in range(1, SHARDS):
        shard(tmp_path / "www" / f"set-{number:02d}.tar", pairs(1))
    with pytest.raises(DataError, match=r"\.tar was changed after the data was scanned"):
        samples(batches(found))
    assert opened(server).fingerprint != found.fingerprint


def test_a_shard_replaced_by_one_of_the_same_length_is_other_data(server: Server) -> None:
    before = opened(server).fingerprint
    assert opened(server).fingerprint == before
    replace_shard(server, 3)
    assert opened(server).fingerprint != before


def test_another_column_of_captions_is_other_data_even_where_the_first_shard_has_it_twice(server: Server) -> None:
    for number in range(SHARDS):
        captions = f'{{"a": "number 1", "b": "number {1 + min(number, 1)}"}}'
        shard(server.folder / f"set-{number:02d}.tar", [("1.png", numbered(1)), ("1.json", captions)])
    assert opened(server, caption_column="a").fingerprint != opened(server, caption_column="b").fingerprint


def test_a_broken_shard_and_a_bad_one_are_named(server: Server, tmp_path: Path) -> None:
    whole = (tmp_path / "www" / "set-03.tar").read_bytes()
    (tmp_path / "www" / "set-03.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"set-03\.tar is cut short or damaged"):
        samples(batches(opened(server)))
    (tmp_path / "www" / "set-03.tar").write_bytes(whole)
    (tmp_path / "www" / "set-04.tar").write_bytes(b"")
    shard(tmp_path / "www" / "set-04.tar", [*pairs(40), ("x.png", b"junk"), ("x.txt", "junk")])
    with pytest.raises(DataError, match=r"set-04\.tar: 50\.00% of the data cannot be used \(1 picture: not a picture"):
        samples(batches(opened(server)))
    said = [str(one) for batch in batches(opened(server, max_dropped=0.5), workers=2, end=15) for one in batch.replaced]
    assert len(said) == 1 and "set-04.tar: dropped 1 picture: not a picture" in said[0], "by whichever worker, once"


def test_a_full_disk_is_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, chunk: bytes) -> None:
        raise remote._Unwritable(OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(remote._Kept, "write", full)
    with pytest.raises(DataError, match=r"cannot be written to: No space left on device; .*XDG_CACHE_HOME"):
        opened(server)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://host/set-{0003..0001}.tar", r"the range \{0003\.\.0001\}; allowed is"),
        ("https://host/{0..9999}-{0..9999}.tar", "at most 1,000,000 shards"),
        ("https://host/set.zip", r"is no shard; allowed by URL are \.tar files"),
        ("https:///set.tar", "is no shard"),
    ],
)
def test_patterns_that_name_no_shards(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_data(Settings(dataset_name=name), Base())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://me:my-word@host/set.tar", "an address with a user name in it; allowed is one without; use a signed"),
        ("https://me:my-w@rd@host/set-{5..1}.zip", "an address with a user name in it"),
        ("https://my-word@host/set.tar", "an address with a user name in it"),
        ("https://my-w?rd@host/set.tar", "an address with a user name in it"),
        ("https://me:my-w/rd@host/set.tar", r"host or port cannot be read; allowed is https://HOST/PATH\.tar"),
        ("https://[my-word/set.tar", "host or port cannot be read"),
        ("https://host/set-{5..1}.tar?sig=my-word", r"'https://host/set-\{5\.\.1\}\.tar' has the range"),
        ("https://host/set.zip?sig=my-word", r"'https://host/set\.zip' is no shard"),
    ],
)
def test_an_address_with_a_secret_is_refused_without_it(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_data(Settings(dataset_name=name), Base())
    assert "my-w" not in str(caught.value)


@pytest.mark.parametrize("name", ["set my-word.tar", "sät-00.tar"])
def test_an_address_that_cannot_be_asked_for_is_asked_for_once(
    name: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, asked = remote._asked, list[str]()
    monkeypatch.setattr(remote, "_asked", lambda url, *more: asked.append(url) or ask(url, *more))  # type: ignore[func-returns-value]
    with pytest.raises(DataError, match=r"is none that can be asked for; allowed is .*check the URL") as caught:
        opened(server, dataset_name=f"{server.address}/{name}?sig=other-word")
    assert len(asked) == 1 and "other-word" not in str(caught.value)


def test_what_the_client_says_of_an_address_is_not_repeated(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise InvalidURL("nonnumeric port: 'my-word@host'")

    monkeypatch.setattr(remote, "_asked", asked)
    with pytest.raises(DataError, match="is none that can be asked for") as caught:
        opened(server)
    assert "my-word" not in str(caught.value) and caught.value.__suppress_context__


def test_patterns() -> None:
    assert expand("http://h/a{08..11}.tar") == [f"http://h/a{n}.tar" for n in ("08", "09", "10", "11")]
    assert expand("http://h/{0..1}/{5..6}.tar?x={}") == [
        f"http://h/{a}/{b}.tar?x={{}}" for a in (0, 1) for b in (5, 6)
    ]  # fmt: skip
    assert expand("http://h/one.tar") == ["http://h/one.tar"]


def test_where_urls_and_streams_do_not_belong(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist; .*; pass shards by URL as --dataset_name"):
        open_data(Settings(data_dir=Path("https://host/set-00.tar")), Base())
    with pytest.raises(InputError, match="streaming came without dataset_name"):
        TrainSettings(data_dir=tmp_path, streaming=True)
    asked = BenchSettings(dataset_name=f"{server.address}/set-00.tar", resolution=16)
    with pytest.raises(InputError, match="came by URL, of which a part at a time is here; allowed for a benchmark"):
        pictures_of_data(asked, Base(), SILENT)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------- datasets of the Hub


def dataset(folder: Path) -> str:
    """A split of six files, as the Hub has large ones."""
    for number in range(SHARDS):
        images = [numbered(10 * number + i) for i in range(EACH)]
        parquet(folder, list(images), f"train-{number:05d}-of-{SHARDS:05d}", text=[
            f"number {10 * number + i}" for i in range(EACH)])  # fmt: skip
    return str(folder)


def test_a_dataset_is_streamed_file_by_file_in_the_order_of_the_seed(tmp_path: Path) -> None:
    name = dataset(tmp_path / "set")
    found = open_data(Settings(dataset_name=name), Base(), streaming=True)
    assert isinstance(found.data, StreamedPictures) and len(found.data) == SHARDS * EACH
    assert len(list((tmp_path / "cache").rglob("rows.arrow"))) == 1
    whole = samples(batches(found))
    assert Counter(caption for _, caption in whole) == {
        f"number {10 * s + i}": 2 for s in range(SHARDS) for i in range(EACH)
    }
    again = open_data(Settings(dataset_name=name), Base(), streaming=True)
    assert again.fingerprint == found.fingerprint
    assert samples(batches(again, start=7, workers=2)) == whole[28:]
    assert not list((tmp_path / "hub").rglob("*.arrow")), "nothing was downloaded as a whole"


def test_a_file_of_a_dataset_that_was_replaced_is_other_data(tmp_path: Path) -> None:
    name = dataset(tmp_path / "set")
    before = open_data(Settings(dataset_name=name), Base(), streaming=True)
    file = tmp_path / "set" / f"train-00003-of-{SHARDS:05d}.parquet"
    shutil.copytree(tmp_path / "set", tmp_path / "elsewhere" / "set")  # with its times
    moved = open_data(Settings(dataset_name=str(tmp_path / "elsewhere" / "set")), Base(), streaming=True)
    assert moved.fingerprint == before.fingerprint
    parquet(tmp_path / "set", [numbered(30 + i) for i in range(EACH)], file.stem, text=[
        f"number {30 + (i + 1) % EACH}" for i in range(EACH)])  # fmt: skip
    after = open_data(Settings(dataset_name=name), Base(), streaming=True)
    assert isinstance(before.data, StreamedPictures) and isinstance(after.data, StreamedPictures)
    assert before.data.first.fingerprint == after.data.first.fingerprint
    assert after.fingerprint != before.fingerprint


def test_another_commit_of_a_dataset_is_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = dataset(tmp_path / "set")
    of_files, commit = data_files._get_origin_metadata, "1111"

    def said(files: list[str], *_: Any, **__: Any) -> list[tuple[str, ...]]:
        return [("owner/set", commit)] * len(of_files(files))

    monkeypatch.setattr(data_files, "_get_origin_metadata", said)
    found = [open_data(Settings(dataset_name=name), Base(), streaming=True).fingerprint for _ in range(2)]
    commit = "2222"
    assert found[0] == found[1] != open_data(Settings(dataset_name=name), Base(), streaming=True).fingerprint


def test_a_dataset_that_vanishes_while_it_is_streamed(tmp_path: Path) -> None:
    name = dataset(tmp_path / "set")
    found = open_data(Settings(dataset_name=name), Base(), streaming=True)
    for file in (tmp_path / "set").glob("*.parquet"):
        file.unlink()
    with pytest.raises(
        DataError, match=r"split train, file \d of 6 cannot be read \(.*--resume_from_checkpoint"
    ) as said:
        samples(batches(found))
    assert "\n" not in str(said.value)


def test_a_file_that_is_taken_away_while_it_is_looked_over_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, look, taken = dataset(tmp_path / "set"), hub.HubShards.open, list[int]()

    def interrupted(self: hub.HubShards, number: int, folder: Path) -> stream.OpenedShard:
        if number not in taken:
            taken.append(number)
            stream._remove(folder)
        return look(self, number, folder)

    monkeypatch.setattr(hub.HubShards, "open", interrupted)
    assert samples(batches(open_data(Settings(dataset_name=name), Base(), streaming=True), end=15))
    assert len(taken) == SHARDS


def test_columns_of_a_streamed_dataset_are_found_or_asked_for(tmp_path: Path) -> None:
    name = parquet(tmp_path / "set", [numbered(1)], text=["wrong"], prompt=["number 1"])
    with pytest.raises(InputError, match=r"several columns .*--caption_column"):
        open_data(Settings(dataset_name=name), Base(), streaming=True)
    asked = Settings(dataset_name=name, caption_column="prompt")
    assert samples(batches(open_data(asked, Base(), streaming=True), end=1))

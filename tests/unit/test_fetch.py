"""Fetching COCO from a local server that also stalls, cuts short and refuses."""

import io
import json
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tenacity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from file_server import Behaviour, FileServer, cut, once, reply, serve, stall, status
from layersense import progress
from layersense.calibration import download
from layersense.calibration.build import build_database
from layersense.calibration.database import open_database
from layersense.calibration.download import Downloader, RefusedError, Wanted, shown
from layersense.calibration.fetch import fetch_coco
from layersense.config import CocoDataset, Fetch
from layersense.errors import LayersenseError
from layersense.settings import dataset_settings, fetch_settings
from layersense.validation import load_config

IMAGES = 20
SAMPLED = 12
"""Of them, by the captions and by the images that 4 + 2 rows draw."""
FIRST = "/photos/1.jpg"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits are asked for, and none of them is long."""
    monkeypatch.setattr(download, "_backoff", tenacity.wait_fixed(0.01))
    monkeypatch.setattr(download, "STALL", 0.5)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve() as state:
        for key in range(1, IMAGES + 1):
            buffer = io.BytesIO()
            Image.effect_noise((40 + key, 30), 60).convert("RGB").save(buffer, "JPEG")
            state.files[f"/photos/{key}.jpg"] = buffer.getvalue()
        state.files["/notes/annotations.zip"] = annotations(state)
        yield state


def listing(state: FileServer, **changes: Any) -> dict[str, Any]:
    images = [
        {
            "id": key,
            "file_name": f"{key}.jpg",
            "width": 40 + key,
            "height": 30,
            "coco_url": f"{state.address}/photos/{key}.jpg",
        }
        for key in range(1, IMAGES + 1)
    ]
    captions = [{"id": 100 + i, "image_id": i, "caption": f"photo {i}"} for i in range(1, 21)]
    return {"images": images, "annotations": captions, **changes}


def annotations(state: FileServer, **changes: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        content = json.dumps(listing(state, **changes))
        archive.writestr("annotations/captions_val2017.json", content)
    return buffer.getvalue()


def coco(state: FileServer, root: Path, **changes: Any) -> CocoDataset:
    return CocoDataset.model_validate(
        {
            "source": "coco",
            "root": str(root),
            "split": "val2017",
            "calibration": 4,
            "heldout": 2,
            "fetch": {"annotations": f"{state.address}/notes/annotations.zip"},
            **changes,
        }
    )


def fetch(state: FileServer, root: Path, **changes: Any) -> dict[str, Any]:
    out = root.parent / "fetched.json"
    fetch_coco("photos", coco(state, root, **changes), out)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def photographs(root: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (root / "val2017").iterdir()}


# --- what is fetched


def test_annotations_once_then_the_sampled_images_alone(
    server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    root = tmp_path / "coco"
    record = fetch(server, root)
    there = photographs(root)
    assert record["sampled"] == record["fetched"] == len(there) == SAMPLED
    for name, data in there.items():
        assert data == server.files[f"/photos/{name}"]
    assert server.times("/notes/annotations.zip") == 1
    assert len(server.asked) == 1 + len(there)
    assert f"fetch images: {len(there)} of {len(there)}" in caplog.text
    dataset = coco(server, root)
    build_database("photos", dataset, tmp_path / "a.sqlite")
    with open_database(tmp_path / "a.sqlite") as database:
        assert database.count("caption", "calibration") == 4
        drawn = {
            row.image_path.name
            for unit in ("caption", "image", "pair")
            for split in ("calibration", "heldout")
            for row in database.rows(unit, split)  # type: ignore[arg-type]
            if row.image_path
        }
    assert drawn == set(there)


def test_nothing_twice_and_a_larger_sample_fetches_what_is_new(
    server: FileServer, tmp_path: Path
) -> None:
    root = tmp_path / "coco"
    first = fetch(server, root, calibration=2, heldout=1)
    asked = list(server.asked)
    assert fetch(server, root, calibration=2, heldout=1)["fetched"] == 0
    assert server.asked == asked
    record = fetch(server, root, calibration=5, heldout=1)
    assert record["fetched"] == record["sampled"] - first["sampled"] > 0
    assert max(map(server.times, {path for path, _ in server.asked})) == 1


def test_what_somebody_else_put_there_is_kept(server: FileServer, tmp_path: Path) -> None:
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    (root / "annotations/captions_val2017.json").write_text(json.dumps(listing(server)))
    (root / "val2017").mkdir()
    for key in range(1, IMAGES + 1):
        (root / f"val2017/{key}.jpg").write_bytes(b"mine")
    assert fetch(server, root)["fetched"] == 0
    assert server.asked == []


def test_images_in_a_zip_are_not_fetched(server: FileServer, tmp_path: Path) -> None:
    root = tmp_path / "coco"
    root.mkdir()
    with zipfile.ZipFile(root / "val2017.zip", "w") as archive:
        for key in range(1, IMAGES + 1):
            archive.writestr(f"val2017/{key}.jpg", server.files[f"/photos/{key}.jpg"])
    assert fetch(server, root)["fetched"] == 0
    assert len(server.asked) == 1
    with zipfile.ZipFile(root / "val2017.zip", "w") as archive:
        archive.writestr("val2017/none.jpg", b"")
    with pytest.raises(LayersenseError, match="into which nothing can be fetched"):
        fetch(server, root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_root_that_is_complete_may_be_read_only(server: FileServer, tmp_path: Path) -> None:
    root = tmp_path / "coco"
    fetch(server, root)
    root.chmod(0o500)
    try:
        assert fetch(server, root)["fetched"] == 0
    finally:
        root.chmod(0o700)


def test_few_connections_at_once(server: FileServer, tmp_path: Path) -> None:
    def slow(handler: Any, data: bytes, before: int) -> bool:
        server.hold.wait(0.05)
        return False

    server.bad = dict.fromkeys(server.files, slow)
    dataset = coco(server, tmp_path / "coco", calibration=16, heldout=4)
    fetch_coco("photos", dataset, tmp_path / "out.json", connections=3)
    assert 2 <= server.at_once <= 3
    assert len(server.asked) == 21


# --- a server that behaves badly for a while


BAD: dict[str, Callable[[FileServer], Behaviour]] = {
    "cut short": lambda state: cut(200),
    "cut short without a length": lambda state: once(cut(200, length=False)),
    "stalled": lambda state: stall(state, 200),
    "silent": lambda state: stall(state, 0),
    "429": lambda state: status(429, Retry_After="0"),
    "429 with a date": lambda state: status(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
    "429 without a time": lambda state: status(429),
    "503": lambda state: status(503),
    "500 with a page": lambda state: status(500, b"<html>"),
    "a page of a proxy": lambda state: status(200, b"<html>please log in</html>"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_passes_is_tried_again(server: FileServer, tmp_path: Path, kind: str) -> None:
    for path in server.files:
        server.bad[path] = once(BAD[kind](server))
    root = tmp_path / "coco"
    assert fetch(server, root)["fetched"] == SAMPLED
    for name, data in photographs(root).items():
        assert data == server.files[f"/photos/{name}"]
    assert [file.name for file in root.rglob(".*") if file.name != ".fetch.lock"] == []


def test_retry_after_is_waited_for(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(tenacity, "sleep_using_event", lambda event: waits.append)
    server.bad[FIRST] = once(status(429, Retry_After="7"), 2)
    one(server, tmp_path)
    assert waits == [7.0, 7.0]


def test_a_server_that_asks_for_an_hour_is_left_alone(server: FileServer, tmp_path: Path) -> None:
    server.bad[FIRST] = status(503, Retry_After="3600")
    with pytest.raises(LayersenseError, match="answers 503 and asks to come back in 3600 s"):
        one(server, tmp_path)
    assert server.times(FIRST) == 1


def whole(path: Path) -> None:
    try:
        with Image.open(path) as image:
            image.load()
    except OSError as error:
        raise LayersenseError(f"no image ({error})") from error


def one(
    state: FileServer, folder: Path, path: str = FIRST, limit: int = 10**7, query: str = ""
) -> bytes:
    target = folder / "one.jpg"
    with Downloader(1) as downloader:
        downloader.fetch(Wanted(f"{state.address}{path}{query}", target, limit, whole))
    return target.read_bytes()


def test_a_file_that_was_cut_is_taken_up_where_it_ended(server: FileServer, tmp_path: Path) -> None:
    size = len(server.files[FIRST])
    server.bad[FIRST] = once(cut(300))
    assert one(server, tmp_path) == server.files[FIRST]
    assert [asked for _, asked in server.asked] == ["", "bytes=300-"]
    assert server.sent[FIRST] == size - 300


def test_what_an_earlier_call_left_is_taken_up(server: FileServer, tmp_path: Path) -> None:
    server.bad[FIRST] = cut(300)
    with pytest.raises(LayersenseError, match="could not be fetched in 6 tries"):
        one(server, tmp_path)
    assert (tmp_path / ".one.jpg.part").stat().st_size == 300
    server.bad.clear()
    assert one(server, tmp_path) == server.files[FIRST]
    assert server.sent[FIRST] == len(server.files[FIRST]) - 300


def test_a_file_that_changed_meanwhile_is_fetched_whole(server: FileServer, tmp_path: Path) -> None:
    server.bad[FIRST] = once(cut(300))
    other = server.files["/photos/2.jpg"]

    def change(handler: Any, data: bytes, before: int) -> bool:
        server.files[FIRST] = other
        return cut(300)(handler, data, before)

    server.bad[FIRST] = once(change)
    assert one(server, tmp_path) == other


def test_a_part_that_is_longer_than_the_file_is_dropped(server: FileServer, tmp_path: Path) -> None:
    from file_server import etag

    (tmp_path / ".one.jpg.part").write_bytes(server.files[FIRST] + b"more")
    (tmp_path / ".one.jpg.etag").write_text(etag(server.files[FIRST]))
    assert one(server, tmp_path) == server.files[FIRST]
    assert [asked[:7] for _, asked in server.asked] == [
        "bytes=" + str(len(server.files[FIRST]))[:1],
        "",
    ]


def test_another_range_than_was_asked_for_is_not_taken(server: FileServer, tmp_path: Path) -> None:
    def wrong(handler: Any, data: bytes, before: int) -> bool:
        if before == 0:
            return cut(300)(handler, data, before)
        if before == 1:
            reply(handler, 206, data[100:], Content_Range=f"bytes 100-{len(data) - 1}/{len(data)}")
            return True
        return False

    server.bad[FIRST] = wrong
    assert one(server, tmp_path) == server.files[FIRST]


def test_a_bad_line_gets_further_with_each_try(server: FileServer, tmp_path: Path) -> None:
    """More tries than TRIES, since each one brings something."""
    step = len(server.files[FIRST]) // 12 + 1

    def crumbs(handler: Any, data: bytes, before: int) -> bool:
        from file_server import etag

        start = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        body = data[start : start + step]
        about = {"Content_Length": str(len(data) - start), "ETag": etag(data)}
        if start:
            about["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        reply(handler, 206 if start else 200, body, **about)
        handler.close_connection = True
        return True

    server.bad[FIRST] = crumbs
    assert one(server, tmp_path) == server.files[FIRST]
    assert server.times(FIRST) == 12


# --- a server that behaves badly for good: one sentence


@pytest.mark.parametrize(
    ("behaviour", "sentence", "tries"),
    [
        (status(404), "the server answers 404 Not Found; correct the address", 1),
        (status(403), "the server answers 403 Forbidden", 1),
        (status(429), "could not be fetched in 6 tries (the server answers 429 Too Many", 6),
        (cut(0), "could not be fetched in 6 tries (", 6),
        (status(200, b"<html>"), "what came is not what was expected, twice: no image", 2),
        (status(200, b""), "what came is not what was expected, twice: no image", 2),
        (status(302, Location="file:///etc/passwd"), "leads to no file", 1),
        (status(302, Location=FIRST), "leads to no file", 21),
        (status(200, b"x", Content_Encoding="gzip"), "the server sends it packed (gzip)", 1),
        (status(200, b"x" * 2000), "has more than 0 MiB", 1),
        (cut(2000, length=False), "has more than 0 MiB", 1),
    ],
)
def test_what_does_not_pass_is_one_sentence(
    server: FileServer, tmp_path: Path, behaviour: Behaviour, sentence: str, tries: int
) -> None:
    server.bad[FIRST] = behaviour
    server.files[FIRST] *= 3
    limit = 1500 if "MiB" in sentence else 10**7
    with pytest.raises(LayersenseError) as told:
        one(server, tmp_path, limit=limit, query="?token=secret")
    assert sentence in str(told.value)
    assert "secret" not in str(told.value)
    assert "\n" not in str(told.value)
    assert server.times(FIRST) == tries
    assert not (tmp_path / "one.jpg").exists()


def test_no_server_is_one_sentence(tmp_path: Path) -> None:
    with serve() as gone:
        pass
    with pytest.raises(LayersenseError, match=r"could not be fetched in 6 tries .*connect to the"):
        one(gone, tmp_path)


def test_images_that_are_gone_are_told_together_and_the_others_fetched(
    server: FileServer, tmp_path: Path
) -> None:
    root = tmp_path / "coco"
    fetch(server, root, calibration=16, heldout=4)
    sampled = {f"/photos/{name}" for name in photographs(root)}
    assert len(sampled) == IMAGES
    again = tmp_path / "again"
    for path in ("/photos/3.jpg", "/photos/5.jpg"):
        server.bad[path] = status(404)
    with pytest.raises(LayersenseError) as told:
        fetch(server, again, calibration=16, heldout=4)
    assert "2 of 20 images could not be fetched, all others are there" in str(told.value)
    assert "404 Not Found" in str(told.value)
    assert "(and 1 more)" in str(told.value)
    assert len([name for name in photographs(again) if name[0] != "."]) == 18
    server.bad.clear()
    assert fetch(server, again, calibration=16, heldout=4)["fetched"] == 2


def test_an_unreachable_server_ends_it_at_once(server: FileServer, tmp_path: Path) -> None:
    root = tmp_path / "coco"
    fetch(server, root)
    for path in server.files:
        server.bad[path] = status(503)
    with pytest.raises(LayersenseError, match="answers 503"):
        fetch(server, root, calibration=16, heldout=4)
    asked = [path for path, _ in server.asked[1 + SAMPLED :]]
    assert len(set(asked)) <= 8, "the rest is given up"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["images"][0].pop("coco_url"), "image 1 has no `coco_url`"),
        (lambda c: c["images"][0].update(coco_url="ftp://host/1.jpg"), "begins with http://"),
        (lambda c: c["images"][0].update(coco_url="file:///etc/passwd"), "begins with http://"),
        (lambda c: c["images"][0].update(coco_url="http:///1.jpg"), "begins with http://"),
        (lambda c: c["images"][0].update(coco_url="http://[::1"), "begins with http://"),
        (lambda c: c["images"][0].update(file_name="../1.jpg"), "inside the image folder"),
        (lambda c: c["images"][0].update(file_name="/tmp/1.jpg"), "inside the image folder"),
        (lambda c: c["images"][0].update(width=999), "41×30 pixels, but 999×30 are listed"),
    ],
)
def test_bad_annotations_are_one_sentence(
    server: FileServer, tmp_path: Path, change: Callable[[dict[str, Any]], object], sentence: str
) -> None:
    content = listing(server)
    change(content)
    server.files["/notes/annotations.zip"] = annotations(server, **content)
    root = tmp_path / "coco"
    with pytest.raises(LayersenseError) as told:
        fetch(server, root, calibration=16, heldout=4)
    assert sentence in str(told.value)
    assert not (tmp_path / "fetched.json").exists()
    assert not (root / "1.jpg").exists()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"<html>", "is not a whole zip file"),
        (b"PK\x05\x06" + bytes(18), "holds neither captions_val2017.json nor instances_val2017"),
    ],
)
def test_a_bad_zip_of_annotations(
    server: FileServer, tmp_path: Path, data: bytes, sentence: str
) -> None:
    server.files["/notes/annotations.zip"] = data
    with pytest.raises(LayersenseError, match=sentence):
        fetch(server, tmp_path / "coco")
    assert not list(tmp_path.rglob("annotations.zip"))


def test_a_damaged_member_is_seen_by_its_checksum(server: FileServer, tmp_path: Path) -> None:
    good = server.files["/notes/annotations.zip"]
    bad = bytearray(good)
    bad[len(bad) // 3] ^= 0xFF
    server.bad["/notes/annotations.zip"] = once(status(200, bytes(bad)))
    assert fetch(server, tmp_path / "coco")["fetched"] == SAMPLED
    assert (tmp_path / "coco/annotations/annotations.zip").read_bytes() == good


@pytest.mark.parametrize("name", ["..zip", ".hidden.zip", "a%2Fb.zip", "a.json", ""])
def test_the_zip_gets_a_plain_name_in_its_folder(
    server: FileServer, tmp_path: Path, name: str
) -> None:
    url = f"{server.address}/notes/{name}"
    root = tmp_path / "coco"
    if name == "a%2Fb.zip":
        server.files["/notes/a%2Fb.zip"] = server.files["/notes/annotations.zip"]
        fetch(server, root, fetch={"annotations": url})
        assert (root / "annotations/b.zip").exists()
        return
    with pytest.raises(LayersenseError, match=r"is not the address of a \.zip"):
        fetch(server, root, fetch={"annotations": url})


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(url=st.text(max_size=40) | st.text("htps:/@[]#?%.a0", max_size=30).map("http".__add__))
def test_any_address_is_fetched_or_refused_in_a_sentence(tmp_path: Path, url: str) -> None:
    assert isinstance(shown(url), str)
    nobody = download.httpx.MockTransport(lambda request: download.httpx.Response(404))
    with Downloader(1) as downloader, download.httpx.Client(transport=nobody) as client:
        downloader._client = client
        with pytest.raises(LayersenseError):
            downloader.fetch(Wanted(url, tmp_path / "a", 10, whole))


def test_https_does_not_lead_to_http(server: FileServer, tmp_path: Path) -> None:
    response = download.httpx.Response(
        200, request=download.httpx.Request("GET", f"{server.address}{FIRST}")
    )
    wanted = Wanted("https://host/1.jpg", tmp_path / "a", 10, whole)
    with Downloader(1) as downloader, pytest.raises(RefusedError, match="which is not encrypted"):
        downloader._check_answer(wanted, response, 0)


# --- several processes, a bar, the config


def test_several_processes_fetch_once(server: FileServer, tmp_path: Path) -> None:
    """Two workflows with one folder of data, or a job and the orphan of a killed one."""
    dataset = coco(server, tmp_path / "coco")
    command = [sys.executable, "-m", "layersense", "fetch", "photos", "--settings"]
    processes = [
        subprocess.Popen(
            [*command, dataset.model_dump_json(), "--out", str(tmp_path / f"{i}.json")]
        )
        for i in range(3)
    ]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert sorted(json.loads(file.read_text())["fetched"] for file in tmp_path.glob("*.json")) == [
        0, 0, SAMPLED
    ]  # fmt: skip
    assert len(server.asked) == 1 + SAMPLED


def test_a_bar_in_a_terminal_and_lines_in_a_log(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    counted = progress.Progress("fetch images", 4, "image")
    counted.step(4)
    assert "fetch images: 4 of 4" in caplog.text
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    counted = progress.Progress("fetch images", 4, "image")
    counted.step(3)
    counted.close()
    assert "3/4" in capsys.readouterr().err


def config(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "datasets": {"d": {"source": "coco", "root": str(tmp_path / "nowhere"), **changes}},
        "models": {"m": {"source": "demo"}},
        "schemes": {"s": {"quant_formats": ["FP8_ALL_LAYERS_CFG"], "effective_bits": 11.0}},
        "runs": {"r": {"model": "m", "dataset": "d", "schemes": ["s"], "device": "cpu"}},
    }


def test_a_dataset_that_fetches_needs_no_files_yet(tmp_path: Path) -> None:
    with pytest.raises(LayersenseError, match=r"d\.root: expected a folder"):
        load_config(config(tmp_path), "config.yaml")
    loaded = load_config(config(tmp_path, fetch={}), "config.yaml")
    dataset = loaded.datasets["d"]
    assert isinstance(dataset, CocoDataset)
    assert dataset.fetch == Fetch(annotations=None, connections=4)
    assert dataset.annotations_url == (
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
    )


@pytest.mark.parametrize(
    ("fetch", "sentence"),
    [
        ({"annotations": "ftp://a/b.zip"}, r"d\.fetch\.annotations: expected"),
        ({"connections": 64}, r"d\.fetch\.connections: expected"),
        ({"conections": 2}, "did you mean `connections`"),
        (True, r"d\.fetch: expected"),
    ],
)
def test_what_fetch_may_say(tmp_path: Path, fetch: Any, sentence: str) -> None:
    with pytest.raises(LayersenseError, match=sentence):
        load_config(config(tmp_path, fetch=fetch), "config.yaml")


def test_a_split_that_coco_lacks_needs_an_address(tmp_path: Path) -> None:
    other = {"split": "test2017"}
    with pytest.raises(LayersenseError, match=r"expected the address of a zip.*found `?.?test2017"):
        load_config(config(tmp_path, fetch={}, **other), "config.yaml")
    load_config(config(tmp_path, fetch={"annotations": "https://a/b.zip"}, **other), "config.yaml")


def test_how_files_come_is_no_matter_of_the_dataset(tmp_path: Path) -> None:
    loaded = [
        load_config(config(tmp_path, fetch={"connections": n}), "config.yaml") for n in (2, 4)
    ]
    assert fetch_settings(loaded[0], "d") == fetch_settings(loaded[1], "d")
    assert "fetch" not in dataset_settings(loaded[0], "d")

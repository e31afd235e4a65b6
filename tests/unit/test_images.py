"""Images of prompts: what is one, where it may come from, and where it stands."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jobs import load, plan
from jobs.preview import preview
from pipelines import images as module
from pipelines.errors import RowError, StorageError
from pipelines.image_turns import has_images, places_images, takes_parts_only, with_images
from pipelines.images import (
    Image,
    ImageReader,
    check_folder,
    digests_of,
    images_array,
    images_of,
    without_data,
)
from pipelines.lengths import IMAGE_TOKENS, Lengths
from pipelines.messages import Turns, checked
from pipelines.settings import SamplingSettings
from pipelines.storage import Storage
from tests.local.runs import job
from tests.tiny_vision import image, vision_tokenizer

RED, BLUE = image("red"), image("blue")
URL = f"data:image/png;base64,{base64.b64encode(RED).decode()}"


# ── Where images lie ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_of_images_that_is_not_there_is_refused_before_anything_starts(
    tmp_path: Path, there: bool
) -> None:
    """`dray plan`, and `dray preview` as well; an existing folder without a file says no less."""
    pq.write_table(pa.table({"text": ["What?"], "seen": ["red.png"]}), tmp_path / "x.parquet")
    settings = job(
        tmp_path / "x.parquet",
        tmp_path / "out",
        input={"images_folder": str(tmp_path / "pictures")},
        prompt={"template": "{{ text }}", "images_column": "seen"},
        model={"source": str(vision_tokenizer(tmp_path / "model"))},
    )
    if there:
        (tmp_path / "pictures").mkdir()
    for look in (plan, lambda one: preview(one, rows=1, generate=False)):
        with pytest.raises(
            StorageError, match=rf"^input.images_folder: {tmp_path}/pictures: nothing lies below it; correct"
        ):
            look(load(settings))
    (tmp_path / "pictures").mkdir(exist_ok=True)
    (tmp_path / "pictures" / "red.png").write_bytes(RED)
    assert plan(load(settings)).plan.shards


class HttpError(Exception):
    """As gcsfs tells a status: in `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(f"Anonymous caller does not have storage.objects.list access, {code}")
        self.code = code


@pytest.mark.parametrize(
    "refusal",
    [OSError("Forbidden: b/pictures\nno storage.objects.list access"), HttpError(401), HttpError(403)],
)
def test_a_folder_of_another_store_that_may_be_read_but_not_listed_is_taken(
    monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    """As a bucket of Google's that anybody may read, by whichever of its answers."""
    info = MemoryFileSystem.info
    folder = "memory://unlisted/pictures"
    Storage(folder).write("red.png", RED)

    def unlisted(self: MemoryFileSystem, path: str, **kwargs: Any) -> Any:
        if not path.endswith(".png"):
            raise refusal
        return info(self, path, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "info", unlisted)
    check_folder(folder, {})
    ((red,),) = ImageReader(folder).read([["red.png"]])
    assert red.data == RED
    monkeypatch.undo()
    with pytest.raises(StorageError, match="nothing lies below it"):
        check_folder(f"{folder}/gone", {})


# ── What is an image ─────────────────────────────────────────────────────────────────────────────────────────────


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header says that it is this large."""
    data = bytearray(image("red"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "red.png").write_bytes(RED)
    (tmp_path / "secret.png").write_bytes(BLUE)
    (tmp_path / "pictures-of-others").mkdir()
    (tmp_path / "pictures-of-others" / "a.png").write_bytes(BLUE)
    return folder


def test_an_image_is_bytes_a_struct_a_data_url_or_a_path(pictures: Path) -> None:
    path = pictures / "deep" / "red.png"
    sources = [
        RED,
        {"bytes": RED, "path": "x.png"},
        {"bytes": None, "path": "deep/red.png"},
        URL,
        str(path),
        f"file://{path}",
    ]
    found = ImageReader(str(pictures)).read([sources, [], [RED, BLUE]])
    assert [[image.data for image in row] for row in found if not isinstance(row, RowError)] == [
        [RED] * 6,
        [],
        [RED, BLUE],
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "is no image: not one of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image: not one of PNG, JPEG"),
        (bomb(20_000, 5_000), "is no image: "),  # a warning of Pillow's, which is an error in tests
        (bomb(60_000, 60_000), "is no image: "),  # Pillow's own bound
        (None, "found null"),
        ({"bytes": None, "path": None}, "found null"),
        (7, "found int"),
        ("data:image/png,abc", "must be of the form"),
        ("data:image/png;base64,???", "base64 cannot be read"),
        ("no.png", "'no.png': there is no such file"),
        ("deep", "'deep': "),
        ("", "is no path below"),
        ("../secret.png", "is no path below"),
        ("deep/../../secret.png", "is no path below"),
        ("deep/%2e%2e/%2e%2e/secret.png", "is no path below"),
        ("{}/../secret.png", "lies outside"),
        ("{}-of-others/a.png", "lies outside"),
        ("/etc/passwd", "lies outside"),
        ("file:///etc/passwd", "lies outside"),
        ("http://169.254.169.254/latest/meta-data", "lies outside"),
        ("s3://bucket/a.png", "lies outside"),
        ("simplecache::s3://bucket/a.png", "chained URLs"),
    ],
)  # fmt: skip
def test_what_is_none_is_its_rows_error(pictures: Path, source: Any, message: str) -> None:
    given = source.replace("{}", str(pictures)) if isinstance(source, str) else source
    ((ok,), error) = ImageReader(str(pictures)).read([[RED], [RED, given]])  # type: ignore[misc]
    assert ok.data == RED
    assert isinstance(error, RowError)
    assert error.code == "bad_image"
    assert str(error).startswith("image 2: ")
    assert message in str(error)


def test_without_a_folder_no_path_is_read(pictures: Path) -> None:
    (error,) = ImageReader().read([[str(pictures / "deep" / "red.png")]])
    assert "input.images_folder" in str(error)


def test_a_file_is_read_as_far_as_it_may_be_large(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", len(RED) - 1)
    for source in (RED, "deep/red.png"):
        (error,) = ImageReader(str(pictures)).read([[source]])
        assert "more than 0 MiB" in str(error)


def test_an_image_may_have_so_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 40 * 30 - 1)
    (error,) = ImageReader().read([[RED]])
    assert "has 40 × 30 pixels, more than 1,199" in str(error)


def test_answered_images_leave_their_digests() -> None:
    rows = pa.chunked_array([images_array([[Image(RED)], None, [Image(BLUE), Image(RED)], None])])
    bare = without_data(rows.slice(1))
    assert bare.type == rows.type
    assert [digests_of(one) for one in bare] == [digests_of(one) for one in rows.slice(1)]
    assert bare.is_null().to_pylist() == [True, False, True]
    assert all(one["data"] is None for one in bare[1].as_py())
    assert [bytes(one.data) for one in images_of(rows[2])] == [BLUE, RED]
    assert bare.nbytes < rows.nbytes - len(RED) - len(BLUE)


# ── Where it stands ──────────────────────────────────────────────────────────────────────────────────────────────


def messages(*contents: Any) -> Turns:
    found = checked([{"role": "user", "content": content} for content in contents])
    assert not isinstance(found, RowError)
    return found


TEXT, PLACE = {"type": "text", "text": "a"}, {"type": "image"}


def test_images_of_a_column_come_before_the_last_user_turn() -> None:
    turns, sources = with_images(messages("b", "a"), [1, 2], placed=True)
    assert sources == [1, 2]
    assert turns == messages_as([{"type": "text", "text": "b"}], [PLACE, PLACE, TEXT])


def messages_as(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content} for content in contents]


def test_images_of_a_column_fill_the_places_that_name_none() -> None:
    named = {"type": "image_url", "image_url": {"url": "u"}, "text": None}
    turns, sources = with_images(messages([PLACE, TEXT, named], [TEXT, PLACE]), ["x", "y"], placed=True)
    assert sources == ["x", "u", "y"]
    assert turns == messages_as([PLACE, TEXT, PLACE], [TEXT, PLACE])


@pytest.mark.parametrize(
    ("content", "given", "placed", "message"),
    [
        ([PLACE, TEXT], None, True, "places for 1 images, and there are no prompt.images_column"),
        ([PLACE, TEXT], [1, 2], True, "places for 1 images, and there are 2 in prompt.images_column"),
        ([PLACE, TEXT], [1], False, "no place for images"),
    ],
)
def test_places_and_images_are_as_many(content: Any, given: Any, placed: bool, message: str) -> None:
    with pytest.raises(RowError, match=message):
        with_images(messages(content), given, placed=placed)


def test_where_the_template_places_none_the_text_says_where() -> None:
    assert with_images(messages("<image> a"), [1], placed=False) == (messages("<image> a"), [1])
    assert with_images("<image> a", [1], placed=True) == ("<image> a", [1])
    assert not has_images(messages([TEXT]))


def test_what_a_template_takes_is_seen_by_trying() -> None:
    def parts(turns: list[dict[str, Any]]) -> str:
        return "".join(part.get("text", "<image>") for turn in turns for part in turn["content"])

    def text(turns: list[dict[str, Any]]) -> str:
        return "".join(str(turn["content"]) for turn in turns)

    def joined(turns: list[dict[str, Any]]) -> str:
        return "".join("user: " + turn["content"] for turn in turns)

    def blind(turns: list[dict[str, Any]]) -> str:
        return "".join(part.get("text", "") for turn in turns for part in turn["content"])

    assert [places_images(one) for one in (parts, text, joined, blind)] == [True, False, False, False]
    assert [takes_parts_only(one) for one in (parts, text, joined, blind)] == [True, False, False, True]


def test_what_images_add_is_the_most_that_one_has_added() -> None:
    lengths = Lengths(SamplingSettings(), 4096)
    assert lengths.image_tokens == IMAGE_TOKENS
    for images, added in ((2, 60), (1, 40), (3, 30)):
        lengths.learn_images(images, added)
    assert lengths.image_tokens == 40

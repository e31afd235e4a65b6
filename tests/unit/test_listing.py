"""Which files an input path names, and what a listing tells of them."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import listing
from pipelines.errors import InputError
from pipelines.listing import glob_pattern, list_files
from pipelines.sample import spread
from pipelines.settings import InputSettings

DOC = pa.table({"doc": ["a", "b", "c"]})


def parquet(path: Path, table: pa.Table = DOC, **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return str(path)


def text(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def lines(*objects: object) -> str:
    return "".join(json.dumps(one) + "\n" for one in objects)


def names(root: Path, path: str | list[str], **settings: Any) -> list[str]:
    found = list_files(InputSettings(path=path, **settings))
    return [file.path.removeprefix(f"{root}/") for file in found]


# ── Paths ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_is_read_to_its_depth_without_hidden_names_and_companions(tmp_path: Path) -> None:
    parquet(tmp_path / "b" / "2.parquet")
    parquet(tmp_path / "b.pq")
    text(tmp_path / "a.jsonl", lines({"doc": "x"}))
    text(tmp_path / "c.csv.gz", "doc\nx\n")
    text(tmp_path / "NOTICE.csv", "doc\nx\n")
    for hidden in (".hidden.parquet", "_temporary/0.parquet", ".x/y/1.jsonl", "_SUCCESS", "b/_metadata"):
        text(tmp_path / hidden, b"not data")
    for companion in (
        "README.md",
        "README",
        "LICENSE",
        "b/.2.parquet.crc",
        "a.jsonl.crc",
        "dataset_info.json",
    ):
        text(tmp_path / companion, b"not data")
    assert names(tmp_path, str(tmp_path)) == ["NOTICE.csv", "a.jsonl", "b.pq", "b/2.parquet", "c.csv.gz"]
    assert names(tmp_path, f"{tmp_path}/") == names(tmp_path, str(tmp_path))


def test_entries_keep_their_order_and_duplicates_count_once(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        parquet(tmp_path / f"{name}.parquet")
    entries = [f"{tmp_path}/c.parquet", f"{tmp_path}/*.parquet", str(tmp_path)]
    assert names(tmp_path, entries) == ["c.parquet", "a.parquet", "b.parquet"]


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "in" / "a.parquet")
    monkeypatch.chdir(tmp_path)
    wanted = [f"{tmp_path}/in/a.parquet"]
    for path in ("in", "in/a.parquet", "in/*.parquet", "./in", "*/a.parquet", "i*", f"file://{tmp_path}/in"):
        assert [file.path for file in list_files(InputSettings(path=path))] == wanted, path


def test_a_name_with_glob_characters_is_a_file_first(tmp_path: Path) -> None:
    parquet(tmp_path / "a[1].parquet")
    parquet(tmp_path / "a1.parquet")
    assert names(tmp_path, f"{tmp_path}/a[1].parquet") == ["a[1].parquet"]


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("*.csv", "a.csv", True),
        ("*.csv", "x/a.csv", False),
        ("*.csv", "acsv", False),
        ("*.csv", ".a.csv", False),
        ("*.csv", "_a.csv", False),
        ("_*.csv", "_a.csv", True),
        ("**/*.csv", "a.csv", True),
        ("**/*.csv", "x/y/a.csv", True),
        ("**/*.csv", "x/_y/a.csv", False),
        ("**", "x/y", True),
        ("x/**", "x/y/z", True),
        ("year=*", "year=1/m=2/p.csv", True),  # a folder: what is in it
        ("year=*/p?.csv", "year=1/p1.csv", True),
        ("p?.csv", "p/.csv", False),
        ("p[!1].csv", "p2.csv", True),
        ("p[!1].csv", "p1.csv", False),
        ("p[12].csv", "p2.csv", True),
        ("p+(1).csv", "p+(1).csv", True),
    ],
)
def test_globs(pattern: str, name: str, matches: bool) -> None:
    assert bool(glob_pattern(pattern).fullmatch(name)) == matches


def test_a_glob_that_matches_a_folder_leaves_its_hidden_files_out(tmp_path: Path) -> None:
    parquet(tmp_path / "year=1" / "a.parquet")
    parquet(tmp_path / "year=1" / "_tmp" / "b.parquet")
    text(tmp_path / "year=1" / "README.md", "x")
    assert names(tmp_path, f"{tmp_path}/year=*") == ["year=1/a.parquet"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere", "no such file, or an empty folder"),
        ("nowhere/*.parquet", "no data file matches"),
        ("hidden", "no data file in this folder"),
        ("odd", "its ending tells no format"),
        ("odd/data.bin", "its ending tells no format"),
        ("odd/x.parquet.gz", "its ending tells no format"),
        ("broken/a.parquet", "not readable as Parquet"),
        ("broken/empty.parquet", "not readable as Parquet"),
        ("broken/a.csv.gz", "not readable as gzip"),
        ("twice.parquet", "two columns are named 'x'"),
    ],
)
def test_refusals_name_the_path_and_fit_on_a_line(tmp_path: Path, path: str, said: str) -> None:
    text(tmp_path / "hidden" / "_x" / "a.parquet", "x")
    text(tmp_path / "odd" / "data.bin", "x")
    (tmp_path / "odd" / "x.parquet.gz").write_bytes(b"x")
    whole = Path(parquet(tmp_path / "broken" / "a.parquet")).read_bytes()
    (tmp_path / "broken" / "a.parquet").write_bytes(whole[: len(whole) // 2])
    text(tmp_path / "broken" / "empty.parquet", "")
    (tmp_path / "broken" / "a.csv.gz").write_bytes(b"no gzip")
    parquet(tmp_path / "twice.parquet", pa.table([[1], [2]], names=["x", "x"]))
    with pytest.raises(InputError) as caught:
        list_files(InputSettings(path=f"{tmp_path}/{path}"))
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)  # … and a way out


def test_a_thrift_error_in_the_footer_is_the_files_fault(tmp_path: Path) -> None:
    path = Path(parquet(tmp_path / "a.parquet"))
    data = bytearray(path.read_bytes())
    data[-40:-8] = b"\xff" * 32
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.parquet: not readable as Parquet"):
        list_files(InputSettings(path=str(path)))


def test_a_format_given_overrules_endings(tmp_path: Path) -> None:
    text(tmp_path / "a.txt", lines({"doc": "x"}))
    text(tmp_path / "b.log.gz", lines({"doc": "x"}))
    text(tmp_path / "README.md", "x")
    found = list_files(InputSettings(path=str(tmp_path), format="jsonl"))
    assert [(file.format, file.compression) for file in found] == [("jsonl", "none"), ("jsonl", "gzip")]


def test_an_output_of_dray_stands_for_its_data(tmp_path: Path) -> None:
    parquet(tmp_path / "data" / "part-000000-00.parquet")
    parquet(tmp_path / "stats" / "shards.parquet")
    text(tmp_path / ".dray" / "spec.json", "{}")
    with pytest.raises(InputError, match="has not finished"):
        list_files(InputSettings(path=str(tmp_path)))
    text(tmp_path / "data" / "_SUCCESS", "")
    assert names(tmp_path, str(tmp_path)) == ["data/part-000000-00.parquet"]


# ── What a listing tells ────────────────────────────────────────────────────────────────────────────────────────


def test_parquet_is_known_from_its_footer(tmp_path: Path) -> None:
    table = pa.table({"doc": ["x" * 1000 + str(i) for i in range(100)], "score": list(range(100))})
    path = parquet(tmp_path / "a.parquet", table, row_group_size=30, use_dictionary=False)
    (everything,) = list_files(InputSettings(path=path))
    assert (everything.rows, everything.row_groups) == (100, (30, 30, 30, 10))
    assert everything.data_bytes > 100_000
    (narrow,) = list_files(InputSettings(path=path, columns=["score"]))
    assert 800 <= narrow.data_bytes < 3000
    (both,) = list_files(InputSettings(path=path, columns=["score"]), frozenset({"doc"}))
    assert both.data_bytes > 100_000


def test_text_is_estimated_from_a_sample(tmp_path: Path) -> None:
    text(tmp_path / "a.jsonl", lines(*({"doc": "word " * 20} for _ in range(5000))))
    text(tmp_path / "b.jsonl.gz", lines(*({"doc": "word " * 20} for _ in range(5000))))
    plain, packed = list_files(InputSettings(path=str(tmp_path)))
    assert plain.rows is None
    assert plain.estimated_rows == pytest.approx(5000, rel=0.05)
    assert plain.data_bytes == plain.size
    assert packed.data_bytes > 20 * packed.size


def test_images_are_told_from_text(tmp_path: Path) -> None:
    """By columns of lists and structs, of which a third has no image; and in lines longer than the first sample."""
    data = [bytes([number]) * 3000 for number in range(60)]
    lists = pa.array(
        [[], *([one, one] for one in data[1:40]), *([None] for _ in range(20))], pa.list_(pa.binary())
    )
    structs = [{"bytes": one, "path": "a.png"} for one in data]
    table = pa.table({"doc": ["word " * 20] * 60, "lists": lists, "structs": structs})
    path = parquet(tmp_path / "a.parquet", table, row_group_size=25)
    for column, images in (("lists", 1 + 2 * 39 + 20), ("structs", 60)):
        (file,) = list_files(InputSettings(path=path), images=frozenset({column}))
        assert file.images == images
        assert 60 * 1900 < file.image_bytes < 75 * 3000
        (elsewhere,) = list_files(InputSettings(path=path, columns=["doc"]), images=frozenset({column}))
        assert (elsewhere.images, elsewhere.image_bytes) == (0, 0)

    url = "data:image/png;base64," + "A" * 200_000
    text(tmp_path / "b.jsonl", lines(*({"doc": "word " * 2000, "seen": [url, url]} for _ in range(8))))
    (file,) = list_files(InputSettings(path=f"{tmp_path}/b.jsonl"), images=frozenset({"seen"}))
    assert (file.estimated_rows, file.images) == (8, 16)
    assert file.data_bytes - file.image_bytes == pytest.approx(8 * 10_000, rel=0.05)
    text(tmp_path / "c.csv", "doc,seen\n" + f"{'word ' * 20},{'deep/' * 10}a.png\n" * 500)
    (file,) = list_files(InputSettings(path=f"{tmp_path}/c.csv"), images=frozenset({"seen"}))
    assert file.images == pytest.approx(500, rel=0.02)
    assert file.image_bytes == pytest.approx(500 * 55, rel=0.02)


def test_images_in_messages_are_told_from_text(tmp_path: Path) -> None:
    """As JSON in lines, as JSON text in CSV, and as structs in Parquet; a text part and a part without its url are none."""
    url = "data:image/png;base64," + "A" * 3000

    def chat(images: int) -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for _ in range(images)]
        return [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [*seen, {"type": "text", "text": "word " * 40}]},
        ]

    chats = [chat(number % 3) for number in range(300)]  # 300 images
    told = frozenset({"chat"})
    text(tmp_path / "a.jsonl", lines(*({"chat": one} for one in chats)))
    text(tmp_path / "b.jsonl", lines(*({"chat": json.dumps(one)} for one in chats)))
    with (tmp_path / "c.csv").open("w", newline="") as out:
        csv.writer(out).writerows([["chat"], *([json.dumps(one)] for one in chats)])
    for name in ("a.jsonl", "b.jsonl", "c.csv"):
        (file,) = list_files(InputSettings(path=f"{tmp_path}/{name}"), messages=told)
        assert file.images == pytest.approx(300, rel=0.1), name
        assert file.image_bytes == pytest.approx(300 * 3022, rel=0.1), name
        assert list_files(InputSettings(path=f"{tmp_path}/{name}"))[0].images == 0

    part = pa.struct(
        [("type", pa.string()), ("text", pa.string()), ("image_url", pa.struct([("url", pa.string())]))]
    )
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))]))
    typed = pa.array([one[1:] for one in chats[:-1]] + [None], kind)
    path = parquet(tmp_path / "d.parquet", pa.table({"chat": typed, "n": range(300)}), row_group_size=70)
    (file,) = list_files(InputSettings(path=path), messages=told)
    assert file.images == 298
    assert 0 < file.image_bytes < file.data_bytes
    assert list_files(InputSettings(path=path, columns=["n"]), messages=told)[0].images == 0


def test_images_in_typed_messages_are_counted_by_field(tmp_path: Path) -> None:
    """Once where two leaves say which, and none for the url of a text; an image's text may be null or empty."""
    data = b"\x89PNG" * 500
    held = {"type": "image", "image": {"bytes": data, "path": "a.png"}}
    said = {"type": "text", "text": "word", "url": "https://x"}
    cases: dict[str, tuple[list[dict[str, Any]], int]] = {
        "bytes": ([held, {"type": "text", "text": "word"}], 1),
        "both": ([{"type": "image_url", "image_url": {"bytes": data, "path": None}}, held], 2),
        "paths": ([{"type": "image", "image": {"bytes": None, "path": "a.png"}}], 1),
        "texts": ([said, said], 0),
        "mixed": ([said, said, {"type": "image", "url": "a.png"}], 1),
        "empty": ([{"type": "text", "text": "word"}, {"type": "image", "text": "", "path": "a.png"}], 1),
    }
    for name, (content, images) in cases.items():
        table = pa.table({"chat": [[{"role": "user", "content": content}]] * 50})
        path = parquet(tmp_path / f"{name}.parquet", table, row_group_size=20, use_dictionary=False)
        (file,) = list_files(InputSettings(path=path), messages=frozenset({"chat"}))
        assert file.images == 50 * images, name
        assert (file.image_bytes > 0) == (images > 0), name
        if name in ("bytes", "both"):
            assert file.image_bytes > 50 * images * len(data)
            assert file.data_bytes - file.image_bytes < 50 * 200


def test_known_files_are_not_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = InputSettings(path=str(tmp_path))
    parquet(tmp_path / "a.parquet")
    first = list_files(settings)
    parquet(tmp_path / "b.parquet")
    opened = []
    monkeypatch.setattr(
        listing, "footer_of", lambda path, options: opened.append(path) or listing_footer_of(path, options)
    )
    again = list_files(settings, known={file.path: file for file in first})
    assert opened == [f"{tmp_path}/b.parquet"]
    assert again[0] is first[0]
    stale = replace(first[0], version="other")
    list_files(settings, known={stale.path: stale})
    assert opened[1:] == [f"{tmp_path}/a.parquet", f"{tmp_path}/b.parquet"]


listing_footer_of = listing.footer_of


@given(st.integers(0, 200))
def test_a_spread_has_distinct_items_in_order(n: int) -> None:
    found = spread(list(range(n)))
    assert len(found) == min(n, 8)
    assert found == sorted(set(found))
    assert found[-1:] == ([n - 1] if n else [])

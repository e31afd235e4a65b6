"""Images below `input.images_folder` on real S3 servers: what is there, what is not, and by whose credentials it is read."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import images as module
from pipelines.errors import RowError, StorageError, TransientStorageError
from pipelines.images import ImageReader, check_folder
from pipelines.storage import Storage
from tests.local.fault_proxy import FaultProxy
from tests.local.runs import job, rows_of
from tests.local.s3_server import S3Server
from tests.tiny_vision import image, vision_tokenizer
from tests.unit.stages import planned, run

RED, BLUE = image("red"), image("blue")


def uploaded(server: S3Server, bucket: str) -> Storage:
    """Two images, one that is none, and a neighbour of the folder."""
    pictures = Storage(f"s3://{bucket}/pictures", server.storage_options)
    pictures.write("red.png", RED)
    pictures.write("deep/a b#1%2e+é.png", BLUE)
    pictures.write("empty.png", b"")
    Storage(f"s3://{bucket}/pictures-of-others", server.storage_options).write("red.png", RED)
    return pictures


def message(reader: ImageReader, source: str) -> str:
    (error,) = reader.read([[source]])
    assert isinstance(error, RowError)
    assert error.code == "bad_image"
    return str(error)


def test_objects_are_read_by_name_and_by_url(s3: S3Server) -> None:
    folder = uploaded(s3, s3.bucket).root
    reader = ImageReader(f"{folder}/", s3.storage_options)
    rows = [["red.png", f"{folder}/deep/a b#1%2e+é.png"], ["deep/a b#1%2e+é.png"], ["red.png"]]
    found = reader.read(rows)
    assert [[one.data for one in row] for row in found if isinstance(row, list)] == [
        [RED, BLUE],
        [BLUE],
        [RED],
    ]


def test_what_is_not_there_or_lies_elsewhere_is_its_rows_error(s3: S3Server) -> None:
    folder = uploaded(s3, s3.bucket).root
    reader = ImageReader(folder, s3.storage_options)
    assert message(reader, "no.png") == "image 1: 'no.png': there is no such file"
    assert "there is no such file" in message(reader, "deep")
    assert "is no image: not one of" in message(reader, "empty.png")
    for elsewhere in (
        f"{folder}-of-others/red.png",
        "s3://another-bucket/red.png",
        f"{s3.endpoint_url}/red.png",
    ):
        assert "lies outside" in message(reader, elsewhere)
    assert "is no path below" in message(reader, "../pictures-of-others/red.png")


def test_no_more_of_an_object_is_read_than_an_image_may_have(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = uploaded(s3, s3.bucket).root
    monkeypatch.setattr(module, "MAX_BYTES", len(RED) - 1)
    with FaultProxy(s3.endpoint_url) as proxy:
        reader = ImageReader(folder, {**s3.storage_options, "endpoint_url": proxy.url})
        assert "more than 0 MiB" in message(reader, "red.png")
        (asked,) = [headers["range"] for method, _, headers in proxy.requests if method == "GET"]
    assert asked == f"bytes=0-{len(RED) - 1}"


def test_a_store_that_does_not_answer_is_no_rows_fault(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = uploaded(s3, s3.bucket).root
    with FaultProxy(s3.endpoint_url) as proxy:
        options = {**s3.storage_options, "endpoint_url": proxy.url}
        reader = ImageReader(folder, options)
        reader._storage = Storage(folder, options, patience_s=1)
        proxy.fail("slow_down", times=1000)
        with pytest.raises(TransientStorageError):
            reader.read([["red.png"]])


def test_a_folder_that_cannot_be_read_is_refused_before_any_row(
    s3: S3Server, rclone_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, options = rclone_server.new_bucket(), rclone_server.storage_options
    folder = uploaded(rclone_server, bucket).root
    for server in (rclone_server, s3):
        check_folder(uploaded(server, server.new_bucket()).root, server.storage_options)
    for place, given, said in (
        (folder, {**options, "secret": "another"}, f"{folder}: the secret key does not match"),
        (folder, {**options, "key": "another"}, f"{folder}: the store does not know this access key"),
        (f"s3://{bucket}-gone/pictures", options, f"s3://{bucket}-gone/pictures: the bucket does not exist"),
        (f"s3://{bucket}/picture", options, f"s3://{bucket}/picture: nothing lies below it"),
        (f"{s3.url}/pictures", s3.storage_options, f"{s3.url}/pictures: nothing lies below it"),
    ):
        with pytest.raises(StorageError, match=rf"^input.images_folder: {said}"):
            check_folder(place, given)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageError, match=r"^input.images_folder: no S3 credentials found"):
        check_folder(folder, {"endpoint_url": rclone_server.endpoint_url})


def test_a_folder_that_may_be_read_but_not_listed_is_taken(s3: S3Server) -> None:
    folder = uploaded(s3, s3.bucket).root
    with FaultProxy(s3.endpoint_url) as proxy:
        options = {**s3.storage_options, "endpoint_url": proxy.url}
        proxy.fail("deny", times=1000, query="list-type=2")
        check_folder(folder, options)
        assert proxy.count("GET", "max-keys=2") == 1  # however much lies there
        ((red,),) = ImageReader(folder, options).read([["red.png"]])
        assert red.data == RED
        proxy.fail("deny", times=1000, query="gone.png")  # what S3 says then of an object that is not there
        said = message(ImageReader(folder, options), "gone.png")
        assert "access denied" in said
        assert "a store says so of missing objects too" in said


def test_a_job_reads_images_with_its_inputs_credentials(rclone_server: S3Server, tmp_path: Path) -> None:
    """The server refuses all keys but its own, and the process has none."""
    bucket, options = rclone_server.new_bucket(), rclone_server.storage_options
    pictures = uploaded(rclone_server, bucket)
    rows = pa.table(
        {
            "text": ["What?"] * 4,
            "seen": ["red.png", "no.png", f"{pictures.root}/deep/a b#1%2e+é.png", "empty.png"],
        }
    )
    sink = io.BytesIO()
    pq.write_table(rows, sink)
    Storage(f"s3://{bucket}/in", options).write("x.parquet", sink.getvalue())
    settings = job(
        f"s3://{bucket}/in",
        tmp_path / "out",
        input={"images_folder": pictures.root, "storage_options": options},
        prompt={"template": "{{ text }}", "images_column": "seen"},
        model={"source": str(vision_tokenizer(tmp_path / "model"))},
    )
    output = planned(settings)
    (footer,) = run(output.work("first"), output.plan.shards)
    assert footer.stats.error_codes == {"bad_image": 2}
    red, missing, blue, empty = rows_of(tmp_path / "out").to_pylist()
    assert red["generated_text"] != blue["generated_text"]
    assert missing["error_message"] == "image 1: 'no.png': there is no such file"
    assert "is no image" in empty["error_message"]

    reader = ImageReader(pictures.root, {**options, "secret": "another"})
    assert "the secret key does not match" in message(reader, "red.png")

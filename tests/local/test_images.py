"""Prompts with images on real Ray and vLLM: what bare vLLM's chat answers to the same messages, and rows whose images are none."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import load, run
from jobs.inspect import verify
from pipelines.storage import Storage
from tests.local.bare_vllm import bare_pooling, bare_vllm, seen
from tests.local.runs import REAL, job, rows_of
from tests.tiny_vision import image, vision_classifier, vision_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(400)]

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 140,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 2**26,
    "limit_mm_per_prompt": {"image": 4},
}
SAMPLING = {"temperature": 0, "max_tokens": 12}

#: (question, its images): each sees others than its neighbours of the same text.
GOOD: list[tuple[str, list[bytes]]] = [
    ("What is it?", [image("red")]),
    ("What is it?", [image("blue")]),
    ("What is it?", [image("blue", (30, 60))]),
    ("What is it?", [image("red"), image("blue")]),
    ("What is it?", [image("blue"), image("red")]),
    ("What is it?", [image((200, 10, 10, 60), mode="RGBA")]),
    ("What is it?", [image(90, mode="L")]),
    ("What is it?", [image("red")]),
    ("Which colour?", [image("green", (28, 28))]),
    # Seen nowhere else, so that no cache of vLLM's can know which is which.
    ("Which colour?", [image("cyan"), image("magenta")]),
    ("And without any?", []),
]
#: (images, the error that they make)
BAD: list[tuple[list[bytes], str, str]] = [
    ([b"no image"], "bad_image", "image 1: is no image"),
    # Whole in its header, and cut after it: found where it is decoded.
    ([image("red"), image("teal", (400, 300))[:-60]], "bad_image", "image 2: is no image"),
    ([image("red")] * 4, "prompt_too_long", "the prompt has "),
    ([image("red", (8, 8))] * 5, "invalid_request", "images: At most 4 image"),
]


def parts(text: str, images: list[bytes]) -> list[dict[str, Any]]:
    """A user turn as OpenAI's API takes it."""
    urls = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in images]
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*shown, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def test_images_are_answered_as_bare_vllm_answers_them(tmp_path: Path) -> None:
    def start(settings: dict[str, Any]) -> None:
        assert run(load(settings)).state == "complete"

    check_images(tmp_path, start, ENGINE, {"cpus_per_engine": 1})


def check_images(
    tmp_path: Path, start: Callable[[dict[str, Any]], None], engine: dict[str, Any], pool: dict[str, Any]
) -> None:
    """By column, and in messages of a later step by path: texts, numbers of tokens, and errors in their rows' places.

    `start` runs a job that must come to its end."""
    source = str(vision_model(tmp_path / "model"))
    rows = [*GOOD, *(("What is it?", images) for images, _, _ in BAD)]
    (tmp_path / "pictures").mkdir()
    chats = []
    for number, (text, images) in enumerate(rows):
        turn = parts(text, images)
        for place, data in enumerate(images):
            (tmp_path / "pictures" / f"{number}-{place}.png").write_bytes(data)
            turn[0]["content"][place]["image_url"]["url"] = f"{number}-{place}.png"
        turn[0]["content"] = [*turn[0]["content"][-1:], *turn[0]["content"][:-1]]  # after the text
        chats.append(json.dumps(turn))
    structs = [[{"bytes": data, "path": None} for data in images] for _, images in rows]
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = {"text": [text for text, _ in rows], "seen": pa.array(structs, kind), "chat": chats}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(table), tmp_path / "in" / "rows.parquet")
    start(
        job(
            tmp_path / "in",
            tmp_path / "out",
            input={"images_folder": str(tmp_path / "pictures")},
            prompt={"template": "{{ text }}", "images_column": "seen"},
            model={**REAL, "source": source, "engine": engine},
            sampling=SAMPLING,
            output={"provenance": True},
            shards={"rows": 7},
            pool=pool,
            errors={"max_error_rate": 0.5},
            steps=[
                {
                    "generate": {
                        "column": "second",
                        "prompt": {"messages_column": "chat"},
                        "sampling": SAMPLING,
                    }
                }
            ],
        )
    )
    assert verify(Storage(str(tmp_path / "out")), deep=True)["problems"] == []
    found = rows_of(tmp_path / "out").to_pylist()

    places = {int(row["row_id"].rpartition("#")[2]): row for row in found}
    first = [parts(text, images) for text, images in GOOD]
    after = [
        [{"role": "user", "content": [turn[0]["content"][-1], *turn[0]["content"][:-1]]}] for turn in first
    ]
    bare = bare_vllm({"model": source, **engine}, SAMPLING, [*first, *after])
    for place, (one, two) in enumerate(zip(bare[: len(GOOD)], bare[len(GOOD) :], strict=True)):
        row = places[place]
        assert row["error_code"] is None
        assert row["generated_text"] == one["samples"][0]["text"]
        assert row["second"] == two["samples"][0]["text"]
        assert row["prompt_tokens"] == one["prompt_tokens"]
        assert row["second_prompt_tokens"] == two["prompt_tokens"]
    for place, (_, code, message) in enumerate(BAD, len(GOOD)):
        assert places[place]["error_code"] == code
        assert message in places[place]["error_message"]
    # All of them ask the same of something else, but the first and the last.
    alike = [places[place] for place in range(8)]
    assert len({row["generated_text"] for row in alike}) == 7
    assert len({row["prompt_sha256"] for row in alike}) == 7
    assert alike[0]["generated_text"] == alike[7]["generated_text"]


def finished(
    folder: Path, source: Path, engine: dict[str, Any], *steps: dict[str, Any]
) -> list[dict[str, Any]]:
    """Run a job of steps alone over the good rows and a broken one; the good ones, in order.

    The column `placed` has the question behind the model's own placeholders, for prompts without a chat template."""
    rows = [*GOOD, ("What is it?", [image("teal", (400, 300))[:-60]])]
    table = {
        "text": [text for text, _ in rows],
        "placed": ["<image>" * len(images) + text for text, images in rows],
        "seen": pa.array([images for _, images in rows], pa.list_(pa.binary())),
        "number": range(len(rows)),
    }
    (folder / "in").mkdir()
    pq.write_table(pa.table(table), folder / "in" / "rows.parquet")
    settings = job(
        folder / "in",
        folder / "out",
        model={**REAL, "source": str(source), "engine": engine},
        prompt=None,
        shards={"rows": 7},
        pool={"cpus_per_engine": 1},
        errors={"max_error_rate": 0.5},
        steps=[*steps],
    )
    report = run(load(settings))
    assert report.state == "complete"
    assert verify(Storage(str(folder / "out")), deep=True)["problems"] == []
    *good, broken = sorted(rows_of(folder / "out").to_pylist(), key=lambda row: row["number"])
    assert broken["error_code"] == "bad_image"
    assert [row["error_code"] for row in good] == [None] * len(GOOD)
    return good


PLACED = {"prompt_column": "placed", "images_column": "seen"}
CHAT = {"prompt_column": "text", "images_column": "seen", "chat": True}
PROMPTS = [seen("<image>" * len(images) + text, images) for text, images in GOOD]
CHATS = [
    seen(f"<|user|>{one['prompt']}<|assistant|>", images)
    for one, (_, images) in zip(PROMPTS, GOOD, strict=True)
]


@pytest.mark.long
def test_images_are_embedded_as_bare_vllm_embeds_them(tmp_path: Path) -> None:
    source = vision_model(tmp_path / "model")
    steps = [
        {"embed": {"column": name, "prompt": prompt}} for name, prompt in (("plain", PLACED), ("chat", CHAT))
    ]
    rows = finished(tmp_path, source, ENGINE, *steps)
    bare = bare_pooling("embed", {"model": str(source), **ENGINE}, [*PROMPTS, *CHATS])
    for row, plain, chat in zip(rows, bare[: len(GOOD)], bare[len(GOOD) :], strict=True):
        assert row["plain"] == pytest.approx(plain, abs=1e-5)
        assert row["chat"] == pytest.approx(chat, abs=1e-5)
    assert len({tuple(row["plain"]) for row in rows}) == len(GOOD) - 1  # two are the same


@pytest.mark.long
def test_images_are_classified_as_bare_vllm_classifies_them(tmp_path: Path) -> None:
    labels = ["warm", "cold", "both"]
    source, engine = vision_classifier(tmp_path / "model", labels), {**ENGINE, "convert": "classify"}
    step = {"classify": {"column": "kind", "prompt": PLACED, "probabilities": True}}
    rows = finished(tmp_path, source, engine, step)
    bare = bare_pooling("classify", {"model": str(source), **engine}, PROMPTS)
    for row, probabilities in zip(rows, bare, strict=True):
        assert row["kind_probabilities"] == pytest.approx(probabilities, abs=1e-5)
        assert row["kind"] == labels[probabilities.index(max(probabilities))]
    assert len({row["kind"] for row in rows}) > 1


@pytest.mark.long
def test_answers_about_images_are_scored_as_bare_vllm_scores_them(tmp_path: Path) -> None:
    source = vision_model(tmp_path / "model")
    step = {"score": {"column": "fit", "prompt": CHAT, "answer": "text"}}
    rows = finished(tmp_path, source, ENGINE, step)
    prompts = [{**one, "prompt": one["prompt"] + row["text"]} for one, row in zip(CHATS, rows, strict=True)]
    bare = bare_vllm(
        {"model": str(source), **ENGINE}, {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0}, prompts
    )
    for row, one in zip(rows, bare, strict=True):
        answer = one["prompt_logprobs"][-row["fit_tokens"] :]
        assert row["fit_logprob"] == pytest.approx(sum(answer), rel=1e-4, abs=1e-3)
    # One answer to one question, about other images but for the first and the last.
    assert len({round(row["fit_logprob"], 3) for row in rows[:8]}) == 7

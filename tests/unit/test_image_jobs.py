"""Jobs whose prompts hold images, through the stages on the simulated engine: that an image is part of what a prompt is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from jobs import load
from jobs.cli import main
from jobs.preview import preview
from jobs.proposal import check_images
from jobs.reuse import KEPT, kept_in
from pipelines import vision
from pipelines.errors import InputError, SpecError
from pipelines.images import digests_of, images_of
from pipelines.part import read_part
from pipelines.prepare import Prepare
from pipelines.settings import ModelSettings
from pipelines.stage import Parcel
from tests.local.runs import TINY, job, rows_of
from tests.tiny_vision import image, vision_tokenizer
from tests.unit.stages import Output, generated, planned, run
from tests.unit.test_images import BLUE, RED

#: (text, images): the last repeats the first.
ROWS: list[tuple[str, list[bytes]]] = [
    ("What?", [RED]),
    ("What?", [BLUE]),
    ("What?", [RED, BLUE]),
    ("What?", [BLUE, RED]),
    ("What?", []),
    ("What?", [RED]),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(vision_tokenizer(tmp_path_factory.mktemp("vision")))


def settings(
    folder: Path, model: str, rows: list[tuple[str, list[bytes]]] = ROWS, /, **more: Any
) -> dict[str, Any]:
    (folder / "in").mkdir(exist_ok=True)
    kind = pa.list_(pa.binary())
    table = pa.table({"text": [text for text, _ in rows], "seen": pa.array([one for _, one in rows], kind)})
    pq.write_table(table, folder / "in" / "x.parquet")
    sections: dict[str, Any] = {"prompt": {"template": "{{ text }}", "images_column": "seen"}, **more}
    sections["model"] = {"source": model, **sections.get("model", {})}
    return job(folder / "in", sections.pop("out", folder / "out"), **sections)


def test_equal_texts_with_other_images_are_not_answered_once(tmp_path: Path, model: str) -> None:
    output = planned(settings(tmp_path, model, output={"provenance": True}))
    (footer,) = run(output.work("first"), output.plan.shards)
    rows = rows_of(tmp_path / "out").to_pylist()
    assert footer.stats.rows_reused == 1
    assert len({row["generated_text"] for row in rows}) == 5
    assert rows[0]["generated_text"] == rows[5]["generated_text"]
    assert len({row["prompt_sha256"] for row in rows}) == 5
    # The simulated engine takes 32 tokens for an image.
    bare = rows[4]["prompt_tokens"]
    assert [
        row["prompt_tokens"] - bare - len(images) for row, (_, images) in zip(rows, ROWS, strict=True)
    ] == [32 * len(images) for _, images in ROWS]


@pytest.mark.timeout(60)
def test_rows_that_wait_enter_also_when_images_turn_out_shorter(tmp_path: Path, model: str) -> None:
    rows = [("What?", [image((number, 0, 0))]) for number in range(20)]
    engine = {"source": model, "engine": {"max_num_seqs": 2}}
    output = planned(settings(tmp_path, model, rows, model=engine, shards={"rows": 20}))
    (footer,) = run(output.work("first"), output.plan.shards)
    assert footer.stats.rows_ok == 20


def test_kept_answers_are_taken_over_for_the_same_images_only(tmp_path: Path, model: str) -> None:
    def answered(name: str, rows: list[tuple[str, list[bytes]]], *before: str) -> Output:
        reuse = {"keep": True, "outputs": [str(tmp_path / one) for one in before]}
        output = planned(settings(tmp_path, model, rows, out=tmp_path / name, reuse=reuse))
        output.storage.create(KEPT, b"")
        work = output.work(name)
        run(work, output.plan.shards, kept_in=kept_in(work, output.plan, output.plan.shards))
        return output

    answered("one", [("What?", [RED]), ("What?", [BLUE]), ("Why?", [])])
    other = answered("two", [("What?", [RED]), ("What?", [image("green")]), ("Why?", [])], "one")
    stats = read_part(other.storage, other.plan.shards[0].part_name).footer.stats
    assert stats.rows_reused == 2
    one, two = (rows_of(tmp_path / name).to_pylist() for name in ("one", "two"))
    assert [a["generated_text"] == b["generated_text"] for a, b in zip(one, two, strict=True)] == [
        True,
        False,
        True,
    ]
    assert [row["prompt_tokens"] for row in one][::2] == [row["prompt_tokens"] for row in two][::2]


def test_images_go_no_further_than_the_engine(tmp_path: Path, model: str) -> None:
    output = planned(settings(tmp_path, model))
    work, (shard,) = output.work("first"), output.plan.shards
    prompts = Prepare(work).shard(Parcel(shard=shard)).prompts
    assert prompts is not None
    assert [len(images_of(one)) for one in prompts["images"]] == [1, 1, 2, 2, 0, 1]
    (batch,) = generated(work, [shard])
    after = Parcel.from_batch(batch).prompts
    assert after is not None
    assert [digests_of(one) for one in after["images"]] == [digests_of(one) for one in prompts["images"]]
    assert all(one["data"] is None for images in after["images"].to_pylist() for one in images or ())


def test_a_column_of_images_that_is_not_wanted_stays_where_it_was_read(tmp_path: Path, model: str) -> None:
    for number, columns in enumerate([["text"], "all", ["seen", "text"]]):
        given = settings(tmp_path, model, out=tmp_path / f"out{number}", output={"columns": columns})
        output = planned(given)
        work, (shard,) = output.work("first"), output.plan.shards
        wanted = ["text", "seen"] if columns == "all" else columns
        rows = Prepare(work).shard(Parcel(shard=shard)).rows
        assert isinstance(rows, pa.Table)
        assert rows.column_names == [*wanted, "row_id"]
        run(work, [shard])
        found = rows_of(output.folder)
        assert found.column_names[: len(wanted) + 1] == [*wanted, "row_id"]
        assert found["text"].to_pylist() == [text for text, _ in ROWS]
        if "seen" in wanted:
            assert found["seen"].to_pylist() == [images for _, images in ROWS]


@pytest.mark.parametrize("kind", ["embed", "classify", "score"])
def test_all_that_asks_counts_the_tokens_of_images(tmp_path: Path, model: str, kind: str) -> None:
    prompt = {"prompt_column": "text", "images_column": "seen", "chat": False}
    step = {kind: {"column": "x", "prompt": prompt, **({"answer": "text"} if kind == "score" else {})}}

    def tokens(name: str, rows: list[tuple[str, list[bytes]]]) -> int:
        output = planned(settings(tmp_path, model, rows, out=tmp_path / name, prompt=None, steps=[step]))
        (footer,) = run(output.work("first"), output.plan.shards)
        assert footer.stats.rows_ok == len(rows)
        return int(footer.stats.steps[kind]["prompt_tokens"])

    bare = tokens("bare", [(text, []) for text, _ in ROWS])
    assert tokens("seeing", ROWS) == bare + 32 * sum(len(images) for _, images in ROWS)


def test_broken_images_fail_their_rows_alone(tmp_path: Path, model: str) -> None:
    rows = [("What?", [RED]), ("What?", [b"broken"]), ("What?", [BLUE])]
    output = planned(settings(tmp_path, model, rows))
    (footer,) = run(output.work("first"), output.plan.shards)
    assert footer.stats.balanced
    assert footer.stats.error_codes == {"bad_image": 1}
    assert [row["error_code"] for row in rows_of(tmp_path / "out").to_pylist()] == [None, "bad_image", None]


def test_a_later_step_may_ask_about_images(tmp_path: Path, model: str) -> None:
    prompt = {"template": "And {{ generated_text }}?", "images_column": "seen"}
    step = {"generate": {"column": "more", "prompt": prompt, "sampling": {"temperature": 0, "max_tokens": 8}}}
    output = planned(settings(tmp_path, model, steps=[step]))
    run(output.work("first"), output.plan.shards)
    rows = rows_of(tmp_path / "out").to_pylist()
    assert len({row["more"] for row in rows}) == 5
    assert rows[0]["more"] == rows[5]["more"]


def test_a_preview_counts_images(tmp_path: Path, model: str) -> None:
    first, *_ = preview(load(settings(tmp_path, model)), rows=5, generate=False)
    assert first["prompt"] == "<|user|><image>What?<|assistant|>"
    assert first["images"] == 1


def test_shards_are_as_large_as_the_engines_work_and_not_as_the_images(tmp_path: Path, model: str) -> None:
    """On a CPU 12,000 tokens are a shard's; 64 KiB of text would be 16,384."""
    rows = [("What?", [RED + bytes([number]) * (64 << 10)]) for number in range(200)]
    shards = planned(settings(tmp_path, model, rows)).plan.shards
    assert sum(shard.rows or 0 for shard in shards) == 200
    assert 10 <= max(shard.rows or 0 for shard in shards) <= 12
    # Asked about by a later step only, they are no text either.
    step = {"generate": {"column": "more", "prompt": {"template": "a", "images_column": "seen"}}}
    later = settings(
        tmp_path, model, rows, out=tmp_path / "later", prompt={"template": "{{ text }}"}, steps=[step]
    )
    assert [shard.rows for shard in planned(later).plan.shards] == [shard.rows for shard in shards]
    # And by whatever name it calls them.
    step = {"generate": {"column": "more", "prompt": {"template": "a", "images_column": "picture"}}}
    renamed = settings(
        tmp_path,
        model,
        rows,
        out=tmp_path / "renamed",
        prompt={"template": "{{ text }}"},
        output={"rename": {"seen": "pictures"}},
        steps=[{"explode": {"column": "pictures", "into": "picture"}}, step],
    )
    assert [shard.rows for shard in planned(renamed).plan.shards] == [shard.rows for shard in shards]


def test_validating_says_what_the_plan_says_of_images(tmp_path: Path, model: str) -> None:
    def said(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, [arguments[0], str(tmp_path / "job.yaml"), *arguments[1:]])
        return done.exit_code, done.output

    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings(tmp_path, model)))
    code, words = said("validate")
    assert (code, "valid job" in words) == (0, True)
    blind = f"model.source={TINY}"
    code, words = said("validate", blind)
    assert (code, words) == said("plan", blind)
    assert code != 0
    assert f"prompt.images_column: the model '{TINY}' takes no images" in " ".join(words.split())


def test_validating_looks_no_further_than_this_machine(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(model: ModelSettings, *, weights: bool) -> ModelSettings:
        raise AssertionError(f"{model.source} would be fetched")

    monkeypatch.setattr(vision, "local_model", fetched)
    monkeypatch.setenv("DRAY_MODELS", str(tmp_path / "models"))
    snapshot = tmp_path / "hub" / "models--of--somebody" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    for file in TINY.iterdir():
        if file.suffix == ".json":
            (snapshot / file.name).write_bytes(file.read_bytes())

    def check(source: str) -> None:
        engine = {"download_dir": str(tmp_path / "hub")}
        check_images(
            load(settings(tmp_path, model, model={"source": source, "engine": engine})).spec, at_hand=True
        )

    check("s3://nowhere/model")
    check("of/nobody")
    check("of/somebody")  # whose processor may not have been asked for yet
    (snapshot / "model.safetensors").write_bytes(b"")
    with pytest.raises(SpecError, match=r"prompt.images_column: the model 'of/somebody' takes no images"):
        check("of/somebody")
    (snapshot / "preprocessor_config.json").write_text("{}")
    check("of/somebody")


def test_mistakes_stop_the_plan(tmp_path: Path, model: str) -> None:
    with pytest.raises(SpecError, match=r"prompt.images_column: the model .* takes no images"):
        planned(settings(tmp_path, str(TINY)))
    step = {
        "embed": {
            "column": "x",
            "prompt": {"prompt_column": "text", "images_column": "seen"},
            "model": {"source": str(TINY)},
        }
    }
    with pytest.raises(SpecError, match=r"steps.embed.prompt.images_column: the model .* takes no images"):
        planned(settings(tmp_path, model, steps=[step]))
    with pytest.raises(SpecError, match=r"output.conversation: the column holds text only"):
        planned(settings(tmp_path, model, output={"conversation": "turns"}))
    with pytest.raises(InputError, match=r"unknown column 'sen'; did you mean 'seen'"):
        planned(settings(tmp_path, model, prompt={"template": "a", "images_column": "sen"}))
    pq.write_table(pa.table({"text": ["a"], "seen": [1.5]}), tmp_path / "in" / "x.parquet")
    given = job(
        tmp_path / "in",
        tmp_path / "o",
        prompt={"template": "a", "images_column": "seen"},
        model={"source": model},
    )
    with pytest.raises(SpecError, match=r"prompt.images_column: 'seen' holds double values"):
        planned(given)

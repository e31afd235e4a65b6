"""Duplicates: against plain reimplementations, what a job file may ask, keys that outlive Parquet, and a retry's answers."""

from __future__ import annotations

import io
import itertools
import json
import unicodedata
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import pipelines.minhash
from jobs import load
from jobs.preview import preview
from jobs.proposal import propose
from pipelines.dedup import duplicates, key_width, keys_of, normalized
from pipelines.errors import SpecError
from pipelines.minhash import bands_for, signatures, words_of
from pipelines.step_settings import DedupStep
from tests.local.runs import job, write_questions


def step(**settings: Any) -> DedupStep:
    return DedupStep.model_validate(settings)


def gone(rows: pa.Table, of: DedupStep, rounds: list[int] | None = None) -> list[bool]:
    when = np.array(rounds or [0] * len(rows), np.int32)
    return duplicates(keys_of(rows, of), when, of).tolist()


# ── Exact ────────────────────────────────────────────────────────────────────────────────────────────────────────

TEXTS = st.one_of(
    st.sampled_from(
        ["a", "A", " a ", "a b", "a\t\u00a0b", "ﬁ", "fi", "FI", "É", "e\u0301", "İ", "ß", "", " ", "ab"]
    ),
    st.text(max_size=4),
    st.none(),
)
RECORDS = st.lists(
    st.tuples(TEXTS, TEXTS, st.one_of(st.none(), st.integers(0, 3)), st.integers(0, 2)), max_size=30
)


def plain(text: str | None, normalize: bool) -> str | None:
    if text is None or not normalize:
        return text
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


@given(records=RECORDS, normalize=st.booleans(), width=st.integers(1, 3))
def test_exact_keeps_the_first_of_each_class(
    records: list[tuple[str | None, str | None, int | None, int]], normalize: bool, width: int
) -> None:
    rows = pa.table(
        {
            "one": pa.array([record[0] for record in records], pa.string()),
            "two": pa.array([record[1] for record in records], pa.string()),
            "three": pa.array([record[2] for record in records], pa.int64()),
        }
    )
    rounds = [record[3] for record in records]
    of = step(columns=["one", "two", "three"][:width], normalize=normalize)

    seen, expected = set(), [True] * len(records)
    for i in sorted(range(len(records)), key=lambda i: (rounds[i], i)):
        one, two, three, _ = records[i]
        key = (plain(one, normalize), plain(two, normalize), three)[:width]
        expected[i] = key in seen
        seen.add(key)

    assert gone(rows, of, rounds) == expected


def test_values_and_their_borders() -> None:
    rows = pa.table({"a": ["ab", "a", None, "", "-", None], "b": ["c", "bc", "", None, "-", ""]})
    assert gone(rows, step(columns=["a", "b"])) == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("values", "type_", "expected"),
    [
        ([0.0, -0.0, 1.5, float("nan"), float("nan")], pa.float32(), [0, 1, 0, 0, 1]),
        ([True, False, None, None], pa.bool_(), [0, 0, 0, 1]),
        ([Decimal("1.10"), Decimal("1.10"), Decimal("1.11")], pa.decimal128(9, 2), [0, 1, 0]),
        ([date(2026, 1, 1), date(2026, 1, 1), date(2026, 1, 2)], pa.date64(), [0, 1, 0]),
        ([datetime(2026, 1, 1), datetime(2026, 1, 1, 0, 0, 10)], pa.timestamp("s"), [0, 0]),
        ([datetime(2026, 1, 1, tzinfo=UTC)] * 2, pa.timestamp("ms", "Europe/Berlin"), [0, 1]),
        (["a", "A", "b"], pa.dictionary(pa.int32(), pa.string()), [0, 1, 0]),
        (["a", "A", "b"], pa.large_string(), [0, 1, 0]),
        ([None, None], pa.null(), [0, 1]),
    ],
)
def test_keys_outlive_a_parquet_file(values: list[Any], type_: pa.DataType, expected: list[int]) -> None:
    """Those of a part are made from memory, and again from the part where they are lost."""
    rows = pa.table({"x": pa.array(values, type_)})
    of = step(columns=["x"])
    sink = io.BytesIO()
    pq.write_table(rows, sink)
    assert (keys_of(pq.read_table(io.BytesIO(sink.getvalue())), of) == keys_of(rows, of)).all()
    assert gone(rows, of) == [bool(one) for one in expected]


def test_text_that_is_not_utf_8_is_compared_as_it_is() -> None:
    broken = pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.array([0, 2, 4, 6], pa.int32()).buffers()[1], pa.py_buffer(b"A\xffa\xffA\xfe")],
    )
    rows = pa.table({"x": broken})
    assert gone(rows, step(columns=["x"])) == [False, True, False]
    assert gone(rows, step(columns=["x"], normalize=False)) == [False, False, False]
    assert len(gone(rows, step(columns=["x"], method="minhash"))) == 3


def test_what_stays_does_not_depend_on_which_of_the_others_are_gone_already() -> None:
    """Which is what a crash between two rewritten parts leaves behind."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcd"), 4)) for _ in range(120)]
    for of in (step(columns=["x"]), step(columns=["x"], method="minhash", threshold=0.6, ngram=1)):
        rows = pa.table({"x": texts})
        rounds = rng.integers(0, 3, len(texts)).astype(np.int32)
        keys = keys_of(rows, of)
        goes = duplicates(keys, rounds, of)
        assert 0 < goes.sum() < len(texts)
        for _ in range(20):
            there = ~goes | (rng.random(len(texts)) < 0.5)
            assert (duplicates(keys[there], rounds[there], of) == goes[there]).all()


@given(text=st.text())
def test_normalizing_twice_changes_nothing_for_plain_text(text: str) -> None:
    once = normalized(text.encode())
    assert once == plain(text, True).encode()  # type: ignore[union-attr]


# ── MinHash ──────────────────────────────────────────────────────────────────────────────────────────────────────


def jaccard(a: str, b: str, ngram: int) -> float:
    """Of the sets of word n-grams, without hashing."""
    one, other = (
        {tuple(words[i : i + ngram]) for i in range(max(1, len(words) - ngram + 1))} if words else set()
        for words in (a.split(), b.split())
    )
    return len(one & other) / len(one | other) if one | other else 1.0


SENTENCES = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.tuples(st.integers(0, 39), st.integers(0, 5)), max_size=12)),
    min_size=2,
    max_size=10,
)


@settings(max_examples=60, deadline=None)
@given(made=SENTENCES, ngram=st.integers(1, 3), threshold=st.sampled_from([0.5, 0.7, 0.8]))
def test_minhash_against_true_jaccard(
    made: list[tuple[int, list[tuple[int, int]]]], ngram: int, threshold: float
) -> None:
    """Texts of 40 words, some of them replaced. Four standard errors of the estimate are left undecided."""
    num_perm = 256
    texts = []
    for base, edits in made:
        words = [f"w{base}x{i}" for i in range(40)]
        for place, word in edits:
            words[place] = f"other{word}"
        texts.append(" ".join(words))
    of = step(columns=["x"], method="minhash", threshold=threshold, ngram=ngram, num_perm=num_perm)
    goes = gone(pa.table({"x": texts}), of)

    margin = 4 * 0.5 / num_perm**0.5
    kept = [text for text, dropped in zip(texts, goes, strict=True) if not dropped]
    for a, b in itertools.combinations(kept, 2):
        # The bands miss 2 % of pairs at the threshold, and far fewer above.
        assert jaccard(a, b, ngram) < threshold + margin
    for i, text in enumerate(texts):
        before = [other for j, other in enumerate(texts[:i]) if not goes[j]]
        nearest = max((jaccard(text, other, ngram) for other in before), default=0.0)
        if goes[i]:
            assert nearest >= threshold - margin


def test_the_estimate_has_the_error_that_the_settings_promise() -> None:
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(150):
        words = rng.integers(0, 500, 40).astype(str).tolist()
        other = list(words)
        for place in rng.integers(0, 40, rng.integers(0, 12)):
            other[place] = "x"
        first, second = signatures([words, other], 2, 128)
        errors.append(float((first == second).mean()) - jaccard(" ".join(words), " ".join(other), 2))
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.5 / 128**0.5


def test_signatures_are_the_same_everywhere() -> None:
    """Whatever the block, the neighbours, the process."""
    texts = [
        words_of(text) for text in ("", "one", "the quick brown fox " * 40, "", "a b c d e f g", "你好世界")
    ]
    whole = signatures(texts, 3, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.minhash, "_BLOCK", 16 * 3)
        assert (signatures(texts, 3, 16) == whole).all()
    for text, row in zip(texts, whole, strict=True):
        assert (signatures([text], 3, 16)[0] == row).all()
    assert whole[4][:3].tolist() == [465794063, 363981641, 38035263]


def test_words() -> None:
    assert words_of("What's up, doc? 3.5") == ["What", "s", "up", "doc", "3", "5"]
    assert words_of("你好 world") == ["你", "好", "world"]
    assert words_of("?! …") == ["?!", "…"]


def test_texts_without_words_are_equal_to_each_other_only() -> None:
    rows = pa.table({"x": ["", "one", None, "one two three four five"]})
    assert gone(rows, step(columns=["x"], method="minhash")) == [False, False, True, False]


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("num_perm", [16, 128, 1024])
def test_bands_meet_at_the_threshold(threshold: float, num_perm: int) -> None:
    bands = bands_for(threshold, num_perm)
    assert bands.count * bands.rows <= num_perm
    meets = 1 - (1 - threshold**bands.rows) ** bands.count
    assert meets >= 0.98 or bands.rows == 1
    of = step(columns=["x"], method="minhash", threshold=threshold, num_perm=num_perm)
    assert keys_of(pa.table({"x": ["a b c d"]}), of).shape == (1, key_width(of))


# ── What a job file may ask ──────────────────────────────────────────────────────────────────────────────────────


def refused(tmp_path: Path, *steps: dict[str, Any], **sections: Any) -> str:
    write_questions(tmp_path / "in", rows=4)
    with pytest.raises(SpecError) as caught:
        propose(load(job(tmp_path / "in", tmp_path / "out", steps=list(steps), **sections)))
    return str(caught.value)


DEDUP = {"dedup": {"columns": ["question"]}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": []}, "columns"),
        ({"columns": ["question"], "threshold": 0.5}, "threshold: only for `method: minhash`"),
        ({"columns": ["question", "answer"], "method": "minhash"}, "minhash compares one column of text"),
        ({"columns": ["question"], "method": "minhash", "threshold": 0}, "threshold"),
        ({"columns": ["question"], "method": "minhash", "num_perm": 8}, "num_perm"),
        ({"columns": ["qestion"]}, "steps.dedup: columns: there is no column 'qestion' by then"),
        ({"columns": ["prompt_tokens"], "method": "minhash"}, "'prompt_tokens' holds int32 values, not text"),
    ],
)
def test_what_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    assert message in refused(tmp_path, {"dedup": settings})


def test_dedup_is_the_last_step(tmp_path: Path) -> None:
    message = refused(tmp_path, {"name": "once", **DEDUP}, {"filter": {"where": "completion_tokens > 1"}})
    assert "steps.once: dedup must be the last step, filter follows it" in message
    assert "a second job whose input.path is this job's data/" in message
    assert "steps.dedup: dedup must be the last step, dedup-2 follows it" in refused(tmp_path, DEDUP, DEDUP)


def test_files_may_not_change_under_a_dedup(tmp_path: Path) -> None:
    message = refused(tmp_path, DEDUP, input={"path": str(tmp_path / "in"), "on_changed": "replace"})
    assert "set input.on_changed: refuse" in message


def test_a_list_is_not_compared(tmp_path: Path) -> None:
    taken = {"parse": {"json": {"tags": "list<string>"}}}
    assert "not text, numbers, booleans or dates" in refused(
        tmp_path, taken, {"dedup": {"columns": ["tags"]}}
    )


def test_a_plan_tells_the_step(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=4)
    proposal = propose(load(job(tmp_path / "in", tmp_path / "out", steps=[DEDUP])))
    assert [(one["name"], one["kind"]) for one in proposal.summary["steps"]] == [("dedup", "dedup")]
    json.dumps(proposal.summary)
    console = Console(width=120)
    with console.capture() as said:
        console.print(proposal.render())
    assert "steps   answers → dedup (by question, exact)" in said.get()


def test_a_preview_shows_what_stays_of_the_first_rows(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=4)
    made = job(tmp_path / "in", tmp_path / "out", steps=[{"dedup": {"columns": ["finish_reason"]}}])
    assert [len(row["answers"]) for row in preview(load(made), rows=4, generate=True)] == [1, 0, 0, 0]

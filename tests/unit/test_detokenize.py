"""Text made outside the engine equals vLLM's incremental detokenisation, step by step, for any ids.

`step_by_step` is the loop of vLLM's FastIncrementalDetokenizer; tests/local/test_vllm_engine.py compares with the real one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream

from pipelines.detokenize import Detokenizer
from pipelines.settings import SamplingSettings
from tests.tiny_models import byte_level, sentencepiece_style

pytestmark = pytest.mark.slow


FAMILIES = {"byte_level": byte_level, "sentencepiece": sentencepiece_style}
VOCAB = 640  # more than the tokenizers have: models pad their vocabularies
ORDINARY = st.integers(0, VOCAB - 1)
BYTES = st.integers(3, 258)
IDS = st.one_of(st.lists(ORDINARY, max_size=12), st.lists(BYTES, max_size=12))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tokenizers")
    from transformers import AutoTokenizer  # not by those who only collect the tests: with torch it takes 6 s

    return {name: AutoTokenizer.from_pretrained(make(folder / name)) for name, make in FAMILIES.items()}


def step_by_step(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int], skip_special: bool) -> str:
    stream = DecodeStream(ids=list(prompt), skip_special_tokens=skip_special)
    text = ""
    for token_id in ids:
        try:
            piece = stream.step(tokenizer._tokenizer, token_id)
        except Exception as error:  # tokenizers has no type of its own for it
            if not str(error).startswith("Invalid prefix encountered"):
                raise
            stream = DecodeStream(skip_special_tokens=skip_special)
            piece = stream.step(tokenizer._tokenizer, token_id)
        text += piece or ""
    return text


def text_of(
    tokenizer: Any, prompt: list[int], ids: list[int], finish: str = "length", **sampling: Any
) -> str:
    return Detokenizer(tokenizer, SamplingSettings(**sampling)).texts([prompt], [ids], [finish])[0]


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=50, deadline=None)
@example(rows=[([131, 0, 0, 0, 0, 0, 228, 131, 131], [259])])  # the first byte spoils the whole run
@given(rows=st.lists(st.tuples(IDS.filter(bool), IDS), min_size=1, max_size=8))
def test_any_ids_give_the_text_of_the_incremental_detokenizer(
    tokenizers: dict[str, Any], family: str, skip_special: bool, rows: list[tuple[list[int], list[int]]]
) -> None:
    tokenizer = tokenizers[family]
    detokenizer = Detokenizer(tokenizer, SamplingSettings(skip_special_tokens=skip_special))

    texts = detokenizer.texts([p for p, _ in rows], [i for _, i in rows], ["length"] * len(rows))

    assert texts == [step_by_step(tokenizer, prompt, ids, skip_special) for prompt, ids in rows]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "text", ["über café 你好 🎉🚀 end", " leading space", "\n\nnew lines\n", "a  b   c", "�"]
)
def test_answers_cut_anywhere_give_the_text_of_the_incremental_detokenizer(
    tokenizers: dict[str, Any], family: str, text: str
) -> None:
    tokenizer = tokenizers[family]
    prompt = tokenizer.encode("A question? 你好\n", add_special_tokens=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    # Cut the prompt as well: an answer may continue a character that the prompt began.
    for tail in range(1, len(prompt) + 1):
        for length in range(len(ids) + 1):
            expected = step_by_step(tokenizer, prompt[:tail], ids[:length], True)
            assert text_of(tokenizer, prompt[:tail], ids[:length]) == expected


def test_a_byte_run_longer_than_the_tail_of_the_prompt(tokenizers: dict[str, Any]) -> None:
    """Found by random search: the run's bad bytes lie before the tail, and spoil the answer's good ones."""
    prompt = [170, 102, 185, 106, 230, 37, 61, 176, 210, 55, 104, 204, 171, 31, 24, 122, 94, 109]

    assert text_of(tokenizers["sentencepiece"], prompt, [91, 60]) == ""


def test_a_sentencepiece_answer_keeps_its_leading_space(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["sentencepiece"]
    prompt, answer = (
        tokenizer.encode(text, add_special_tokens=False) for text in ("The quick", "the lazy dog")
    )

    assert tokenizer.decode(answer) == "the lazy dog"
    assert text_of(tokenizer, prompt, answer) == " the lazy dog"
    assert text_of(tokenizer, [1], answer) == "the lazy dog"  # nothing visible before it


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stop_token_is_dropped_as_vllm_drops_it(tokenizers: dict[str, Any], family: str) -> None:
    tokenizer = tokenizers[family]
    prompt, ids = (tokenizer.encode(text, add_special_tokens=False) for text in ("The old", "The tree"))
    stop = ids[-1]
    end = tokenizer.eos_token_id
    whole = text_of(tokenizer, prompt, ids)

    assert text_of(tokenizer, prompt, [*ids, end], "stop") == whole
    assert text_of(tokenizer, prompt, [*ids, end], "length", skip_special_tokens=False) == whole + "</s>"
    assert text_of(tokenizer, prompt, [*ids, end], "stop", skip_special_tokens=False) == whole
    assert text_of(tokenizer, prompt, [*ids, stop], "stop") == whole
    assert text_of(tokenizer, prompt, ids, "stop", include_stop_str_in_output=True) == whole
    assert text_of(tokenizer, prompt, ids, "stop") != whole


def test_whole_answers_are_decoded_in_batches(
    tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ordinary text must not take the slow way, which costs ten times as much."""
    for tokenizer in tokenizers.values():
        detokenizer = Detokenizer(tokenizer, SamplingSettings())
        monkeypatch.setattr(detokenizer, "_stream", lambda prompt, ids: pytest.fail("step by step"))
        prompt, ids = (
            tokenizer.encode(text, add_special_tokens=False)
            for text in ("Question 你好:\n", "über café 🎉 the end")
        )

        assert detokenizer.texts([prompt] * 3, [ids] * 3, ["length"] * 3)[0].strip() == "über café 🎉 the end"


def test_other_decoders_go_step_by_step() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["[UNK]", "do", "n", "'", "t", "##ing", "it", "."]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = [1, 2, 3, 4, 6, 5, 7]

    assert text_of(wrapped, [1], ids) == step_by_step(wrapped, [1], ids, True)

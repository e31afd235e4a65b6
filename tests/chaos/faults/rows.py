"""Rows that fail, or that an engine dies of."""

from __future__ import annotations

from typing import Any

from tests.chaos.faults.registry import fault
from tests.chaos.stage import ROWS
from tests.chaos.trial import Trial
from tests.local.runs import TINY

#: Contains tokens that no question has.
POISON = "\u2620\u2622 Say nothing."


@fault("a prompt that crashes the engine")
def poison_crashes(trial: Trial) -> None:
    """One or two rows get `engine_crash`, all others are answered."""
    if trial.engine == "simulated":
        _poisoned(trial, POISON, model={"simulated": {"dies_of": poison_token(trial.answers)}})
        return
    # On a CPU, vLLM 0.32 turns a seeded request's generator back after each chunk of a prefill, and dies of it. Seven
    # questions of 40 tokens fit into one step beside their answers; a prompt of 400 never does.
    _poisoned(
        trial,
        "Please think about this. " * 60,
        model={
            "engine": {
                "max_num_seqs": 7,
                "max_num_batched_tokens": 300,
                "enable_chunked_prefill": True,
                "enable_prefix_caching": False,
            }
        },
        # The most likely token each time, through the path that draws random numbers.
        sampling={"temperature": 0.5, "top_k": 1, "seed": 7},
    )


@fault("engine hang (a prompt that stalls the engine)", engines=("simulated",))
def poison_stalls(trial: Trial) -> None:
    """No token from any request: the watchdog ends the engine; the row gets `engine_crash` in the end."""
    _poisoned(
        trial,
        POISON,
        model={"simulated": {"stalls_of": poison_token(trial.answers)}},
        errors={"engine_stall_s": 3},
    )


def _poisoned(trial: Trial, poison: str, **sections: Any) -> None:
    rows = trial.dice.sample(range(ROWS), trial.dice.choice([1, 1, 2]))

    def edit(questions: list[str | None]) -> None:
        for row in rows:
            questions[row] = poison

    trial.prepare(edit=edit, **sections)
    trial.errors = {trial.row_name(row): frozenset({"engine_crash"}) for row in rows}
    driver = trial.start()
    trial.wait_until(lambda: trial.begun() or not driver.running, 120, "nothing began")
    trial.strike()
    trial.wait(driver, 0)
    trial.result.note = f"{len(rows)} poisonous rows"


@fault("5 % random row errors", bounded=True)
def row_errors(trial: Trial) -> None:
    """Null values, prompts that are too long, and a template that divides by zero; each row keeps its own error."""
    kinds: dict[str, tuple[str | None, str]] = {
        "null": (None, "missing_value"),
        "long": ("too long " * 600, "prompt_too_long"),
        "template": ("BOOM", "prompt_error"),
    }
    chosen = {
        row: kinds[trial.dice.choice(sorted(kinds))] for row in trial.dice.sample(range(ROWS), ROWS // 20)
    }

    def edit(questions: list[str | None]) -> None:
        for row, (question, _) in chosen.items():
            questions[row] = question

    template = "{% if question == 'BOOM' %}{{ 1 // 0 }}{% endif %}{{ question }}"
    trial.prepare(edit=edit, prompt={"template": template})
    trial.errors = {trial.row_name(row): frozenset({code}) for row, (_, code) in chosen.items()}
    driver = trial.start()
    if trial.dice.random() < 0.5 and trial.moment(driver):  # and half of the drivers are killed
        trial.strike()
        driver.kill()
        trial.finish()
    else:
        trial.wait(driver, 0)
        trial.result.struck = True


def poison_token(questions: dict[str, str]) -> int:
    """A token of `POISON` that no question has."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    known = {token for question in questions for token in tokenizer.encode(question).ids}
    strange = [token for token in tokenizer.encode(POISON).ids if token not in known]
    if not strange:
        raise ValueError("the tokenizer has no token for the poison alone")
    return int(strange[0])

"""vLLM's argument names are known without importing vLLM, and mistakes name the way out."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipelines import engine_args
from pipelines.engine_args import RESULT_NEUTRAL_ARGS, check_engine_args, known_engine_args
from pipelines.errors import ModelError

#: Left vLLM between 0.26 and 0.32, still neutral where they exist.
GONE_SINCE_0_26 = {"max_num_partial_prefills", "max_long_partial_prefills"}


def test_the_installed_vllms_arguments_are_read_from_its_source() -> None:
    known = known_engine_args()

    assert known is not None
    assert {"max_model_len", "tensor_parallel_size", "gpu_memory_utilization", "enable_log_requests"} <= known
    assert not any(name.startswith("_") for name in known)


def test_vllm_is_not_imported() -> None:
    code = (
        "import sys; from pipelines.engine_args import check_engine_args; "
        "check_engine_args({'max_model_len': 1}); print('vllm' in sys.modules or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("max_modl_len", "did you mean max_model_len?"),
        ("max-num-seqs", "did you mean max_num_seqs?"),
        ("tensor_parallel", "did you mean tensor_parallel_size?"),
        ("qqqq", "names are those of vLLM's EngineArgs"),
        ("model", "`model.source`"),
        ("revision", "`model.revision`"),
        ("tokenizer", "`model.tokenizer`"),
        ("data_parallel_size", "`pool.replicas`"),
        ("data_parallel_rank", "`pool.replicas`"),
        ("skip_tokenizer_init", "end-of-sequence"),
        ("reasoning_parser", "`sampling.reasoning_parser`"),
    ],
)
def test_a_mistaken_key_is_named_with_what_to_do(key: str, hint: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_engine_args({"max_model_len": 4096, key: 1})

    assert f"model.engine.{key}" in str(caught.value)
    assert hint in str(caught.value)


def test_right_keys_pass() -> None:
    check_engine_args(
        {"max_model_len": 4096, "tensor_parallel_size": 2, "dtype": "bfloat16", "enforce_eager": True}
    )


def test_without_vllm_only_drays_own_keys_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_args, "known_engine_args", lambda: None)

    check_engine_args({"whatever": 1})
    with pytest.raises(ModelError, match=r"model\.source"):
        check_engine_args({"model": "x"})


def test_neutral_arguments_exist_and_none_changes_results() -> None:
    known = known_engine_args()
    assert known is not None

    assert known | GONE_SINCE_0_26 >= RESULT_NEUTRAL_ARGS
    assert not RESULT_NEUTRAL_ARGS & {
        "dtype", "quantization", "max_model_len", "kv_cache_dtype", "hf_overrides", "load_format", "seed",
        "generation_config", "override_generation_config", "speculative_config", "logits_processors",
        "tokenizer_mode", "tokenizer_revision", "logprobs_mode", "rope_scaling", "lora_dtype", "chat_template",
    }  # fmt: skip

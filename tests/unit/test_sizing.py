"""Engine sizing: known shapes come to known numbers, what is sized fits, and more memory never gives less."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.engine_args import RESULT_NEUTRAL_ARGS, known_engine_args
from pipelines.model_shape import ModelShape, read_shape, shape_of
from pipelines.settings import ModelSettings, SamplingSettings
from pipelines.sizing import (
    GIB,
    OUTSIDE_BYTES,
    activation_bytes,
    capture_sizes,
    engines_that_fit,
    gpu_share,
    size_for_cpu,
    size_for_gpu,
)

H200, L4 = 143_771 * 2**20, 23_034 * 2**20
#: From the models' own config.json on the hub.
QWEN_05B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
QWEN_7B = {
    **QWEN_05B,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
#: DeepSeek-V2-Lite: MLA.
MLA = {
    "hidden_size": 2048,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 27,
    "torch_dtype": "bfloat16",
    "vocab_size": 102400,
}
SAMPLING = SamplingSettings()


def model(**engine: Any) -> ModelSettings:
    return ModelSettings(source="Qwen/Qwen2.5", engine=engine)


# ── Shapes ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("config", "parameters"), [(QWEN_05B, 494_032_768), (QWEN_7B, 7_615_616_512)])
def test_parameters_reckoned_from_the_config_are_the_models_own(
    config: dict[str, Any], parameters: int
) -> None:
    assert shape_of(config, {}).parameters == pytest.approx(parameters, rel=1e-3)  # but for norms and biases


def test_the_kv_cache_of_a_token() -> None:
    assert shape_of(QWEN_05B, {}).kv_bytes_per_token() == 24 * 2 * 64 * 2 * 2  # 12 KiB
    seven = shape_of(QWEN_7B, {})
    assert seven.kv_bytes_per_token() == 28 * 4 * 128 * 2 * 2  # 56 KiB
    assert seven.kv_bytes_per_token(tensor_parallel=2) == 28 * 2 * 128 * 2 * 2
    assert seven.kv_bytes_per_token(tensor_parallel=8) == 28 * 1 * 128 * 2 * 2  # heads are held twice
    assert seven.kv_bytes_per_token(pipeline_parallel=2) == 14 * 4 * 128 * 2 * 2
    assert shape_of(QWEN_7B, {"kv_cache_dtype": "fp8"}).kv_bytes_per_token() == 28 * 4 * 128 * 2
    assert shape_of(QWEN_7B, {"dtype": "float32"}).kv_bytes_per_token() == 28 * 4 * 128 * 2 * 4


def test_mla_keeps_one_latent_vector_which_no_gpu_shares() -> None:
    shape = shape_of(MLA, {})
    assert shape.kv_bytes_per_token() == 27 * (512 + 64) * 2
    assert shape.kv_bytes_per_token(tensor_parallel=8) == shape.kv_bytes_per_token()
    assert shape.parameters is None  # its layers are not reckoned, and nothing is made up


def test_layers_with_a_window_do_not_grow() -> None:
    kinds = ["sliding_attention", "full_attention"] * 12
    shape = shape_of({**QWEN_05B, "layer_types": kinds}, {})
    assert shape.kv_bytes_per_token() == 12 * 2 * 64 * 2 * 2


def test_a_multimodal_config_tells_of_its_language_model() -> None:
    assert shape_of({"text_config": QWEN_7B, "model_type": "x"}, {}) == shape_of(QWEN_7B, {})


@pytest.mark.parametrize(
    ("quantised", "width"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, 0.5),
        ({"quantization_config": {"quant_method": "fp8"}}, 1.0),
        ({}, 2.0),
    ],
)
def test_weights_are_as_wide_as_the_config_says(quantised: dict[str, Any], width: float) -> None:
    shape = shape_of({**QWEN_7B, **quantised}, {})
    assert shape.parameters is not None
    assert shape.weight_bytes == int(shape.parameters * width)


def test_an_empty_config_says_nothing() -> None:
    shape = shape_of({}, {})
    assert (shape.parameters, shape.weight_bytes, shape.kv_bytes_per_token()) == (None, None, None)


def test_a_model_elsewhere_has_no_shape_and_one_here_has(tmp_path: Path) -> None:
    assert read_shape(ModelSettings(source="nobody/has-this-model")) is None
    (tmp_path / "config.json").write_text(json.dumps(QWEN_05B))
    shape = read_shape(ModelSettings(source=str(tmp_path), engine={"load_format": "dummy"}))
    assert shape == shape_of(QWEN_05B, {})


# ── Engines ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_large_gpu_runs_512_requests_within_captured_graphs() -> None:
    args = size_for_gpu(shape_of(QWEN_7B, {}), model(), SAMPLING, H200).args
    graphs = args.pop("cudagraph_capture_sizes")
    assert args == {"max_num_seqs": 512, "max_num_batched_tokens": 16_384, "gpu_memory_utilization": 0.9}
    assert set(range(8, 257, 8)) | set(range(256, 513, 16)) < set(graphs)
    assert graphs[-1] == 2048


@given(seqs=st.integers(1, 3000), more=st.integers(0, 4000))
def test_every_step_up_to_the_largest_graph_finds_one_little_larger(seqs: int, more: int) -> None:
    sizes = capture_sizes(seqs, seqs + more)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, seqs + more)
    padding = [larger - smaller - 1 for smaller, larger in itertools.pairwise(sizes)]
    assert all(pad < 16 for size, pad in zip(sizes, padding, strict=False) if size < seqs)
    assert all(pad <= max(15, size // 8) for size, pad in zip(sizes, padding, strict=False))


def test_a_small_gpu_runs_as_many_as_its_kv_cache_holds() -> None:
    sizing = size_for_gpu(shape_of(QWEN_7B, {}), model(), SAMPLING, L4)
    assert sizing.kv_tokens is not None
    assert 8 <= sizing.args["max_num_seqs"] < 256
    assert sizing.args["max_num_seqs"] * 768 <= sizing.kv_tokens


def test_what_does_not_fit_is_said() -> None:
    sizing = size_for_gpu(shape_of(QWEN_7B, {}), model(), SAMPLING, 16 * GIB)
    assert sizing.kv_bytes is not None
    assert sizing.kv_bytes < 0
    assert "does not fit" in sizing.notes[-1]


def test_the_users_own_arguments_win_and_are_marked() -> None:
    given = {"max_num_seqs": 1000, "gpu_memory_utilization": 0.5}
    sizing = size_for_gpu(shape_of(QWEN_7B, {}), model(**given), SAMPLING, H200)
    assert {name: sizing.args[name] for name in given} == given
    assert set(sizing.given) == set(given)
    assert 1008 in sizing.args["cudagraph_capture_sizes"]  # 1,000 in vLLM's steps of 16


@pytest.mark.parametrize(
    "engine",
    [
        {"enforce_eager": True},
        {"max_cudagraph_capture_size": 64},
        {"cudagraph_capture_sizes": [1, 2]},
        {"compilation_config": {"cudagraph_capture_sizes": [1, 2]}},
        {"speculative_config": {"method": "ngram"}},
    ],
)
def test_no_capture_size_of_ours_where_the_user_chose_or_nothing_is_captured(engine: dict[str, Any]) -> None:
    args = size_for_gpu(shape_of(QWEN_7B, {}), model(**engine), SAMPLING, H200).args
    for name in ("max_cudagraph_capture_size", "cudagraph_capture_sizes"):
        assert args.get(name) == engine.get(name)


def test_without_chunked_prefill_vllm_chooses_the_tokens_of_a_step() -> None:
    args = size_for_gpu(None, model(enable_chunked_prefill=False), SAMPLING, H200).args
    assert "max_num_batched_tokens" not in args
    args = size_for_cpu(None, model(), SamplingSettings(seed=1), GIB).args
    assert "max_num_batched_tokens" not in args


def test_an_unknown_model_gets_numbers_and_a_note() -> None:
    sizing = size_for_gpu(None, model(), SAMPLING, H200)
    assert sizing.args["max_num_seqs"] == 512
    assert sizing.kv_tokens is None
    assert sizing.notes


def test_every_argument_is_one_of_vllms_and_changes_no_answer() -> None:
    known = known_engine_args()
    assert known is not None, "vLLM is not installed"
    for sizing in (
        size_for_gpu(None, model(), SAMPLING, H200, 3),
        size_for_cpu(None, model(), SAMPLING, GIB),
    ):
        assert sizing.args.keys() <= known
        assert sizing.args.keys() <= RESULT_NEUTRAL_ARGS


shapes = st.builds(
    lambda layers, kv, group, size, width, vocabulary: shape_of(
        {
            "hidden_size": kv * group * size,
            "intermediate_size": width * kv * group * size,
            "num_attention_heads": kv * group,
            "num_key_value_heads": kv,
            "num_hidden_layers": layers,
            "vocab_size": vocabulary,
        },
        {},
    ),
    st.integers(1, 80),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 8),
    st.sampled_from([64, 128]),
    st.integers(2, 5),
    st.integers(1_000, 256_000),
)


@given(shape=shapes, gib=st.integers(8, 288), engines=st.integers(1, 3), longest=st.integers(1, 4096))
def test_engines_fit_into_their_gpu(shape: ModelShape, gib: int, engines: int, longest: int) -> None:
    sampling = SamplingSettings(max_tokens=longest)
    sizing = size_for_gpu(shape, model(), sampling, gib * GIB, engines)
    share = sizing.args["gpu_memory_utilization"]
    assert engines * (share * gib * GIB + OUTSIDE_BYTES) <= gib * GIB
    assert sizing.weight_bytes is not None
    assert sizing.kv_bytes is not None
    assert sizing.kv_bytes + sizing.weight_bytes <= share * gib * GIB
    seqs = sizing.args["max_num_seqs"]
    assert 1 <= seqs <= sizing.args["max_num_batched_tokens"]
    assert seqs <= sizing.args["cudagraph_capture_sizes"][-1] <= sizing.args["max_num_batched_tokens"]
    if engines > 1 and sizing.kv_bytes > 0:  # measured by nobody while another engine starts
        assert sizing.args["kv_cache_memory_bytes"] == sizing.kv_bytes
    else:
        assert "kv_cache_memory_bytes" not in sizing.args
    assert sizing.kv_tokens is not None
    if not sizing.kv_tokens:
        assert "does not fit" in sizing.notes[-1]
    else:
        assert seqs == 8 or seqs * (512 + longest // 2) <= sizing.kv_tokens


@given(shape=shapes, gib=st.integers(8, 288), more=st.integers(0, 100))
def test_more_memory_never_gives_less(shape: ModelShape, gib: int, more: int) -> None:
    engine = model(
        max_num_batched_tokens=8192
    )  # with more memory come larger steps, whose activations take of it
    small = size_for_gpu(shape, engine, SAMPLING, gib * GIB)
    large = size_for_gpu(shape, engine, SAMPLING, (gib + more) * GIB)
    assert large.args["max_num_seqs"] >= small.args["max_num_seqs"]
    if (gib < 70) == (gib + more < 70):  # 512 requests' logits take more than 256's
        assert (large.kv_tokens or 0) >= (small.kv_tokens or 0)


# ── Packing ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_small_model_is_packed_and_a_large_one_is_not() -> None:
    small, large = shape_of(QWEN_05B, {}), shape_of(QWEN_7B, {})
    assert engines_that_fit(small, model(), SAMPLING, H200) == 3
    assert engines_that_fit(large, model(), SAMPLING, H200) == 1
    assert engines_that_fit(small, model(tensor_parallel_size=2), SAMPLING, H200) == 1
    assert engines_that_fit(None, model(), SAMPLING, H200) == 1
    assert engines_that_fit(small, model(), SAMPLING, 8 * GIB) == 1
    assert engines_that_fit(small, model(gpu_memory_utilization=0.4), SAMPLING, H200) == 2


def test_packed_engines_need_two_cores_each() -> None:
    small = shape_of(QWEN_05B, {})
    assert [engines_that_fit(small, model(), SAMPLING, H200, cores) for cores in (2, 4, 6)] == [1, 2, 3]


@given(gib=st.integers(1, 288), engines=st.integers(1, 8))
def test_shares_leave_room_for_every_context(gib: int, engines: int) -> None:
    share = gpu_share(gib * GIB, engines)
    assert 0 < share <= 0.9
    if share > 0.01:
        assert engines * (share * gib * GIB + OUTSIDE_BYTES) <= gib * GIB


def test_activations_are_what_vllms_profile_finds_for_known_models() -> None:
    """1 to 3 GiB for 0.5B to 7B on large GPUs."""
    assert 1.0 <= activation_bytes(shape_of(QWEN_05B, {}), 512, 16_384) / GIB <= 2.0
    assert 2.0 <= activation_bytes(shape_of(QWEN_7B, {}), 512, 16_384) / GIB <= 3.0

"""The platform's policy: what it refuses when a job is loaded, and that it fails closed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from jobs.loading import load
from jobs.policy import check_pool
from pipelines.engine_args import DRAY_SETS, known_engine_args
from pipelines.errors import SpecError
from pipelines.policy import check_model_allowed
from pipelines.settings import ModelSettings, PoolSettings

SHA = "4f0cbb2ad1b7a9f7c1c1d1a8e6a1f0b2c3d4e5f6"


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    path = tmp_path / "policy.yaml"
    monkeypatch.setenv("DRAY_POLICY", str(path))
    return path.write_text


def job(**sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "test",
        "input": {"path": "/data/in"},
        "prompt": {"template": "{{ q }}"},
        "model": {"source": "Qwen/Qwen2.5-0.5B-Instruct"},
        "output": {"path": "/data/out"},
    }
    return {**base, **{name: {**base.get(name, {}), **section} for name, section in sections.items()}}


def refusal(settings: dict[str, Any]) -> str:
    with pytest.raises(SpecError) as caught:
        load(settings)
    return str(caught.value)


def test_without_a_policy_anything_but_a_models_own_code_is_allowed() -> None:
    load(job())
    said = refusal(job(model={"source": "acme/own", "revision": SHA, "engine": {"trust_remote_code": True}}))
    assert "model.engine.trust_remote_code" in said
    assert "DRAY_POLICY" in said


def test_only_allowed_sources_wherever_a_job_names_them(policy: Any) -> None:
    policy("models: {allow: ['Qwen/*', 's3://models/*']}")
    load(job())
    load(job(model={"source": "s3://models/tiny"}))
    assert "model.source: acme/m is not allowed here" in refusal(job(model={"source": "acme/m"}))
    assert "model.tokenizer: acme/t" in refusal(job(model={"tokenizer": "acme/t"}))
    assert "model.lora.source: acme/l" in refusal(job(model={"lora": {"source": "acme/l"}}))
    drafter = {"speculative_config": {"model": "acme/d", "num_speculative_tokens": 3}}
    assert "speculative_config.model: acme/d" in refusal(job(model={"engine": drafter}))


def test_own_code_of_that_very_source_and_revision_only(policy: Any) -> None:
    policy(f"models: {{trust_remote_code: [{{source: acme/own, revision: {SHA}}}]}}")
    trusting = {"engine": {"trust_remote_code": True}}
    load(job(model={"source": "acme/own", "revision": SHA, **trusting}))
    for source, revision in (("acme/own", None), ("acme/own", "main"), ("acme/other", SHA)):
        given = {"source": source, **({"revision": revision} if revision else {}), **trusting}
        assert "may not run code of its own" in refusal(job(model=given))
    code = {"engine": {"trust_remote_code": True, "code_revision": "main"}}
    assert "code_revision" in refusal(job(model={"source": "acme/own", "revision": SHA, **code}))
    assert "model.tokenizer" in refusal(
        job(model={"source": "acme/own", "revision": SHA, "tokenizer": "acme/t", **trusting})
    )


def test_an_entry_without_revision_is_for_local_folders_only(policy: Any, tmp_path: Path) -> None:
    policy(f"models: {{trust_remote_code: [{{source: {tmp_path}}}, {{source: acme/own}}]}}")
    load(job(model={"source": str(tmp_path), "engine": {"trust_remote_code": True}}))
    said = refusal(job(model={"source": "acme/own", "engine": {"trust_remote_code": True}}))
    assert "may not run code of its own" in said


@pytest.mark.parametrize("within", [None, "structured_outputs_config"])
def test_a_parsers_plugin_is_code_of_the_models_own(policy: Any, within: str | None) -> None:
    def plugged(path: str) -> dict[str, Any]:
        given = {"reasoning_parser_plugin": path}
        return job(model={"engine": {within: given} if within else given})

    key = ".".join(["model.engine", *([within] if within else []), "reasoning_parser_plugin"])
    policy("{}")
    said = refusal(plugged("/plugins/mine.py"))
    assert f"{key} /plugins/mine.py with no revision may not run code of its own here" in said
    assert "DRAY_POLICY" in said
    policy("models: {allow: ['Qwen/*'], trust_remote_code: [{source: /plugins/mine.py}, {source: mine.py}]}")
    load(plugged("/plugins/mine.py"))
    for other in ("/plugins/../mine.py", "/plugins/other.py", "mine.py"):
        assert "may not run code of its own" in refusal(plugged(other))
    with pytest.raises(SpecError, match="may not run code of its own"):  # nor on a worker with its own policy
        check_model_allowed(ModelSettings.model_validate(plugged("/plugins/other.py")["model"]))


def test_where_plugins_stand_has_to_be_readable(policy: Any) -> None:
    policy("{}")
    text = '{"reasoning_parser_plugin": "/plugins/mine.py"}'
    said = refusal(job(model={"engine": {"structured_outputs_config": text}}))
    assert "structured_outputs_config: must be a mapping" in said


def test_the_pool_is_held_to_its_size_also_when_auto_is_settled(policy: Any) -> None:
    policy("pool: {max_engines: 4, max_gpus: 4}")
    load(job(pool={"replicas": 4}))
    assert "5 engines" in refusal(job(pool={"replicas": 5}))
    assert "8 engines" in refusal(job(pool={"replicas": {"min": 1, "max": 8}}))
    two = job(
        pool={"replicas": 3, "device": "gpu", "engines_per_gpu": 1},
        model={"engine": {"tensor_parallel_size": 2}},
    )
    assert "6 GPUs" in refusal(two)
    automatic = load(job(pool={"replicas": "auto"})).spec
    check_pool(automatic, PoolSettings(replicas=4, engines_per_gpu=2))
    with pytest.raises(SpecError, match="16 engines"):
        check_pool(automatic, PoolSettings(replicas=16, engines_per_gpu=2))


@pytest.mark.parametrize(
    "path", ["/data/out2", "/data/outer/x", "/data/out/../x", "s3://team-other/x", "s3://team/../x"]
)
def test_outputs_elsewhere_are_refused(policy: Any, path: str) -> None:
    policy("outputs: {allow: [/data/out/, s3://team]}")
    load(job())
    load(job(output={"path": "s3a://team/deep/er"}))
    assert "output.path" in refusal(job(output={"path": path}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: {alow: []}", "models.alow"),
        ("models: [", "cannot be read"),
        ("- a", "DRAY_POLICY"),
        ("pool: {max_engines: many}", "pool.max_engines"),
    ],
)
def test_a_policy_that_is_not_understood_allows_nothing(policy: Any, text: str, said: str) -> None:
    policy(text)
    assert said in refusal(job())


def test_a_policy_that_is_not_there_allows_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DRAY_POLICY", str(tmp_path / "gone.yaml"))
    assert "there is no such file" in refusal(job())


def test_a_worker_asks_its_own_policy(policy: Any) -> None:
    policy("models: {allow: ['Qwen/*']}")
    check_model_allowed(ModelSettings(source="Qwen/x"))
    with pytest.raises(SpecError, match="not allowed here"):
        check_model_allowed(ModelSettings(source="acme/x"))


def test_whatever_else_the_engine_loads_is_a_source_too(policy: Any) -> None:
    policy("models: {allow: ['Qwen/*']}")
    load(job(model={"engine": {"generation_config": "vllm"}}))
    for engine, key in (
        ({"spec_method": "eagle", "spec_model": "acme/x"}, "spec_model"),
        ({"default_mm_loras": {"audio": "acme/x"}}, "default_mm_loras.audio"),
        ({"generation_config": "acme/x"}, "generation_config"),
    ):
        assert f"model.engine.{key}: acme/x is not allowed here" in refusal(job(model={"engine": engine}))
    policy("{}")
    text = {"speculative_config": '{"model": "acme/d", "trust_remote_code": true}'}
    assert "speculative_config: must be a mapping" in refusal(job(model={"engine": text}))


def test_what_has_no_revision_of_its_own_runs_no_code(policy: Any) -> None:
    policy(f"models: {{trust_remote_code: [{{source: acme/own, revision: {SHA}}}]}}")
    for extra in ({"spec_model": "acme/own"}, {"default_mm_loras": {"audio": "acme/own"}}):
        own = {"source": "acme/own", "revision": SHA, "engine": {"trust_remote_code": True, **extra}}
        assert "acme/own with no revision may not run code" in refusal(job(model=own))


def test_sources_that_are_not_what_they_say(
    policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy("models: {allow: ['Qwen/*', 's3://models/*']}")
    monkeypatch.chdir(tmp_path)
    assert "has a part `..`" in refusal(job(model={"source": "s3://models/../other/m"}))
    (tmp_path / "Qwen" / "mine").mkdir(parents=True)
    with pytest.raises(SpecError, match="relative to the working directory"):
        check_model_allowed(ModelSettings(source="Qwen/mine"))
    digest = f"sha256:{'0' * 64}"
    policy(f"models: {{trust_remote_code: [{{source: 's3://models/m', revision: '{digest}'}}]}}")
    own = {"source": "s3://models/m", "revision": digest, "engine": {"trust_remote_code": True}}
    load(job(model=own))
    own["engine"] = {"trust_remote_code": True, "load_format": "runai_streamer"}
    assert "model.engine.load_format" in refusal(job(model=own))
    drafter = {"model": "s3://models/m", "draft_load_config": {"load_format": "runai_streamer"}}
    own["engine"] = {"trust_remote_code": True, "speculative_config": drafter}
    assert "draft_load_config.load_format" in refusal(job(model=own))


def test_storage_options_choose_no_other_store(policy: Any) -> None:
    policy(
        "{models: {allow: ['s3://m/*']}, outputs: {allow: ['s3://out']}, storage: {endpoints: ['http://minio:9000/']}}"
    )
    allowed = {"endpoint_url": "http://minio:9000", "profile": "models"}
    stored = {"source": "s3://m/tiny"}, {"path": "s3://out/x"}
    load(
        job(model={**stored[0], "storage_options": allowed}, output={**stored[1], "storage_options": allowed})
    )
    for options in (
        {"endpoint_url": "http://evil"},
        {"client_kwargs": {"endpoint_url": "http://minio:9000"}},
    ):
        (name,) = options
        own = job(model={**stored[0], "storage_options": options}, output=stored[1])
        assert f"model.storage_options.{name}: not allowed" in refusal(own)
        own = job(model=stored[0], output={**stored[1], "storage_options": options})
        assert f"output.storage_options.{name}: not allowed" in refusal(own)
    policy("{}")
    load(job(model={**stored[0], "storage_options": {"endpoint_url": "http://anywhere"}}))


def test_a_listing_pins_no_code(policy: Any) -> None:
    revision = f"listing:{'0' * 64}"
    policy(f"models: {{trust_remote_code: [{{source: 's3://m/own', revision: '{revision}'}}]}}")
    own = {"source": "s3://m/own", "revision": revision, "engine": {"trust_remote_code": True}}
    assert "may not run code of its own" in refusal(job(model=own))


CODE: list[tuple[dict[str, Any], str, str]] = [
    ({"worker_cls": "acme.w.Worker"}, "worker_cls", "acme.w.Worker"),
    ({"worker_extension_cls": "acme.w.More"}, "worker_extension_cls", "acme.w.More"),
    ({"scheduler_cls": "acme.s.Scheduler"}, "scheduler_cls", "acme.s.Scheduler"),
    ({"distributed_executor_backend": "acme.e.Executor"}, "distributed_executor_backend", "acme.e.Executor"),
    ({"logits_processors": ["vllm.v1.x:Own", "acme.l:Bias"]}, "logits_processors", "acme.l:Bias"),
    ({"model_class_overrides": {"Qwen2": "acme.m:M"}}, "model_class_overrides.Qwen2", "acme.m:M"),
    ({"io_processor_plugin": "acme"}, "io_processor_plugin", "acme"),
    ({"log_config_file": "/etc/acme.json"}, "log_config_file", "/etc/acme.json"),
    (
        {"logging_config": {"pylogging_config_file": "/etc/acme.json"}},
        "logging_config.pylogging_config_file",
        "/etc/acme.json",
    ),
    ({"compilation_config": {"backend": "acme.c.backend"}}, "compilation_config.backend", "acme.c.backend"),
    (
        {"compilation_config": {"inductor_passes": {"p": "acme.c.fuse"}}},
        "compilation_config.inductor_passes.p",
        "acme.c.fuse",
    ),
    (
        {"compilation_config": {"inductor_passes": {"hf_overrides": "acme.c.fuse"}}},
        "compilation_config.inductor_passes.hf_overrides",
        "acme.c.fuse",
    ),
    (
        {"compilation_config": {"inductor_compile_config": {"cpp.cxx": [None, "/bin/acme"]}}},
        "compilation_config.inductor_compile_config.cpp.cxx",
        "/bin/acme",
    ),
    (
        {"compilation_config": {"inductor_compile_config": {"cuda.cutlass_dir": "acme"}}},
        "compilation_config.inductor_compile_config.cuda.cutlass_dir",
        "acme",
    ),
    ({"compilation_config": {"cache_dir": "/tmp/graphs"}}, "compilation_config.cache_dir", "/tmp/graphs"),
    (
        {"ec_manager_config": {"encoder_cache_manager_cls": "acme.e.Cache"}},
        "ec_manager_config.encoder_cache_manager_cls",
        "acme.e.Cache",
    ),
    (
        {"ec_transfer_config": {"ec_connector": "C", "ec_connector_module_path": "acme"}},
        "ec_transfer_config.ec_connector_module_path",
        "acme",
    ),
    (
        {"kv_transfer_config": {"kv_connector_extra_config": {"connectors": [{"kv_connector_module_path": "acme"}]}}},
        "kv_transfer_config.kv_connector_extra_config.connectors.kv_connector_module_path",
        "acme",
    ),
    (
        {"kv_transfer_config": {"kv_connector_extra_config": {"tiers": [[{"spec-module-path": "acme"}]]}}},
        "kv_transfer_config.kv_connector_extra_config.tiers.spec-module-path",
        "acme",
    ),
    (
        {"kv_transfer_config": {"kv_connector_extra_config": {"policy": {"module_path": "acme"}}}},
        "kv_transfer_config.kv_connector_extra_config.policy.module_path",
        "acme",
    ),
    (
        {"speculative_config": {"method": "custom_class", "model": "acme.d.Proposer"}},
        "speculative_config.model",
        "acme.d.Proposer",
    ),
    ({"spec_model": "acme.d.Proposer", "spec_tokens": 3}, "spec_model", "acme.d.Proposer"),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "key", "name"), CODE)
def test_code_that_an_engine_argument_names_has_to_be_allowed(
    policy: Any, monkeypatch: pytest.MonkeyPatch, engine: dict[str, Any], key: str, name: str
) -> None:
    own = job(model={"engine": engine})
    policy("{}")
    said = refusal(own)
    assert f"model.engine.{key}: {name} is code that the platform's policy" in said
    assert f"{{source: {name}}}" in said
    policy(f"models: {{allow: ['Qwen/*'], trust_remote_code: [{{source: '{name}'}}]}}")
    load(own)
    policy(f"models: {{trust_remote_code: [{{source: '{name}', revision: {SHA}}}]}}")
    assert "is code that" in refusal(own)  # what is imported has no revision
    monkeypatch.delenv("DRAY_POLICY")
    load(own)


def test_what_vllm_brings_itself_is_nobody_elses_code(policy: Any) -> None:
    policy("models: {allow: ['Qwen/*']}")
    engine = {
        "worker_cls": "vllm.v1.worker.gpu_worker.Worker",
        "distributed_executor_backend": "mp",
        "compilation_config": {"backend": "inductor", "cudagraph_mode": "FULL"},
        "attention_config": {"backend": "FLASH_ATTN"},
        "hf_overrides": {"rope_cls": "a.b", "max_position_embeddings": 8192},
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "model": "Qwen/x.y"},
        "kv_transfer_config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"},
    }
    load(job(model={"engine": engine}))


def test_code_does_not_hide_in_text(policy: Any) -> None:
    policy("{}")
    for key in ("compilation_config", "kv_transfer_config", "hf_overrides"):
        said = refusal(job(model={"engine": {key: ' {"backend": "acme.c.backend"}'}}))
        assert f"model.engine.{key}: must be a mapping, not its text" in said
    for text in ('{"module_path": "acme"}', ' [{"module_path": "acme"}]'):
        deep = {"kv_transfer_config": {"kv_connector_extra_config": {"connectors": [text]}}}
        said = refusal(job(model={"engine": deep}))
        assert "kv_connector_extra_config.connectors: must be a mapping, not its text" in said
    load(job(model={"engine": {"hf_overrides": {"text_config": {"chat": "{}"}}}}))


@pytest.mark.parametrize("name", ["graphs", "~evil", "./graphs", "vllm.graphs", "s3://acme/graphs"])
@pytest.mark.parametrize(
    ("section", "key"),
    [(None, "log_config_file"), ("logging_config", "pylogging_config_file"), ("compilation_config", "cache_dir")],
)  # fmt: skip
def test_a_file_that_is_code_is_named_by_its_absolute_path(
    policy: Any, section: str | None, key: str, name: str
) -> None:
    """A module may be allowed under a short name; a file of that name in whatever the working directory is may not."""
    engine = {section: {key: name}} if section else {key: name}
    for allowed in ("{}", f"models: {{trust_remote_code: [{{source: '{name}'}}]}}"):
        policy(allowed)
        said = refusal(job(model={"engine": engine}))
        assert f"{key}: {name} is code by a path that depends on the working directory" in said


def test_torchs_settings_are_numbers(policy: Any) -> None:
    policy("{}")
    numbers = {"max_autotune": True, "cpp.dynamic_threads": True, "realize_reads_threshold": 4}
    load(job(model={"engine": {"compilation_config": {"inductor_compile_config": numbers}}}))


EXTRA = "model_loader_extra_config"


def loading(draft: bool, how: dict[str, Any]) -> dict[str, Any]:
    """A job that says how its weights are loaded, or those of its draft model."""
    drafter = {"model": "Qwen/d", "num_speculative_tokens": 2, "draft_load_config": how}
    return job(model={"engine": {"speculative_config": drafter} if draft else how})


@pytest.mark.parametrize("draft", [False, True])
def test_places_that_weights_and_caches_come_from_are_sources(policy: Any, draft: bool) -> None:
    policy("models: {allow: ['Qwen/*', /models/hub, 's3://models/*']}")
    load(loading(draft, {"download_dir": "/models/hub"}))
    load(loading(draft, {"load_format": "sharded_state", EXTRA: {"pattern": "rank-{rank}.safetensors"}}))
    load(loading(draft, {EXTRA: {"tensorizer_uri": "s3://models/m"}}))
    for how, said in (
        ({"download_dir": "/tmp/hub"}, "download_dir: /tmp/hub is not allowed here"),
        ({EXTRA: {"tensorizer_uri": "s3://a/m"}}, f"{EXTRA}.tensorizer_uri: s3://a/m is not allowed here"),
        ({EXTRA: {"tensorizer_dir": "/tmp/m"}}, f"{EXTRA}.tensorizer_dir: /tmp/m is not allowed here"),
        (
            {"load_format": "Tensorizer", EXTRA: {"tensorizer_config": {"tensorizer_dir": "/tmp/m"}}},
            f"{EXTRA}.tensorizer_config.tensorizer_dir: /tmp/m is not allowed here",
        ),
        ({EXTRA: {"pattern": "/tmp/*.safetensors"}}, f"{EXTRA}.pattern: /tmp/*.safetensors leads out"),
        ({EXTRA: {"pattern": "../m/*.safetensors"}}, f"{EXTRA}.pattern: ../m/*.safetensors leads out"),
        ({EXTRA: {"s3_endpoint": "http://elsewhere"}}, f"{EXTRA}.s3_endpoint: not allowed"),
        ({EXTRA: {"stream_kwargs": {"s3_config_path": "/tmp/c"}}}, f"{EXTRA}.stream_kwargs.s3_config_path"),
        ({EXTRA: "tensorizer_uri"}, f"{EXTRA}: must be a mapping"),
    ):
        at = "model.engine.speculative_config.draft_load_config" if draft else "model.engine"
        assert f"{at}.{said}" in refusal(loading(draft, how))


def test_so_are_scales_and_draft_models(policy: Any) -> None:
    policy("models: {allow: ['Qwen/*']}")
    for engine, said in (
        ({"mm_encoder_fp8_scale_path": "/tmp/s"}, "mm_encoder_fp8_scale_path: /tmp/s is not allowed here"),
        ({"speculative_config": {"method": "eagle", "model": "acme.d"}}, "acme.d is not allowed here"),
        ({"speculative_config": {"draft_load_config": "auto"}}, "draft_load_config: must be a mapping"),
    ):
        assert said in refusal(job(model={"engine": engine}))


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize(
    ("how", "key"),
    [
        ({"load_format": "IPC_cache"}, "load_format"),
        ({EXTRA: {"socket_path": "/tmp/s"}}, f"{EXTRA}.socket_path"),
        ({EXTRA: {"socket_dir": "/tmp"}}, f"{EXTRA}.socket_dir"),
    ],
)
def test_no_weights_or_pickles_come_from_a_socket(
    policy: Any, monkeypatch: pytest.MonkeyPatch, draft: bool, how: dict[str, Any], key: str
) -> None:
    policy("{}")
    assert f"{key}: a cache of weights (ipc_cache)" in refusal(loading(draft, how))
    monkeypatch.delenv("DRAY_POLICY")
    load(loading(draft, how))


def test_trusted_code_is_that_of_the_model_itself(policy: Any) -> None:
    policy(f"models: {{trust_remote_code: [{{source: acme/own, revision: {SHA}}}]}}")

    def own(**engine: Any) -> dict[str, Any]:
        trusting = {"trust_remote_code": True, **engine}
        return job(model={"source": "acme/own", "revision": SHA, "engine": trusting})

    load(own(hf_overrides={"max_position_embeddings": 4096}))
    nested = {"text_config": {"auto_map": {"AutoConfig": "other/repo--c.C"}}}
    assert "hf_overrides: an `auto_map`" in refusal(own(hf_overrides=nested))
    for key in ("code_revision", "cache_dir"):
        assert f"mm_processor_kwargs.{key}" in refusal(own(mm_processor_kwargs={key: "other"}))
    drafter = {"model": "acme/own", "revision": SHA, "code-revision": "main", "num_speculative_tokens": 2}
    assert "speculative_config.code_revision" in refusal(own(speculative_config=drafter))


#: Engine arguments of vLLM 0.32 whose names sound of code or files, and why the policy says nothing of them.
HARMLESS = {
    "allowed_local_media_path": "images reach the engine as bytes",
    "allowed_media_domains": "likewise",
    "hf_config_path": "a source",
    "download_dir": "a source",
    "mm_encoder_fp8_scale_path": "a source",
    "mm_encoder_fp8_scale_save_path": "is written",
    "hf_overrides": "values of the model's configuration, `auto_map` aside",
}


def test_no_engine_argument_of_the_installed_vllm_names_code_past_the_policy(policy: Any) -> None:
    known = known_engine_args()
    if known is None:
        pytest.skip("vLLM is not installed")
    imported = re.compile(r"(_cls|_class|_processors|_overrides)$")  # by a dotted path, or not at all
    read = re.compile(r"(_path|_file|_dir|_plugin|_module|_uri|_url)$")
    policy("{}")
    for name in sorted(known - HARMLESS.keys() - DRAY_SETS.keys()):
        values = ("acme.code:Thing", "acme", "~acme", "vllm.acme")
        for value in values if read.search(name) else values[:1] if imported.search(name) else ():
            said = refusal(job(model={"engine": {name: value}}))
            assert f"model.engine.{name}" in said

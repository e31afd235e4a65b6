"""The cache of models: whole or not there, checked, pinned; and what is refused before any engine starts."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from jobs.cli import main
from jobs.loading import LoadedJob, load
from jobs.output import read_spec
from jobs.pinning import pinned
from jobs.proposal import propose
from pipelines import model_source, vllm_engine
from pipelines.errors import ModelError, OutputError, TransientStorageError
from pipelines.model_cache import cache_root, cached_model, cached_models, damaged_entries, pull, unfinished
from pipelines.model_folder import check_adapter, check_model, local_model
from pipelines.model_manifest import MANIFEST, Manifest, read_manifest
from pipelines.model_weights import check_load_format, loads_weights, streams_weights
from pipelines.settings import ModelSettings, PoolSettings, SamplingSettings
from pipelines.storage import Storage
from pipelines.tokenizer import load_tokenizer
from pipelines.vllm_engine import VLLMEngine, hub_load_format

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-model"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DRAY_MODELS", str(tmp_path / "cache"))
    monkeypatch.setattr(model_source, "CHUNK", 64 << 10)
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A copy of the tiny model, in a place that counts as a store."""
    return Path(shutil.copytree(TINY, tmp_path / "store" / "tiny"))


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all ranges that were read of any store."""
    read: list[int] = []
    whole = Storage.read_range

    def counted(self: Storage, *args: Any, **kwargs: Any) -> bytes:
        data = whole(self, *args, **kwargs)
        read.append(len(data))
        return data

    monkeypatch.setattr(Storage, "read_range", counted)
    return read


def test_a_pulled_model_is_the_model(tiny: Path, bytes_read: list[int]) -> None:
    folder, manifest = pull(f"file://{tiny}")
    assert folder.parent == cache_root()
    assert {file.name for file in manifest.files} == {path.name for path in tiny.iterdir()}
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in tiny.iterdir())
    assert {path.name for path in folder.iterdir()} == {*(file.name for file in manifest.files), MANIFEST}
    assert unfinished() == []
    bytes_read.clear()
    assert pull(f"file://{tiny}") == (folder, manifest)
    assert bytes_read == []
    shutil.rmtree(tiny)
    assert pull(f"file://{tiny}", manifest.revision) == (folder, manifest)  # needs no store any more


def test_a_flipped_byte_is_refused_where_a_manifest_says_so(tiny: Path, tmp_path: Path) -> None:
    folder, manifest = pull(str(tiny), to=tmp_path / "published")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.safetensors: its content has sha256"):
        pull(f"file://{folder}")
    assert cached_models() == []
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    _, again = pull(f"file://{folder}")
    assert again.revision == manifest.digest


def test_a_damaged_copy_shows_in_verify_and_a_cut_one_is_copied_anew(tiny: Path) -> None:
    folder, _ = pull(str(tiny))
    runner = CliRunner()
    assert runner.invoke(main, ["models", "verify", str(tiny)]).exit_code == 0
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    found = runner.invoke(main, ["models", "verify", "--json"])
    assert found.exit_code == 1
    assert "model.safetensors" in json.loads(found.stdout)["problems"][0]
    weights.write_bytes(data[:-1])
    assert cached_models() == []
    assert json.loads(runner.invoke(main, ["models", "list", "--json"]).stdout)["damaged"] == [str(folder)]
    pull(str(tiny))
    assert weights.read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_a_stopped_pull_is_not_there_and_is_gone_on_with(tiny: Path, bytes_read: list[int]) -> None:
    size = (tiny / "model.safetensors").stat().st_size

    def stop(count: int) -> None:
        if sum(bytes_read) > size // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(str(tiny), note=stop)
    assert cached_models() == []
    assert len(unfinished()) == 1
    before = sum(bytes_read)
    folder, _ = pull(str(tiny))
    everything = sum(path.stat().st_size for path in tiny.iterdir())
    assert sum(bytes_read) - before < everything - size // 4
    assert (folder / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert unfinished() == []


def test_a_part_of_another_version_is_not_gone_on_with(tiny: Path) -> None:
    def stop(count: int) -> None:
        if count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(str(tiny), note=stop)
    weights = tiny / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[10_000] ^= 1
    weights.write_bytes(data)
    folder, _ = pull(str(tiny))
    assert (folder / "model.safetensors").read_bytes() == bytes(data)


def test_to_does_not_overwrite(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something else"):
        pull(str(tiny), to=tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_pickles_are_refused_and_never_copied(tiny: Path) -> None:
    (tiny / "pytorch_model.bin").write_bytes(b"pickle")
    folder, _ = pull(str(tiny))
    assert not (folder / "pytorch_model.bin").exists()
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickles \(pytorch_model\.bin\)"):
        pull(str(tiny))
    with pytest.raises(ModelError, match="pickles"):
        check_model(ModelSettings(source=str(tiny)))
    check_model(ModelSettings(source=str(tiny), engine={"load_format": "dummy"}))
    with pytest.raises(ModelError, match="load_format: 'pt'"):
        check_model(ModelSettings(source=str(TINY), engine={"load_format": "pt"}))
    (tiny / "adapter_config.json").write_text('{"r": 8}')
    with pytest.raises(ModelError, match="pickles"):
        check_model(ModelSettings(source=str(TINY), lora={"source": str(tiny)}))


def test_a_manifest_cannot_lead_out_of_its_folder() -> None:
    files = [{"name": "../../etc/x", "size": 1, "sha256": "0"}]
    text = json.dumps({"format": 1, "source": "s", "revision": None, "files": files})
    with pytest.raises(ModelError, match="leads out"):
        Manifest.from_json(text.encode(), "m")


def test_stages_that_need_no_weights_copy_none(tiny: Path) -> None:
    model = ModelSettings(source=f"file://{tiny}")
    assert load_tokenizer(model)("3 + 4")["input_ids"]
    (folder, _), *others = cached_models()
    assert others == []
    assert not (folder / "model.safetensors").exists()
    engine = local_model(model, weights=True)
    assert Path(engine.source, "model.safetensors").exists()
    assert engine.revision is None
    streamed = local_model(
        model.model_copy(update={"engine": {"load_format": "runai_streamer"}}), weights=True
    )
    assert streamed.source == model.source
    assert Path(str(streamed.tokenizer), "tokenizer.json").exists()


# ── Pinned ───────────────────────────────────────────────────────────────────────────────────────────────────────


def job_on(tmp_path: Path, source: str, *overrides: str) -> LoadedJob:
    asked = tmp_path / "in" / "q.parquet"
    if not asked.exists():
        asked.parent.mkdir()
        pq.write_table(pa.table({"q": ["1 + 1", "2 + 2"]}), asked)
    return load(
        {
            "name": "test",
            "input": {"path": str(asked)},
            "prompt": {"template": "{{ q }}"},
            "model": {"source": source},
            "pool": {"device": "cpu"},
            "output": {"path": str(tmp_path / "out")},
        },
        list(overrides),
    )


def test_the_first_plan_pins_a_stored_model_and_later_ones_keep_to_it(tiny: Path, tmp_path: Path) -> None:
    job = job_on(tmp_path, f"file://{tiny}")
    first = propose(job)
    revision = first.job.spec.model.revision
    assert revision is not None
    assert revision.startswith("listing:")
    assert revision in first.summary["model"]
    first.save()
    pull(f"file://{tiny}")
    (tiny / "generation_config.json").write_text("{}")
    # This node still has the pinned one.
    assert propose(job, relist=False).job.spec.model.revision == revision
    assert propose(job).plan.fingerprint == first.plan.fingerprint
    shutil.rmtree(cache_root())
    with pytest.raises(ModelError, match="there is listing:"):
        propose(job, relist=False)


def test_a_model_in_a_store_of_pickles_only_is_refused_when_planning(tiny: Path, tmp_path: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickles"):
        propose(job_on(tmp_path, f"file://{tiny}"))


def test_offline_the_hubs_local_cache_tells_the_commit(tmp_path: Path) -> None:
    sha = "a" * 40
    place = tmp_path / "hub" / "models--acme--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(sha)
    shutil.copytree(TINY, place / "snapshots" / sha)
    job = job_on(tmp_path, "acme/tiny", f"model.engine.download_dir={tmp_path / 'hub'}")
    proposal = propose(job)
    assert proposal.job.spec.model.revision == sha
    proposal.save()
    record = read_spec(proposal.storage)
    assert record is not None
    assert record["model_pin"]["revision"] == sha
    (place / "refs" / "main").write_text("b" * 40)  # main moves
    assert propose(job).job.spec.model.revision == sha


def test_offline_without_a_cache_the_name_stays_and_says_so(tmp_path: Path) -> None:
    proposal = propose(job_on(tmp_path, "acme/tiny"))
    assert proposal.job.spec.model.revision is None
    assert "not pinned: model acme/tiny: the hub does not answer" in proposal.summary["model"]


def test_an_output_of_an_earlier_dray_stays_unpinned(tmp_path: Path) -> None:
    job = job_on(tmp_path, "acme/tiny")
    assert pinned(job, {"spec": {}}) is job


def test_what_was_pulled_from_the_hub_is_used_offline(tiny: Path, tmp_path: Path) -> None:
    folder, manifest = pull(str(tiny))
    as_hub = Manifest(source="acme/tiny", revision="c" * 40, asked=None, files=manifest.files, pulled_at=1.0)
    (folder / MANIFEST).write_bytes(as_hub.to_json())
    assert read_manifest(folder) == as_hub
    found = cached_model("acme/tiny", asked=None)
    assert found is not None
    assert found[0] == folder
    assert local_model(ModelSettings(source="acme/tiny"), weights=True).source == str(folder)


def test_another_endpoints_copy_of_a_listing_is_another_model(tiny: Path) -> None:
    # The same listing of the same URL, from a store that the job chose itself.
    other = {"endpoint_url": "http://elsewhere"}
    folder, manifest = pull(f"file://{tiny}", options=other)
    assert cached_model(f"file://{tiny}", manifest.revision, other) == (folder, manifest)
    assert cached_model(f"file://{tiny}", manifest.revision) is None


def test_load_formats_are_read_as_vllm_reads_them() -> None:
    for engine in (
        {"load_format": "PT"},
        {"speculative_config": {"draft_load_config": {"load_format": "Pt"}}},
    ):
        with pytest.raises(ModelError, match="reads pickle files"):
            check_load_format(engine)
    assert not loads_weights({"load_format": "Dummy"})
    assert streams_weights({"load_format": "RunAI_Streamer"})


def test_a_model_is_no_classifier_without_a_head(tmp_path: Path) -> None:
    def check(**engine: Any) -> None:
        check_model(ModelSettings(source=str(folder), engine=engine))

    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    check()
    check(convert="embed")
    with pytest.raises(ModelError, match=r"model.engine.convert: .* has no head to classify by: .* `score`"):
        check(convert="classify")
    check(convert="classify", hf_overrides={"classifier_from_token": ["no", "yes"]})
    check(convert="classify", load_format="dummy")
    header = json.dumps({"score.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    (folder / "head.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    check(convert="classify")


def test_an_adapter_without_its_safetensors_is_none(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(ModelError, match=r"it has no adapter_model\.safetensors"):
        check_adapter(str(tmp_path), tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    check_adapter(str(tmp_path), tmp_path)


def test_pickles_in_the_hubs_local_cache_count_only_where_the_hub_is_silent(tmp_path: Path) -> None:
    sha = "a" * 40
    place = tmp_path / "hub" / "models--acme--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(sha)
    snapshot = Path(shutil.copytree(TINY, place / "snapshots" / sha))
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    job = job_on(tmp_path, "acme/tiny", f"model.engine.download_dir={tmp_path / 'hub'}")
    check_model(job.spec.model)
    with pytest.raises(ModelError, match="pickles"):  # the tests have no network
        pinned(job, None)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}'])
def test_one_unreadable_entry_stops_no_other(tiny: Path, text: str) -> None:
    folder, _ = pull(str(tiny))
    broken = cache_root() / "broken-0123456789abcdef"
    broken.mkdir()
    (broken / MANIFEST).write_text(text)
    assert [entry for entry, _ in cached_models()] == [folder]
    assert damaged_entries() == [broken]
    assert cached_model("acme/tiny", asked=None) is None
    (folder / MANIFEST).write_text(text)
    assert pull(str(tiny))[0] == folder  # copied anew
    assert [entry for entry, _ in cached_models()] == [folder]


def test_a_later_drays_model_is_not_taken_away(tiny: Path) -> None:
    folder, _ = pull(str(tiny))
    (folder / MANIFEST).write_text('{"format": 99}')
    with pytest.raises(ModelError, match="newer Dray"):
        pull(str(tiny))
    assert (folder / "model.safetensors").exists()


def test_a_file_replaced_between_two_ranges_is_no_model(tiny: Path) -> None:
    weights = tiny / "model.safetensors"

    def replace_it(count: int) -> None:
        if count == model_source.CHUNK:
            weights.write_bytes(b"\1" * weights.stat().st_size)

    with pytest.raises(ModelError, match=r"was replaced while it was being copied"):
        pull(str(tiny), note=replace_it)
    assert cached_models() == []
    assert list((cache_root() / ".partial").rglob(".model.safetensors.*")) == []


def test_a_model_whose_upload_is_under_way_is_refused(tiny: Path) -> None:
    files = {"a": "model.safetensors", "b": "model-2.safetensors"}
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(ModelError, match=r"model-2\.safetensors is missing.*still being uploaded"):
        pull(str(tiny))
    (tiny / "model-2.safetensors").touch()
    pull(str(tiny))
    (tiny / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="not an index"):
        pull(str(tiny))


def test_a_store_that_does_not_answer_is_no_engine_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*args: Any, **kwargs: Any) -> ModelSettings:
        raise TransientStorageError("s3://models: no answer")

    monkeypatch.setattr(vllm_engine, "local_model", silent)
    engine = VLLMEngine(ModelSettings(source="s3://models/m"), SamplingSettings(), PoolSettings())
    with pytest.raises(TransientStorageError):
        asyncio.run(engine.start())


@pytest.mark.parametrize(
    ("files", "given", "used"),
    [
        (["consolidated.safetensors"], "Auto", "mistral"),
        (["consolidated.safetensors"], "hf", "safetensors"),
        ([], "auto", "safetensors"),
        ([], "HF", "safetensors"),
        (None, None, "safetensors"),
        ([], "bitsandbytes", "bitsandbytes"),
    ],
)
def test_hub_weights_are_safetensors_or_mistrals(
    monkeypatch: pytest.MonkeyPatch, files: list[str] | None, given: str | None, used: str
) -> None:
    listing = ModuleType("repo_utils")  # None: a vLLM that has no such function
    if files is not None:
        listing.list_filtered_repo_files = lambda source, **kwargs: files  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.transformers_utils.repo_utils", listing)
    engine = {} if given is None else {"load_format": given}
    assert hub_load_format(ModelSettings(source="acme/m", engine=engine)) == used

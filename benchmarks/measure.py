"""One provider in a process of its own: time, peak memory over the inputs, and distance from the float64 oracle.

Run as `python -m minillm.benchmarks.measure JOB.json`; prints one JSON line a case and mode as it gets there, so that
a process that dies (out of memory, say) loses only what it had not reached.
"""

import ctypes
import gc
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minillm.benchmarks.cases import Case, Inputs, make_inputs, oracle
from minillm.benchmarks.providers import PROVIDERS, YARDSTICK, Unavailable

MODES = ("full", "forward")  # forward and backward; forward under no_grad
SAMPLING_S = 0.002


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    device = torch.device(job["device"])
    torch.backends.cuda.matmul.allow_tf32 = False
    for entry in job["cases"]:
        case = Case(**entry)
        truth = Path(job["oracles"]) / f"{case.name}.pt"
        for result in measure(job, case, device, truth):
            print(json.dumps({"case": case.name, "provider": job["provider"], **result}), flush=True)
        release(device)


def measure(job: dict, case: Case, device: torch.device, truth: Path):
    """Yields one dict a mode: milliseconds, peak_bytes and, in the first repeat, errors; or skipped."""
    inputs = make_inputs(case, device)
    if job["provider"] == "oracle":
        torch.save({name: value.float().cpu() for name, value in oracle(inputs).items()}, truth)
        return
    bare = job["provider"] == YARDSTICK  # it has no result to compare, and its logits before the clock starts
    try:
        call = PROVIDERS[job["provider"]](inputs)
        for mode in job["modes"]:
            run = runner(call, inputs, mode)
            compared = job["errors"] and not bare and truth.exists()  # goals have cases that are about time alone
            errors = compare(run(), inputs, truth, mode) if compared else {}
            for _ in range(0 if errors else 1):
                run()
            clear(inputs)
            peak = None if bare else peak_bytes(run, device)
            clear(inputs)
            yield {"mode": mode, "peak_bytes": peak, "milliseconds": timings(run, inputs, job, device), **errors}
            clear(inputs)
    except Unavailable as reason:
        yield {"mode": "all", "skipped": str(reason)}
    except Exception as error:  # a peer that fails is a result, not the end of the benchmark
        reason = str(error).strip().partition("\n")[0]
        yield {"mode": "all", "skipped": f"failed: {type(error).__name__}: {reason}"[:300]}


def runner(call: Callable[[], Tensor], inputs: Inputs, mode: str) -> Callable[[], Tensor]:
    def full() -> Tensor:
        loss = call()
        loss.backward()
        return loss.detach()

    def forward() -> Tensor:
        with torch.no_grad():
            return call()

    return full if mode == "full" else forward


def compare(loss: Tensor, inputs: Inputs, truth: Path, mode: str) -> dict[str, float]:
    """Relative error of the loss; relative L2 error of each gradient."""
    exact = torch.load(truth, weights_only=True)
    result = {"loss_error": abs(loss.item() - exact["loss"].item()) / abs(exact["loss"].item())}
    if mode == "full":
        for name, leaf in zip(("hidden_grad", "weight_grad"), inputs.leaves, strict=True):
            expected = exact[name].to(leaf.device)
            difference = torch.linalg.vector_norm(leaf.grad.float() - expected)
            result[f"{name}_error"] = (difference / torch.linalg.vector_norm(expected)).item()
    return result


def clear(inputs: Inputs) -> None:
    for leaf in inputs.leaves:
        leaf.grad = None


def timings(run: Callable[[], Tensor], inputs: Inputs, job: dict, device: torch.device) -> list[float]:
    """Milliseconds of single calls. On a GPU by device events with a cold L2 cache."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(
            run, warmup=job["warmup_ms"], rep=job["rep_ms"], grad_to_none=list(inputs.leaves), return_mode="all"
        )
    result = []
    for _ in range(job["runs"]):
        clear(inputs)
        start = time.perf_counter()
        run()
        result.append(1e3 * (time.perf_counter() - start))
    return result


def release(device: torch.device) -> None:
    """Gives freed memory back, so that the next baseline holds none of it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(run: Callable[[], Tensor], device: torch.device) -> int | None:
    """The bytes that one warm call holds at its peak beyond what was held before: the gradients it returns, and all between."""
    release(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    with ResidentPeak() as peak:
        run()
    return peak.bytes


class ResidentPeak:
    """The growth of this process's resident set: the kernel's own high-water mark, or a thread that samples."""

    def __enter__(self):
        self.before, self.most, self.done = resident("VmRSS"), 0, threading.Event()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.thread = None
        except OSError:
            self.thread = threading.Thread(target=self._sample, daemon=True)
            self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(SAMPLING_S):
            self.most = max(self.most, resident("VmRSS"))

    def __exit__(self, *exc):
        self.done.set()
        if self.thread is None:
            self.most = resident("VmHWM")
        else:
            self.thread.join()
        self.bytes = max(0, self.most - self.before)


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main(sys.argv[1])

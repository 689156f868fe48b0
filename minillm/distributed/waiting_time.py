"""Seconds that this process has waited for other ranks, in the collectives of minillm and of DeepSpeed alike.

Every collective of torch.distributed ends in `Work.wait` where the host waits for it, and that is what is counted. With
gloo this is the whole exchange, waiting for slower ranks included, less the work that ran beside it. With NCCL the wait
returns at once, because the device waits and not the host: its time stays with the part that needs the result. Nobody waits
for a thread that exchanges beside the run.
"""

from time import perf_counter

import torch.distributed as dist

from minillm.distributed.collectives import exchanges_beside

_seconds = 0.0
_counting = False


def waited() -> float:
    """Seconds waited since `count_waits`; 0 without it."""
    return _seconds


def count_waits() -> None:
    """Count from now on, for the whole process. torch has no hook for this, so `Work.wait` itself is replaced."""
    global _counting
    if _counting:
        return
    _counting, original = True, dist.Work.wait

    def wait(work: dist.Work, *args, **kwargs):
        global _seconds
        started = perf_counter()
        try:
            return original(work, *args, **kwargs)
        finally:
            if not exchanges_beside():
                _seconds += perf_counter() - started

    dist.Work.wait = wait

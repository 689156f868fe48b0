"""How long this process has waited for other ranks, in the collectives of minillm and of DeepSpeed alike.

Whoever calls them, torch.distributed's collectives end in `Work.wait` where the host waits for one, and that is what is
counted. With gloo it is all that an exchange takes longer than the work beside it, waiting for slower ranks included.
NCCL's returns at once, because the device waits and not the host: its time stays with the part that needs the result.
"""

from time import perf_counter

import torch.distributed as dist

_seconds = 0.0
_counting = False


def waited() -> float:
    """Seconds since `count_waits`; 0 without it."""
    return _seconds


def count_waits() -> None:
    """From now on, for the whole process. There is no hook for this, so that the method is replaced."""
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
            _seconds += perf_counter() - started

    dist.Work.wait = wait

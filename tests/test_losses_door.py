"""minillm.losses: what the door offers, and what walking through it loads."""

import os
import subprocess
import sys

import minillm.losses

OFFERED = {
    "LMHead",
    "TopK",
    "TokenStats",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logprobs",
    "linear_objective",
    "linear_token_stats",
}


def test_the_door_offers_what_is_documented():
    assert set(minillm.losses.__all__) == OFFERED
    for name in OFFERED:
        assert getattr(minillm.losses, name).__doc__


def test_importing_it_loads_torch_alone():
    """In a fresh process: no trainer dependency, and not the compiler of torch either, which costs seconds."""
    code = "import sys, minillm.losses; print(*sorted(m for m in sys.modules if '.' not in m or m == 'torch._dynamo'))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
    ).stdout.split()
    assert "torch" in output
    unwanted = {"pydantic", "transformers", "deepspeed", "datasets", "rich", "matplotlib", "kernels", "torch._dynamo"}
    assert not unwanted & set(output)

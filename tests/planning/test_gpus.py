"""Which devices a plan is for."""

import pytest

from minillm import UserError
from minillm.planning.gpus import GPUS, find_gpu


def test_names_are_found_whatever_their_case():
    assert find_gpu("h100-80gb") is find_gpu("H100-80GB") is GPUS["h100-80gb"]


def test_the_cpu_is_this_machine_whose_speed_is_not_known():
    found = find_gpu("CPU")
    assert found.kind == "cpu" and found.bf16_tflops is None and 0 < found.usable_bytes < found.memory_gib * 2**30


def test_an_unknown_device_is_told_which_there_are():
    with pytest.raises(UserError, match="--gpu abacus: known are H100-80GB, .* and cpu"):
        find_gpu("abacus")

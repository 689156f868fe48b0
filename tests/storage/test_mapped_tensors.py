"""Rows of safetensors files as memory maps: what safetensors itself reads, and RAM that does not grow with the file."""

import json
import resource
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from minillm.storage.mapped_tensors import MappedTensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64])
def test_rows_are_those_that_were_saved(tmp_path, dtype):
    values = (torch.randn(7, 3) * 20).to(dtype)
    save_file({"x": values, "empty": torch.empty(0, 4)}, tmp_path / "x.safetensors", metadata={"a": "b"})
    mapped = MappedTensors(tmp_path / "x.safetensors")
    assert torch.equal(mapped.rows("x", 2, 4), values[2:6]) and mapped.rows("x", 2, 4).dtype == dtype
    assert len(mapped.rows("x", 7, 0)) == 0 and mapped.array("empty").shape == (0, 4)
    assert "x" in mapped and "y" not in mapped and mapped.metadata == {"a": "b"}
    mapped.rows("x", 0, 1).zero_()  # a copy
    assert torch.equal(mapped.rows("x", 0, 1), values[:1])


def test_a_file_that_is_cut_off_or_longer_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.arange(10)}, path)
    whole = path.read_bytes()
    for content in (b"", whole[:6], whole[:40], whole[:-1], whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cut off|bytes, and its header"):
            MappedTensors(path)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Four GiB on a disk that keeps holes: no machine of the tests would hold them in memory."""
    path, rows = tmp_path / "x.safetensors", 2**22
    header = json.dumps({"x": {"dtype": "F16", "shape": [rows, 512], "data_offsets": [0, rows * 1024]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + rows * 1024)
        file.seek(-2, 2)
        file.write(np.float16(3.5).tobytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mapped = MappedTensors(path)
    assert mapped.rows("x", rows - 1, 1)[0, -1] == 3.5
    for first in np.random.default_rng(0).integers(0, rows - 64, 40):
        assert not mapped.rows("x", int(first), 64).any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB; 2.5 MiB were read

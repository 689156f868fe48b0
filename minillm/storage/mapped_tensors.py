"""safetensors files as memory maps: some rows of a large file are read without the rest, and RAM stays as it is.

Whatever was read lies in the system's page cache, which gives way to anything else.
"""

import json
import mmap
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_NUMPY = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16, "I32": np.int32,
    "U32": np.uint32, "I64": np.int64, "U64": np.uint64, "F16": np.float16, "BF16": np.uint16, "F32": np.float32,
    "F64": np.float64,
}  # fmt: skip


class MappedTensors:
    """The tensors of one safetensors file.

    Raises ValueError for a file that is none, or that is shorter than its header says.
    """

    def __init__(self, path: Path):
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8 or 8 + struct.unpack("<Q", start)[0] > size:
                raise ValueError("it is cut off, or no safetensors file")
            (length,) = struct.unpack("<Q", start)
            header = json.loads(file.read(length))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        ends = [one["data_offsets"][1] for one in header.values()]
        if 8 + length + max(ends, default=0) != size:
            raise ValueError(f"it has {size} bytes, and its header describes {8 + length + max(ends, default=0)}")
        self._arrays: dict[str, np.ndarray] = {}
        self._bfloat16 = {name for name, one in header.items() if one["dtype"] == "BF16"}
        for name, one in header.items():
            kind, (first, last) = np.dtype(_NUMPY[one["dtype"]]), one["data_offsets"]
            count = (last - first) // kind.itemsize
            self._arrays[name] = np.frombuffer(mapped, kind, count, 8 + length + first).reshape(one["shape"])

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def array(self, name: str) -> np.ndarray:
        """A tensor as the map itself, of which what is looked at is read; bfloat16 as the 16 bits that it is."""
        return self._arrays[name]

    def rows(self, name: str, first: int, count: int) -> Tensor:  # (count, ...)
        """A copy of some rows of a tensor."""
        rows = torch.from_numpy(np.array(self._arrays[name][first : first + count]))
        return rows.view(torch.bfloat16) if name in self._bfloat16 else rows

    def close(self) -> None:
        """Give back the maps; arrays that were handed out go on to hold theirs."""
        self._arrays.clear()

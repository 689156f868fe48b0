"""Which rows are kept, and how many make a chunk."""

import pytest
import torch

from minillm.kernels.chunks import DEVICE_BUDGET, chunk_rows, keep_rows, logits_buffer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_kept_rows_in_order():
    labels = torch.tensor([3, -100, 0, -100, 4])
    index, count = keep_rows(labels, -100, 5, None)
    assert index.tolist() == [0, 2, 4] and count == 3
    index, count = keep_rows(torch.tensor([1, 2]), -100, 5, None)
    assert index is None and count == 2
    index, count = keep_rows(torch.tensor([-100, -100]), -100, 5, None)
    assert index.tolist() == [] and count == 0


@pytest.mark.parametrize("wrong", [[0, 5], [-1, 0], [0, -99], [2**40, 1]])
def test_labels_outside_the_vocabulary(wrong):
    with pytest.raises(ValueError, match=r"labels: 1 of 2 kept labels are outside \[0, 5\)"):
        keep_rows(torch.tensor(wrong), -100, 5, None)


def test_a_wrong_count_is_noticed_where_it_is_free():
    assert keep_rows(torch.tensor([1, -100]), -100, 5, 1)[0].tolist() == [0]
    with pytest.raises(ValueError, match="kept is 2, but 1 labels"):
        keep_rows(torch.tensor([1, -100]), -100, 5, 2)


def test_a_gpu_is_asked_once_at_most():
    """On a meta tensor, which has no values, any synchronisation would raise."""
    labels = torch.zeros(8, dtype=torch.int64, device="meta")
    index, count = keep_rows(labels, -100, 5, 3)
    assert index.shape == (3,) and count == 3
    assert keep_rows(labels, -100, 5, 8) == (None, 8)


@pytest.mark.parametrize("rows", [1, 7, 500, 4096, 8192, 100_000])
@pytest.mark.parametrize("vocab", [1000, 32_000, 151_936])
@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("chunk_bytes", [None, 1, 5_000_000])
def test_chunks_are_even_and_within_the_budget(rows, vocab, device, chunk_bytes):
    size = chunk_rows(rows, vocab, models=2, itemsize=4, device=device, chunk_bytes=chunk_bytes)
    used = size * vocab * 8
    if chunk_bytes is not None:
        assert size == 1 or used <= chunk_bytes
    elif device == CUDA:
        assert size <= 4096 and size % 128 == 0
        assert used <= DEVICE_BUDGET or size == 512
    chunks = -(-rows // size)
    last = rows - (chunks - 1) * size
    multiple = 128 if device == CUDA and size >= 128 else 1
    assert 1 <= last and size - last < multiple * chunks  # no remnant


def test_gpu_buffers_have_aligned_rows():
    assert logits_buffer(3, 50_257, torch.float32, torch.device("meta")).stride(0) == 50_272
    assert logits_buffer(3, 50_257, torch.float32, CPU).shape == (3, 50_257)

"""The sizes' benchmark: every variant runs and is compared, through Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from minillm.benchmarks import tune, tune_variants  # noqa: E402
from minillm.benchmarks.cases import Case, make_inputs  # noqa: E402
from minillm.benchmarks.tune import measure  # noqa: E402
from minillm.benchmarks.tune_variants import VARIANTS, Variant, applied  # noqa: E402
from minillm.kernels import arguments, chunks, rows_triton, tiled_triton, tiles  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = Case("reverse_kl", 6, 16, 24, 120, "float32")
INTERPRETED = ("statistics", "gradients", "launches", "tiled")


def once(run) -> float:
    run()
    return 2.0


def constants():
    return (
        rows_triton.STATISTICS_BLOCK,
        rows_triton.GRADIENT_WARPS,
        tiled_triton.WAVES,
        dict(tiled_triton.CONFIGS),
        tiles.TILE_IDS,
    )


@pytest.mark.parametrize("part", VARIANTS)
def test_every_variant_runs_and_computes_the_same(part):
    before, inputs = constants(), make_inputs(TINY, DEVICE)
    timings = list(measure(VARIANTS[part](inputs), once))
    assert len({timing.variant.name for timing in timings}) == len(timings) >= 4
    assert all(timing.failure is None and timing.rate > 0 for timing in timings)
    if part in INTERPRETED:
        assert [timing.variant.current for timing in timings] == [True] + [False] * (len(timings) - 1)
        assert all(timing.error < tune.SAME for timing in timings[1:])
    assert constants() == before


class Spy:
    """A kernel that notes with what it was launched."""

    def __init__(self, monkeypatch, module, name: str):
        self.kernel, self.launches = getattr(module, name), []
        monkeypatch.setattr(module, name, self)

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.append(kwargs)
            return self.kernel[grid](*args, **kwargs)

        return launch


KERNELS = {"statistics": "statistics_kernel", "gradients": "gradient_kernel", "launches": "both_kernel"}


@pytest.mark.parametrize("part", KERNELS)
def test_row_kernels_are_launched_as_a_variant_says(part, monkeypatch):
    spies = {name: Spy(monkeypatch, rows_triton, name) for name in KERNELS.values()}
    spy, names = spies.pop(KERNELS[part]), []
    for variant in VARIANTS[part](make_inputs(TINY, DEVICE)):
        spy.launches.clear()
        with applied(variant.settings):
            variant.run()
        if variant.name == "two":
            assert not spy.launches and all(other.launches for other in spies.values())
            continue
        (launch,) = spy.launches
        block, warps = (value for _, _, value in variant.settings)
        assert (launch["BLOCK"], launch["num_warps"]) == (block, warps)
        assert f"BLOCK {block}, {warps} warps" in variant.name
        assert variant.amount == {"statistics": 8, "gradients": 12, "launches": 20}[part] * TINY.tokens * TINY.vocab
        names.append(variant.name)
    assert len(set(names)) == len(names) >= 9


def test_the_tiled_engine_is_launched_as_a_variant_says(monkeypatch):
    spy, grids = Spy(monkeypatch, tiled_triton, "tiled_kernel"), set()
    for variant in VARIANTS["tiled"](make_inputs(TINY, DEVICE)):
        with applied(variant.settings):
            variant.run()
            waves = tiled_triton.WAVES
        launch = spy.launches[-1]
        name = "{BLOCK_M} x {BLOCK_N} x {BLOCK_H}, {num_warps} warps, {num_stages} stages".format(**launch)
        assert variant.name == f"{name}, WAVES {waves}"
        assert variant.amount == 2 * TINY.tokens * TINY.vocab * (16 + 24)
        grids.add(variant.name)
    assert len(grids) >= 10


def test_losses_run_by_the_backend_and_the_bytes_that_a_variant_names(monkeypatch):
    calls, original = [], tune_variants.linear_divergence

    def divergence(*args, backend, chunk_bytes):
        ids = {module.TILE_IDS for module in (arguments, tiles)}
        calls.append((backend, chunk_bytes, ids, [one.grad for one in args[:2]]))
        return original(*args, backend=backend, chunk_bytes=chunk_bytes)

    monkeypatch.setattr(tune_variants, "linear_divergence", divergence)
    for variant in VARIANTS["losses"](make_inputs(TINY, DEVICE)):
        with applied(variant.settings):
            variant.run()
        backend, chunk_bytes, ids, before = calls[-1]
        chunk_bytes = chunk_bytes or chunks.DEVICE_BUDGET
        assert before == [None, None]  # or their sum would be timed as well
        (ids,) = ids  # the same in both modules
        sizes = f"TILE_IDS {ids}, tiles" if backend == "tiled" else "chunks"
        assert variant.name == f"{backend}, {sizes} of {chunk_bytes // tune_variants.MIB} MiB"
        assert variant.amount == TINY.flops("full")
    assert {call[0] for call in calls} == {"triton", "tiled"}


def test_settings_are_put_back():
    before = rows_triton.STATISTICS_BLOCK
    with pytest.raises(AttributeError), applied(((rows_triton, "NO_SUCH_SIZE", 3),)):
        pass
    with pytest.raises(ZeroDivisionError), applied(((rows_triton, "STATISTICS_BLOCK", 3),)):
        _ = 1 // 0
    for _ in measure(VARIANTS["statistics"](make_inputs(TINY, DEVICE)), once):
        assert rows_triton.STATISTICS_BLOCK == before


def test_a_part_that_cannot_begin_leaves_the_others(monkeypatch):
    def broken(inputs):
        raise torch.OutOfMemoryError("no room")
        yield

    def no_profile(inputs):
        raise RuntimeError("no profiler")

    monkeypatch.setitem(VARIANTS, "statistics", broken)
    monkeypatch.setattr(tune, "profile", no_profile)
    page = tune.report(TINY, DEVICE, ["ceilings", "statistics", "gradients", "profile"], once, None)
    assert "| statistics | | | | | OutOfMemoryError: no room |" in page
    assert "| ceilings | copy |" in page and "GRADIENT_BLOCK" in page and "no profile: RuntimeError" in page


def test_the_profile_is_of_one_pass_alone():
    inputs = make_inputs(TINY, DEVICE)
    tune.profile(inputs)
    once_more = [leaf.grad.clone() for leaf in inputs.leaves]
    tune.profile(inputs)
    assert all(torch.equal(leaf.grad, before) for leaf, before in zip(inputs.leaves, once_more, strict=True))


def test_other_results_and_failures_are_said():
    def broken():
        raise RuntimeError("out of resources: shared memory\nmore")

    value = torch.ones(4)
    variants = [
        Variant("part", "used", lambda: value, 4e9, "GB/s", current=True),
        Variant("part", "wrong", lambda: 1.1 * value, 4e9, "GB/s"),
        Variant("part", "nan", lambda: torch.nan * value, 4e9, "GB/s"),
        Variant("part", "broken", broken, 4e9, "GB/s"),
        Variant("part", "right", lambda: value + 1e-5, 4e12, "TFLOP/s"),
    ]
    lines = [timing.line() for timing in measure(iter(variants), once)]
    assert lines[0] == "| part | used | now | 2 | 2,000 GB/s |  |"
    assert "other results: 1.0e-01" in lines[1] and "other results: nan" in lines[2]
    assert lines[3] == "| part | broken |  | | | RuntimeError: out of resources: shared memory |"
    assert lines[4] == "| part | right |  | 2 | 2,000 TFLOP/s |  |"


def test_the_page(tmp_path):
    page = tune.report(TINY, DEVICE, ["ceilings", "profile"], once, str(tmp_path / "out"))
    assert (tmp_path / "out" / "tune.md").read_text(encoding="utf-8") == page + "\n"
    assert "| ceilings | copy |" in page and "aten::mm" in page and torch.__version__ in page
    assert "statistics" not in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on a GPU")
def test_without_a_gpu_there_is_nothing_to_tune(capsys):
    assert tune.main([]) == 2
    assert "torch sees none here" in capsys.readouterr().err

"""The sizes' benchmark: every variant runs and is compared, through Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from minillm.benchmarks import tune  # noqa: E402
from minillm.benchmarks.cases import Case, make_inputs  # noqa: E402
from minillm.benchmarks.tune import VARIANTS, Variant, applied, measure  # noqa: E402
from minillm.kernels import rows_triton, tiled_triton, tiles  # noqa: E402

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


def test_the_settings_of_a_variant_are_those_it_runs_under():
    """And each names what the code reads."""
    seen = []
    inputs = make_inputs(TINY, DEVICE)
    list(measure(VARIANTS["statistics"](inputs), lambda run: seen.append(rows_triton.STATISTICS_BLOCK) or 1.0))
    assert seen[0] == rows_triton.STATISTICS_BLOCK and set(seen) == {512, 1024, 2048, 4096}
    with pytest.raises(AttributeError), applied(((rows_triton, "NO_SUCH_SIZE", 3),)):
        pass
    with pytest.raises(ZeroDivisionError), applied(((rows_triton, "STATISTICS_BLOCK", 3),)):
        _ = 1 // 0
    assert rows_triton.STATISTICS_BLOCK == seen[0]


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

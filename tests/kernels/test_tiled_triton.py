"""The no-logits engine against the float64 oracle, and its machine code for Hopper (compiled without a GPU)."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

if __name__ != "__main__":
    from minillm.kernels import reference, tiled_triton
    from minillm.kernels.divergences import RowSpec
    from minillm.kernels.head import LMHead
    from minillm.losses import linear_divergence, linear_token_stats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EIGHT = (
    *("student_logprob", "teacher_logprob", "reverse_kl", "forward_kl"),
    *("student_entropy", "teacher_entropy", "student_argmax", "teacher_argmax"),
)


def problem(rows, vocab_size, student_size, teacher_size, *, dtype=torch.float32, bias=False, seed=0):
    """Hidden states, heads and labels; logits of standard deviation 3, the teacher's unlike the student's."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    def model(size):
        weight = (randn(vocab_size, size) * 3 / size**0.5).to(dtype)
        return randn(rows, size).to(dtype), weight, randn(vocab_size).to(dtype) if bias else None

    labels = torch.randint(vocab_size, (rows,), generator=generator).to(DEVICE)
    return model(student_size), model(teacher_size), labels


def exact(student, teacher, labels, spec):
    """The statistics in float64 on full logits."""

    def logits(model, scale, softcap):
        hidden, weight, bias = (None if tensor is None else tensor.double() for tensor in model)
        return reference.logits(hidden, weight, bias, logit_scale=scale, softcap=softcap, temperature=spec.temperature)

    z_s = logits(student, spec.student_scale, spec.student_softcap)
    z_t = None if teacher is None else logits(teacher, spec.teacher_scale, spec.teacher_softcap)
    return reference.token_stats(z_s, z_t, labels)


def tiled(student, teacher, labels, spec):
    heads = [None if model is None else LMHead(model[1], model[2]) for model in (student, teacher)]
    return tiled_triton.tiled_stats(
        student[0], heads[0], None if teacher is None else teacher[0], heads[1], labels, spec
    )


@pytest.fixture(autouse=True)
def few_shares(monkeypatch):
    """One multiprocessor: vocabularies this small would be cut into shares of one tile each on a GPU."""
    monkeypatch.setattr(tiled_triton, "_processors", lambda device: 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "vocab_size", "sizes", "options"),
    [
        (5, 300, (40, 64), {}),
        (130, 129, (64, 16), dict(temperature=2.0)),  # one id in the last tile, two tiles of rows
        (3, 1, (8, 8), {}),
        (2, 1000, (33, 72), dict(student_softcap=5.0, teacher_softcap=9.0, student_scale=0.5)),  # odd: a padded copy
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_oracle(rows, vocab_size, sizes, options, bias, dtype):
    student, teacher, labels = problem(rows, vocab_size, *sizes, dtype=dtype, bias=bias)
    spec = RowSpec(EIGHT, **options)
    result = tiled(student, teacher, labels, spec)
    assert set(result) == {*EIGHT, *(f"{who}_{part}" for who in ("student", "teacher") for part in ("max", "log_sum"))}
    for name, expected in exact(student, teacher, labels, spec).items():
        if name in EIGHT:
            assert result[name].dtype == (torch.int64 if name.endswith("argmax") else torch.float32)
            torch.testing.assert_close(result[name].to(expected.dtype), expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("waves", [1, 2, 64])
def test_any_number_of_shares(monkeypatch, waves):
    student, teacher, labels = problem(20, 700, 32, 32)
    spec = RowSpec(EIGHT)
    monkeypatch.setattr(tiled_triton, "WAVES", waves)
    result = tiled(student, teacher, labels, spec)
    for name, expected in exact(student, teacher, labels, spec).items():
        if name in EIGHT:
            torch.testing.assert_close(result[name].to(expected.dtype), expected, rtol=3e-6, atol=3e-6)


def test_a_large_offset_costs_no_digits():
    student, teacher, labels = problem(6, 700, 32, 32, bias=True)
    moved = (*student[:2], student[2] + 512), (*teacher[:2], teacher[2] - 256)
    for name, value in tiled(*moved, labels, RowSpec(("reverse_kl", "forward_kl"))).items():
        if name.endswith("_kl"):
            torch.testing.assert_close(
                value, exact(*moved, labels, RowSpec((name,)))[name].float(), rtol=1e-4, atol=1e-4
            )


def test_banned_ids():
    student, teacher, labels = problem(4, 400, 32, 32, bias=True)
    for model in (student, teacher):
        model[2][:70] = -math.inf  # more than a whole tile of fp32, at the beginning
    labels.clamp_(min=70)
    spec = RowSpec(EIGHT)
    result, expected = tiled(student, teacher, labels, spec), exact(student, teacher, labels, spec)
    for name in EIGHT:
        torch.testing.assert_close(result[name].to(expected[name].dtype), expected[name], rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("waves", [1, 64])  # a few shares, and a tile each
@pytest.mark.parametrize("who", [0, 1])
def test_a_tile_that_one_model_bans(who, waves, monkeypatch):
    monkeypatch.setattr(tiled_triton, "WAVES", waves)
    models = *_, labels = problem(4, 400, 32, 32, bias=True)
    models[who][2][:70] = -math.inf
    labels.clamp_(min=70)
    result, expected = tiled(*models, RowSpec(EIGHT)), exact(*models, RowSpec(EIGHT))
    for name in EIGHT:
        torch.testing.assert_close(result[name].to(expected[name].dtype), expected[name], rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_no_id_at_all_is_nan(who):
    student, teacher, labels = problem(3, 200, 32, 32, bias=True)
    (student if who == "student" else teacher)[2][:] = -math.inf
    result = tiled(student, teacher, labels, RowSpec(EIGHT))
    assert (result.pop(f"{who}_argmax") == 0).all()
    for name, value in result.items():
        sound = name.startswith("teacher" if who == "student" else "student")
        if not name.endswith("_max"):  # -inf, beside a NaN in its log-sum
            assert value.isfinite().all() if sound else value.isnan().all(), name


@pytest.mark.parametrize("waves", [1, 64])
def test_argmax_takes_the_lowest_of_equals(waves, monkeypatch):
    """In half a tile, in its other half, in the next tile, in another share."""
    monkeypatch.setattr(tiled_triton, "WAVES", waves)
    hidden, weight = torch.ones(2, 8, device=DEVICE), torch.zeros(700, 8, device=DEVICE)
    weight[[70, 75, 100, 130, 650]] = 1.0
    model = hidden, weight, None
    result = tiled(model, model, None, RowSpec(("student_argmax", "teacher_argmax")))
    assert result["student_argmax"].tolist() == result["teacher_argmax"].tolist() == [70, 70]


def test_divergences_that_are_infinite():
    student, teacher, labels = problem(4, 400, 32, 32, bias=True)
    teacher[2][100] = -math.inf
    result = tiled(student, teacher, labels, RowSpec(EIGHT))
    assert (result["reverse_kl"] == math.inf).all()
    assert result["forward_kl"].isfinite().all()
    student[2][100], teacher[2][100] = -math.inf, 0.0
    result = tiled(student, teacher, labels, RowSpec(EIGHT))
    assert (result["forward_kl"] == math.inf).all()
    assert result["reverse_kl"].isfinite().all()


@pytest.mark.parametrize(("who", "infinite"), [(0, "forward_kl"), (1, "reverse_kl")])
def test_infinite_although_the_other_probability_underflows(who, infinite):
    models = *_, labels = problem(4, 400, 32, 32, bias=True)
    models[who][2][100], models[1 - who][2][100] = -math.inf, -500.0
    assert (tiled(*models, RowSpec((infinite,)))[infinite] == math.inf).all()


def test_nan_stays_visible_and_in_its_row():
    student, teacher, labels = problem(4, 400, 32, 32)
    student[0][1, 3] = math.nan
    result = tiled(student, teacher, labels, RowSpec(EIGHT))
    for name in ("student_logprob", "reverse_kl", "forward_kl", "student_entropy"):
        assert result[name].isnan().tolist() == [False, True, False, False], name
    assert (result["student_argmax"] < 400).all()
    assert result["teacher_entropy"].isfinite().all()


def test_a_strided_bias():
    """A column of a table; and one number for all ids, which takes no memory of its own."""
    student, teacher, labels = problem(5, 100, 24, 16, bias=True)
    table = torch.stack((student[2], torch.full_like(student[2], 9.0)), 1)
    one = torch.full((1,), 0.5, device=DEVICE).expand(100)
    spec = RowSpec(("student_logprob", "reverse_kl"))
    strided = tiled((*student[:2], table[:, 0]), (*teacher[:2], one), labels, spec)
    plain = tiled(student, (*teacher[:2], one.contiguous()), labels, spec)
    for name in spec.fields:
        assert torch.equal(strided[name], plain[name]), name


def test_equal_models_have_no_divergence():
    student, _, labels = problem(9, 500, 48, 48, dtype=torch.bfloat16)
    result = tiled(student, student, labels, RowSpec(("reverse_kl", "forward_kl")))
    assert (result["reverse_kl"] == 0).all() and (result["forward_kl"] == 0).all()


def test_one_model_and_padded_rows():
    student, _, labels = problem(7, 200, 40, 8)
    wide = torch.randn(200, 64, device=DEVICE)
    wide[:, :40] = student[1]
    result = tiled((student[0], wide[:, :40], None), None, labels, RowSpec(("student_logprob",)))
    expected = exact(student, None, labels, RowSpec(("student_logprob",)))["student_logprob"]
    torch.testing.assert_close(result["student_logprob"], expected.float(), rtol=3e-6, atol=3e-6)
    assert set(result) == {"student_logprob", "student_max", "student_log_sum"}


def test_refusals_name_what_is_refused():
    student, teacher, labels = problem(3, 50, 8, 8)
    with pytest.raises(ValueError, match="jsd"):
        tiled(student, teacher, labels, RowSpec(("jsd",)))
    double = [tuple(None if t is None else t.double() for t in model) for model in (student, teacher)]
    with pytest.raises(ValueError, match="float64"):
        tiled(*double, labels, RowSpec(("reverse_kl",)))
    with pytest.raises(ValueError, match="jsd"):
        linear_divergence(student[0], student[1], teacher[0], teacher[1], divergence="jsd", backend="tiled")


def test_through_the_door_with_gradients():
    student, teacher, labels = problem(12, 300, 24, 32)
    labels[::3] = -100
    results = []
    for backend in ("torch", "tiled"):
        hidden, weight = (tensor.clone().requires_grad_() for tensor in student[:2])
        stats = linear_token_stats(hidden, weight, teacher[0], teacher[1], labels, backend=backend)
        (stats.reverse_kl - stats.student_logprob * 0.3 + stats.student_entropy).sum().backward()
        results.append((*(getattr(stats, name) for name in EIGHT), hidden.grad, weight.grad))
    for by_torch, by_tiles in zip(*results, strict=True):
        torch.testing.assert_close(by_tiles, by_torch, rtol=1e-5, atol=1e-5)


COMPILED = {
    "scoring": dict(fields=("student_logprob", "teacher_logprob", "reverse_kl")),
    "token_stats": dict(fields=EIGHT),
    "one_model": dict(fields=("student_logprob",), teacher=False),
    "softcap_bias": dict(fields=("student_logprob", "reverse_kl"), softcap=30.0, bias=True),
    "fp32": dict(fields=EIGHT, dtype="float32"),
}


def report(folder: Path) -> dict[str, dict[str, int]]:
    """Compiles every case for sm_90; run in a process without the interpreter."""
    from minillm.benchmarks.offline import Recorder, compile_for_hopper, instructions, resources
    from minillm.kernels import tiled_triton
    from minillm.kernels.divergences import RowSpec
    from minillm.kernels.head import LMHead

    kernel = Recorder(tiled_triton.tiled_kernel)
    tiled_triton.tiled_kernel = kernel
    tiled_triton.ShareSums.statistics = lambda sums: {}
    result = {}
    for name, case in COMPILED.items():
        dtype = getattr(torch, case.get("dtype", "bfloat16"))
        softcap = case.get("softcap")
        models = []
        for size in (2048, 5120):
            bias = torch.empty(151936, dtype=dtype) if case.get("bias") else None
            models += [torch.empty(256, size, dtype=dtype), LMHead(torch.empty(151936, size, dtype=dtype), bias)]
        if not case.get("teacher", True):
            models[2:] = None, None
        spec = RowSpec(case["fields"], student_softcap=softcap, teacher_softcap=softcap)
        tiled_triton.tiled_stats(*models, torch.zeros(256, dtype=torch.int64), spec)
        args, kwargs = kernel.launches[-1]
        compiled = compile_for_hopper(kernel.kernel, args, kwargs)
        result[name] = resources(compiled, folder) | instructions(compiled, folder)
    return result


@pytest.fixture(scope="module")
def compiled(run_apart) -> dict[str, dict[str, int]]:
    return run_apart(__file__)


@pytest.mark.parametrize("case", COMPILED)
def test_no_register_goes_to_local_memory(compiled, case):
    assert compiled[case]["stack"] == compiled[case]["local"] == 0, compiled[case]


@pytest.mark.parametrize("case", [case for case in COMPILED if case != "fp32"])
def test_products_run_on_the_tensor_cores_fed_by_the_copy_engine(compiled, case):
    assert compiled[case]["HGMMA"] and compiled[case]["UTMALDG"], compiled[case]
    assert not compiled[case]["HMMA"], compiled[case]


def test_products_of_fp32_are_not_rounded_for_the_tensor_cores(compiled):
    assert not compiled["fp32"]["HGMMA"] and not compiled["fp32"]["HMMA"], compiled["fp32"]


if __name__ == "__main__":
    print(json.dumps(report(Path(sys.argv[1]))))

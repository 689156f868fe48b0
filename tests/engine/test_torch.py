"""One optimiser step: normalisation over micro-batches, clipping, schedules, non-finite numbers, state."""

import copy
from dataclasses import replace

import pytest
import torch

from minillm import UserError
from minillm.config.training import TorchEngine as TorchEngineConfig
from minillm.config.training import TrainConfig
from minillm.engine.engine import NonFiniteError
from minillm.engine.torch import TorchEngine
from minillm.methods.protocol import Term
from minillm.models.batch import TokenSequence, collate
from minillm.models.device import pick_device
from tests.conftest import tiny_llama

SEQUENCES = [
    TokenSequence([5], [6, 7, 8, 9]),
    TokenSequence([1, 2], [3]),
    TokenSequence([9, 9], [8, 7]),
    TokenSequence([4], [4, 4, 4]),
]


def engine(models, **train) -> TorchEngine:
    return TorchEngine(models, TrainConfig(**{"max_steps": 4, **train}), TorchEngineConfig(device="cpu"), total_steps=4)


def cross_entropy_term(sequences, *, by_tokens=True, name="supervised", weight=1.0) -> Term:
    batch = collate(sequences, pad_id=256)
    count = float(len(batch.labels) if by_tokens else len(sequences))
    return Term(name, batch, lambda stats: -stats.student_logprob, ("student_logprob",), count, weight)


def gradients(models, micro_batches):
    found = seen_by_the_optimizer(built := engine(models, max_grad_norm=None, learning_rate=1e-12))
    built.step(micro_batches)
    return found


def seen_by_the_optimizer(built: TorchEngine) -> dict:
    """Gradients by name, once a step was taken."""
    found = {}
    named = built.models.student.named_parameters
    built.optimizer.register_step_pre_hook(lambda *_: found.update({name: one.grad.clone() for name, one in named()}))
    return found


@pytest.mark.parametrize("by_tokens", [True, False])
def test_one_big_batch_and_its_micro_batches_give_the_same_gradient(by_tokens, make_models):
    models = make_models(teacher=False)
    whole = gradients(models, [[cross_entropy_term(SEQUENCES, by_tokens=by_tokens)]])
    parts = gradients(
        models,
        [[cross_entropy_term(part, by_tokens=by_tokens)] for part in (SEQUENCES[:1], SEQUENCES[1:2], SEQUENCES[2:])],
    )
    for name in whole:
        assert (parts[name] - whole[name]).norm() < 1e-5 * whole[name].norm(), name


def test_terms_are_divided_by_their_own_counts_and_weighted(make_models):
    models = make_models(teacher=False)
    first, second = cross_entropy_term(SEQUENCES[:2]), cross_entropy_term(SEQUENCES[2:], name="pretraining", weight=0.5)
    result = engine(models).step([[first, second]])
    whole = cross_entropy_term(SEQUENCES[2:])
    separate = [engine(make_models(teacher=False)).step([[term]]).metrics["loss"] for term in (first, whole)]
    separate[1] *= 0.5
    assert result.metrics["loss"] == pytest.approx(sum(separate), rel=1e-5)
    assert result.metrics["loss/pretraining"] == pytest.approx(separate[1], rel=1e-5)
    assert result.rows == 10


def test_clipping_bounds_the_update_and_reports_the_norm_before_it(make_models):
    models = make_models(teacher=False)
    found = seen_by_the_optimizer(built := engine(models, max_grad_norm=0.01))
    result = built.step([[cross_entropy_term(SEQUENCES)]])
    after = torch.stack([gradient.norm() for gradient in found.values()]).norm()
    assert result.metrics["grad_norm"] > 0.02
    assert after == pytest.approx(0.01, rel=1e-3)


def test_no_gradient_waits_through_the_rollouts(make_models):
    models = make_models(teacher=False)
    engine(models).step([[cross_entropy_term(SEQUENCES)]])
    assert all(parameter.grad is None for parameter in models.student.parameters())


def test_a_non_finite_gradient_changes_nothing_and_says_so(make_models):
    models = make_models(teacher=False)
    built = engine(models)
    before = copy.deepcopy(models.student.state_dict())
    bad = cross_entropy_term(SEQUENCES)
    bad = Term(bad.name, bad.batch, lambda stats: stats.student_logprob * float("nan"), bad.fields, bad.count)
    with pytest.raises(NonFiniteError, match="loss nan"):
        built.step([[bad]])
    for name, tensor in models.student.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_vectors_do_not_decay(make_models):
    built = engine(make_models(teacher=False), weight_decay=0.5)
    decayed, spared = built.optimizer.param_groups
    assert decayed["weight_decay"] == 0.5 and all(p.dim() >= 2 for p in decayed["params"])
    assert spared["weight_decay"] == 0.0 and all(p.dim() < 2 for p in spared["params"]) and spared["params"]


def test_checkpointed_activations_give_the_same_step(make_models):
    plain, checkpointed = make_models(teacher=False), make_models(teacher=False)
    engine(plain).step([[cross_entropy_term(SEQUENCES)]])
    engine(checkpointed, gradient_checkpointing=True).step([[cross_entropy_term(SEQUENCES)]])
    for name, tensor in plain.student.state_dict().items():
        torch.testing.assert_close(checkpointed.student.state_dict()[name], tensor, msg=name)


def test_bf16_autocast_stays_near_fp32(make_models):
    exact = engine(make_models(teacher=False)).step([[cross_entropy_term(SEQUENCES)]]).metrics["loss"]
    rounded = engine(make_models(teacher=False), bf16=True).step([[cross_entropy_term(SEQUENCES)]]).metrics["loss"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.03)


def test_state_goes_through_a_folder_bit_for_bit(make_models, tmp_path):
    ours, theirs = make_models(teacher=False), make_models(teacher=False)
    first = engine(ours, lr_scheduler_type="cosine", warmup_steps=2)
    first.step([[cross_entropy_term(SEQUENCES)]])
    first.state_part().save(tmp_path)
    theirs.student.load_state_dict(ours.student.state_dict())
    second = engine(theirs, lr_scheduler_type="cosine", warmup_steps=2)
    second.load_state(tmp_path)
    results = [built.step([[cross_entropy_term(SEQUENCES)]]).metrics for built in (first, second)]
    assert results[0] == results[1]
    for name, tensor in ours.student.state_dict().items():
        assert torch.equal(theirs.student.state_dict()[name], tensor), name


def test_a_missing_gpu_is_an_error_that_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ValueError, match="engine.device=cpu"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"


def test_a_device_that_is_not_there_is_named(monkeypatch):
    for name in ("meta", "mps", "gpu"):
        with pytest.raises(ValueError, match=f"device is '{name}'; it must be auto, cpu, cuda or cuda:N"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda").type == "cuda" and pick_device("cuda:1").index == 1
    with pytest.raises(ValueError, match="'cuda:2', but torch sees 2 GPUs here"):
        pick_device("cuda:2")


def test_a_term_that_counts_nothing_divides_by_one(make_models):
    nothing = replace(cross_entropy_term(SEQUENCES, name="empty"), count=0.0, weight=0.0)
    result = engine(make_models(teacher=False)).step([[cross_entropy_term(SEQUENCES), nothing]])
    assert result.metrics["loss/empty"] == 0.0 and result.metrics["loss"] == result.metrics["loss/supervised"] > 0


def test_the_state_of_other_weights_is_refused_before_anything_is_changed(make_models, tmp_path):
    models = make_models(teacher=False)
    first = engine(models)
    first.step([[cross_entropy_term(SEQUENCES)]])
    first.state_part().save(tmp_path)
    other = replace(models, student=tiny_llama(vocab_size=257, hidden_size=48))
    with pytest.raises(UserError, match=r"engine.pt.*exp_avg of weight 0 is \(257, 32\), the weight \(257, 48\)"):
        engine(other).load_state(tmp_path)


class Harmful:
    """What a pickle can do: call anything while it is read."""

    def __reduce__(self):
        return pytest.fail, ("the pickle was run",)


def test_no_pickle_is_run(make_models, tmp_path):
    torch.save({"optimizer": Harmful()}, tmp_path / "engine.pt")
    with pytest.raises(UserError, match="engine.pt"):
        engine(make_models(teacher=False)).load_state(tmp_path)

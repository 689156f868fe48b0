"""One term's loss from one forward pass: of which model, over which hidden states, with what is added to it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.engine.module import TermLoss
from minillm.methods.protocol import HiddenLoss, Term
from minillm.methods.supervised import cross_entropy
from minillm.models.batch import TokenSequence, collate
from minillm.models.modes import train_mode
from minillm.models.routers import Routing, balance_loss, routers_of
from minillm.teachers.local import LocalTeacher
from tests.conftest import tiny_llama
from tests.models.test_routers import build as build_with_routers

SEQUENCES = [TokenSequence([5, 6], [7, 8, 9]), TokenSequence([3], [4])]  # of two lengths: one row is not the next


def term(**changes) -> Term:
    batch = collate(SEQUENCES, 0)
    return replace(Term("one", batch, cross_entropy, ("student_logprob",), float(len(batch.labels))), **changes)


def loss_of(model, one: Term, *, vocab_size: int = 71, **modules):
    return TermLoss(model, modules, vocab_size=vocab_size, backend="torch")(one)


def logits_at_rows(model):  # (N, V) float64
    return torch.cat(
        [
            model(torch.tensor([one.prompt + one.response])).logits[0, len(one.prompt) - 1 : -1].double()
            for one in SEQUENCES
        ]
    )


def test_hidden_states_are_what_each_layer_gives_and_the_last_what_the_head_reads():
    model, seen = tiny_llama(vocab_size=71, layers=3), {}

    def remember(layer: int):
        def hook(module, inputs, output) -> None:
            seen.setdefault(layer, output)  # of the first pass

        return hook

    for layer in (1, 2):
        model.model.layers[layer - 1].register_forward_hook(remember(layer))

    def objective(hidden, batch, modules, *, scale):
        assert list(hidden) == [0, 1, 2, 3, -1] and isinstance(modules["map"], nn.Linear)
        torch.testing.assert_close(hidden[0], model.model.embed_tokens(batch.input_ids))
        for layer, output in seen.items():
            torch.testing.assert_close(hidden[layer], output[0] if isinstance(output, tuple) else output)
        assert hidden[3] is hidden[-1]
        read = model.lm_head(hidden[-1]).flatten(0, 1)[batch.rows]
        torch.testing.assert_close(read.double(), logits_at_rows(model), rtol=1e-4, atol=1e-5)
        total = scale * sum(modules["map"](state).square().mean() for state in hidden.values())
        return total, {"features": total.detach()}

    beside = nn.Linear(32, 2)
    hidden = HiddenLoss((0, 1, 2, 3, -1), objective, {"scale": torch.tensor(2.0)})
    plain, _ = loss_of(model, term())
    loss, metrics = loss_of(model, term(hidden=hidden), map=beside)
    assert len(seen) == 2 and metrics["features"] > 0.01
    torch.testing.assert_close(loss.detach(), plain.detach() + metrics["features"])
    assert metrics.keys() == {"cross_entropy_nats", "features"}
    loss.backward()
    assert beside.weight.grad.norm() > 0 and model.model.embed_tokens.weight.grad.norm() > 0


@pytest.mark.parametrize("coupled", [True, False])
def test_a_coupled_objective_sees_all_rows_at_once(coupled):
    seen = []

    def objective(stats):
        seen.append(len(stats.student_logprob))
        return stats.student_logprob

    one = term(objective=objective, coupled=coupled, options={"chunk_bytes": 1})  # chunks of one row
    loss_of(tiny_llama(vocab_size=71), one)
    assert set(seen) == ({4} if coupled else {1})


@pytest.mark.parametrize("trains", ["student", "other"])
def test_a_term_trains_the_model_that_it_names_and_no_other(trains):
    models = {"student": tiny_llama(vocab_size=71), "other": tiny_llama(vocab_size=71, hidden_size=48, seed=1)}
    loss, _ = loss_of(models["student"], term(trains=trains), other=models["other"])
    labels = torch.tensor([token for one in SEQUENCES for token in one.response])
    expected = F.cross_entropy(logits_at_rows(models[trains]), labels, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    for name, model in models.items():
        assert all((one.grad is not None) == (name == trains) for one in model.parameters()), name


@pytest.mark.parametrize("beside", [True, False], ids=["trained beside the student", "frozen"])
def test_a_teacher_gets_no_gradient_wherever_it_stands(beside):
    student, teacher = tiny_llama(vocab_size=71), tiny_llama(vocab_size=71, hidden_size=48, seed=1)
    rows = LocalTeacher(teacher).rows(collate(SEQUENCES, 0))
    one = term(objective=lambda stats: stats.reverse_kl, fields=("reverse_kl",), teacher=rows)
    loss, _ = loss_of(student, one, **({"teacher": teacher} if beside else {}))
    q, p = (logits_at_rows(model).log_softmax(-1) for model in (student, teacher))
    torch.testing.assert_close(loss.double(), (q.exp() * (q - p)).sum(), rtol=1e-5, atol=1e-5)
    loss.backward()
    assert all(one.grad is None for one in teacher.parameters())
    assert all(one.grad is not None for one in student.parameters())


def test_the_balance_loss_of_routers_is_a_mean_that_the_divisor_leaves_one():
    model = build_with_routers("qwen3_moe")
    plain, _ = loss_of(model, term())
    loss, metrics = loss_of(model, term(auxiliary=0.3, count=7.0))
    batch = collate(SEQUENCES, 0)
    output = model.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        output_router_logits=True,
    )
    balance = balance_loss(model, Routing(list(output.router_logits)), batch.attention_mask)
    torch.testing.assert_close((loss - plain) / 7.0, 0.3 * balance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["auxiliary_loss"], 4 * balance)  # metrics are divided by the 4 rows


def test_experts_are_counted_once_for_every_real_token_and_balanced_when_layers_are_computed_again():
    counts, gradients = [], []
    for checkpointing in (False, True):
        model = build_with_routers("qwen3_moe")
        train_mode([model], checkpointing=checkpointing)
        module = TermLoss(model, vocab_size=71, backend="torch")
        one = term(auxiliary=0.5)
        module(one)[0].backward()
        counts.append(module.take_expert_tokens())
        gradients.append([router.weight.grad for router, _ in routers_of(model)])
    mask = one.batch.attention_mask
    assert (mask == 0).any() and counts[0].sum(1).tolist() == [2 * int(mask.sum())] * 3
    assert torch.equal(*counts)
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)

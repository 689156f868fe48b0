"""gold: groups of a batch by hand, its loss against formulas in float64, and students' answers that the teacher reads again."""

import math
from types import SimpleNamespace

import pytest
import torch

from minillm.config.methods.gold_keys import GOLD
from minillm.data.stream import Stream
from minillm.engine.module import TermLoss
from minillm.methods import build_method
from minillm.methods.gold import grouped, read_again
from minillm.methods.protocol import TrainingData
from minillm.methods.text_pairs import PairedText
from minillm.models.batch import TokenSequence
from minillm.models.byte_alignment import TokenGroup
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Answer
from tests.methods.conftest import stage_of
from tests.other_tokenizer import paired_examples, paired_models

TEXTS = ["the cat sat", "x", "日本", ""]


@pytest.fixture(scope="module")
def models():
    return paired_models()


def made(models, tmp_path, *, rollout=None, **keys):
    method = build_method(stage_of(4, rollout=rollout, name="gold", **keys))
    data = TrainingData(Stream(paired_examples(TEXTS, models), seed=1), None, LocalRollouts(models), tmp_path)
    return method, method.collect(data, models, draw=0), data


def rows_of(model, sequence):  # (T, V) log-probabilities of every token of the response
    ids = torch.tensor([sequence.prompt + sequence.response])
    return torch.log_softmax(model(ids).logits[0, len(sequence.prompt) - 1 : -1], -1)


def padded_sorted(*values):
    size = max(map(len, values))
    return [torch.nn.functional.pad(one, (0, size - len(one))).sort(descending=True).values for one in values]


def jsd(a, b):
    m = (a + b) / 2
    return 0.5 * (torch.xlogy(b, b / m).sum() + torch.xlogy(a, a / m).sum())


def test_loss_and_gradient_are_those_of_full_logits_in_float64(models, tmp_path):
    method, items, data = made(models, tmp_path, on_policy=0.0, matched_weight=0.3, ce_coef=0.2)
    (term,) = method.terms(items, data, models)
    loss, metrics = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch")(term)
    loss = loss / term.count
    found = torch.autograd.grad(loss, list(models.student.parameters()))
    pair, student, teacher = models.tokenizers, models.student.double(), models.teacher.model.double()
    try:
        total, entropy, tokens, longer = 0.0, 0.0, 0, 0
        for item in items:
            ours, theirs = item.sequence.response, item.teacher.response
            logq, logp = rows_of(student, item.sequence), rows_of(teacher, item.teacher).detach()
            entropy = entropy - sum(logq[place, token] for place, token in enumerate(ours))
            tokens += len(ours)
            for group in pair.groups(ours, theirs):
                (first, last), (their_first, their_last) = group.student, group.teacher
                longer += last - first > 1
                q0 = math.prod((logq[i, ours[i]].exp() for i in range(first, last - 1)), start=torch.ones(()).double())
                p0 = math.prod(
                    (logp[i, theirs[i]].exp() for i in range(their_first, their_last - 1)),
                    start=torch.ones(()).double(),
                )
                a, b = q0 * logq[last - 1].exp(), p0 * logp[their_last - 1].exp()
                same = pair.text(0, ours[first : last - 1]) == pair.text(1, theirs[their_first : their_last - 1])
                pairs = pair.matches if same else {ours[last - 1]: theirs[their_last - 1]}
                mine, other = torch.tensor([*pairs]), torch.tensor([*pairs.values()])
                unmatched = [
                    torch.cat([one.index_fill(0, ids, 0.0), 1 - whole[None]])
                    for one, ids, whole in ((a, mine, q0), (b, other, p0))
                ]
                # no outcome of the student's is beside those that match: its every byte does
                beside = [rest.sum().clamp_min(1e-300)[None] for rest in unmatched]
                matched = [
                    torch.cat([one[ids], rest]) for one, ids, rest in zip((a, b), (mine, other), beside, strict=True)
                ]
                one, another = padded_sorted(*unmatched)
                total = total + 0.3 * jsd(*matched) + 0.7 * (one - another).abs().sum()
        want = (total + 0.2 * entropy) / tokens
        gradients = torch.autograd.grad(want, list(student.parameters()))
    finally:
        student.float(), teacher.float()
    assert longer > 2 and metrics["grouped_tokens"] == tokens  # bytes of words, and every token is in a group
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    scale = max(one.abs().max().item() for one in gradients)
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4 * scale)


def test_the_groups_of_a_batch(models, tmp_path):
    _, items, _ = made(models, tmp_path, on_policy=0.0)
    found = grouped(items, models.tokenizers)
    place = {"student": 0, "teacher": 0}
    number = 0
    for item in items:
        responses = {"student": item.sequence.response, "teacher": item.teacher.response}
        for group in models.tokenizers.groups(*responses.values()):
            for name, response in responses.items():
                first, stop = getattr(group, name)
                chosen = found[f"{name}_before_groups"] == number
                rows = found[f"{name}_before"][chosen].tolist()
                assert rows == list(range(place[name] + first, place[name] + stop - 1))
                assert found[f"{name}_before_labels"][chosen].tolist() == response[first : stop - 1]
                assert found[f"{name}_last"][number] == place[name] + stop - 1
                assert found[f"{name}_last_labels"][number] == response[stop - 1]
            number += 1
        place = {name: place[name] + len(response) for name, response in responses.items()}
    assert (
        number == len(found["same_beginning"]) and found["same_beginning"].any() and not found["same_beginning"].all()
    )


def test_a_group_that_ends_in_ids_which_do_not_match_is_compared_as_a_whole():
    """As where the teacher spells a letter by its byte, and the match of the student's letter is the teacher's letter."""
    pair = SimpleNamespace(
        matches={5: 7}, groups=lambda ours, theirs: [TokenGroup((0, 1), (0, 1))], text=lambda *_: b""
    )
    items = [PairedText(0, TokenSequence([1], [5]), TokenSequence([1], [theirs])) for theirs in (7, 8)]
    assert grouped(items, pair)["same_beginning"].tolist() == [True, False]


def test_a_sampled_answer_is_read_again_by_the_teacher(models):
    (example,) = paired_examples(["unused"], models)
    tokenizer, other = models.tokenizer, models.tokenizers.teacher
    said = "the cat </s> 日本"  # what ends answers of the teacher is text here
    ids = tokenizer(said).input_ids
    ended = read_again(
        example, Answer(example.prompt_ids, [*ids, tokenizer.eos_token_id], True, None), models.tokenizers
    )
    assert ended.sampled and ended.sequence.response == [*ids, tokenizer.eos_token_id]
    assert ended.teacher.prompt == example.other.ids
    assert ended.teacher.response[-1] == other.eos_token_id and other.eos_token_id not in ended.teacher.response[:-1]
    assert other.decode(ended.teacher.response[:-1]) == said
    cut = read_again(example, Answer(example.prompt_ids, ids, False, None), models.tokenizers)
    assert cut.teacher.response == ended.teacher.response[:-1]
    # half of a character is no text; its bytes are in no group, and what is before them is
    half = read_again(example, Answer(example.prompt_ids, ids[:-1], False, None), models.tokenizers)
    groups = models.tokenizers.groups(half.sequence.response, half.teacher.response)
    assert 0 < groups[-1].student[1] <= len(ids) - 3


def test_on_policy_steps_sample_and_have_no_cross_entropy(models, tmp_path):
    method, items, data = made(models, tmp_path, rollout={"max_new_tokens": 5}, on_policy=1.0, ce_coef=3.0)
    assert all(item.sampled and 0 < len(item.sequence.response) <= 5 for item in items)
    (term,) = method.terms(items, data, models)
    loss, metrics = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch")(term)
    weight = len(models.tokenizers.matches) / 257
    parts = weight * metrics["matched_divergence_nats"] + (1 - weight) * metrics["unmatched_distance"]
    assert loss.item() == pytest.approx(parts.item(), rel=1e-4) and metrics["cross_entropy_nats"] > 0
    assert torch.autograd.grad(loss, models.student.lm_head.weight)[0].abs().max() > 0
    assert not any(item.sampled for item in made(models, tmp_path, on_policy=0.0)[1])


def test_keys_that_do_nothing_are_named():
    assert [key for key, *_ in GOLD(name="gold", matched_weight=0.0).idle_keys()] == ["beta"]
    assert [key for key, *_ in GOLD(name="gold", on_policy=1.0, ce_coef=1.0).idle_keys()] == ["ce_coef"]
    assert not [*GOLD(name="gold").idle_keys()]
    needs = GOLD(name="gold", on_policy=1.0).needs()
    assert (
        needs.samples == ("student",) and not needs.references and GOLD(name="gold", on_policy=0.0).needs().references
    )

"""The Evaluator: its numbers against eager ones on the very answers it sampled, and what it samples when."""

import itertools
import math
import statistics
from dataclasses import replace

import pytest
import torch

from minillm.config.evaluation import EvalConfig
from minillm.data.instructions import Example, PromptSet
from minillm.evaluate.evaluator import Evaluation, Evaluator
from minillm.evaluate.rouge import rouge_l
from minillm.models.batch import TokenSequence
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models


def example(index: int, prompt: list[int], *references: str, response: tuple[int, ...] = ()) -> Example:
    return Example(
        index=index, prompt_ids=prompt, response_ids=list(response), prompt=f"prompt {index}", references=references
    )


def prompt_set(*examples: Example) -> PromptSet:
    return PromptSet(examples=list(examples), dropped_long=0, source="made up")


@pytest.fixture
def words() -> PromptSet:
    return prompt_set(
        example(0, [3, 4, 5], "w6 w7", response=(6, 7, 0)),
        example(1, [8], "nothing", "w1 w2 w3", response=(2, 2, 2)),
        example(5, [9, 10], "w9", response=(9, 0)),
    )


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """Every call of sample: who, sampling, seed, keys and the answers."""
    made, real = [], LocalRollouts.sample

    def spy(rollouts, prompts, sampling, **options):
        answers = real(rollouts, prompts, sampling, **options)
        made.append({"sampling": sampling, "answers": answers, **options})
        return answers

    monkeypatch.setattr(LocalRollouts, "sample", spy)
    return made


def make(sets, *, seed: int = 3, **config) -> Evaluator:
    return Evaluator(sets, EvalConfig(**{"max_new_tokens": 6, "batch_size": 2, **config}), seed=seed)


def evaluate(evaluator: Evaluator, models: Models, who: str = "student") -> Evaluation:
    return evaluator.evaluate(models, LocalRollouts(models), who)


def answered(prompts: PromptSet, answers) -> list[TokenSequence]:
    return [
        TokenSequence(one.prompt_ids, answer.response) for one, answer in zip(prompts.examples, answers, strict=True)
    ]


def test_every_metric_is_what_full_logits_say_of_the_sampled_answers(make_models, eager_logprobs, words, calls):
    models = make_models()
    found = evaluate(make({"words": words}, bits_per_byte=True), models)
    by_whom = {call["who"]: answered(words, call["answers"]) for call in calls}
    assert sorted(by_whom) == ["student", "teacher"] and len(calls) == 2

    def both(sequence):
        return eager_logprobs(models.student, sequence), eager_logprobs(models.teacher.model, sequence)

    reverse = [(q.exp() * (q - p)).sum(1) for q, p in map(both, by_whom["student"])]
    forward = [(p.exp() * (p - q)).sum(1) for q, p in map(both, by_whom["teacher"])]
    entropy = [-(q.exp() * q).sum(1) for q, _ in map(both, by_whom["student"])]
    references = [TokenSequence(one.prompt_ids, one.response_ids) for one in words.examples]
    losses = [-both(one)[0].gather(1, torch.tensor(one.response)[:, None]) for one in references]
    written = "".join(" ".join(f"w{i}" for i in one.response if i) for one in references)
    responses = [sequence.response for sequence in by_whom["student"]]
    texts = [" ".join(f"w{i}" for i in response if i) for response in responses]
    scored = [(text, one.references) for text, one in zip(texts, words.examples, strict=True)]
    expected = {
        "reverse_kl_nats": torch.cat(reverse).mean().item(),
        "sequence_reverse_kl_nats": statistics.fmean(vector.sum().item() for vector in reverse),
        "forward_kl_nats": torch.cat(forward).mean().item(),
        "entropy_nats": torch.cat(entropy).mean().item(),
        "loss_nats": torch.cat(losses).mean().item(),
        "loss_bits_per_byte": torch.cat(losses).sum().item() / math.log(2) / len(written.encode()),
        "length_tokens": statistics.fmean(len(response) for response in responses),
        "ended_share": statistics.fmean(response[-1] == 0 for response in responses),
        "rouge_l": statistics.fmean(rouge_l(text, references) for text, references in scored),
        "exact_match": 100 * statistics.fmean(text in references for text, references in scored),
    }
    assert found.sets["words"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert found.mean == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_sequence_reverse_kl_is_that_of_the_enumerated_language_model(make_models, eager_logprobs):
    models, length, count = make_models(vocab_size=4), 3, 600
    prompt, exact, variance = [2], 0.0, 0.0
    for response in itertools.product(range(4), repeat=length):
        ended = response.index(0) + 1 if 0 in response else length
        if any(response[ended:]):
            continue  # after its EOS an answer goes on no further: only one continuation stands for it
        sequence = TokenSequence(prompt, list(response[:ended]))
        q, p = (eager_logprobs(model, sequence, 4) for model in (models.student, models.teacher.model))
        chosen = torch.tensor(sequence.response)[:, None]
        probability = q.gather(1, chosen).sum().exp().item()
        # KL of the joint distributions: the expected log-ratio of a whole answer
        exact += probability * (q - p).gather(1, chosen).sum().item()
        variance += probability * ((q.exp() * (q - p)).sum() ** 2).item()
    prompts = prompt_set(*(example(index, prompt) for index in range(count)))
    found = evaluate(make({"tiny": prompts}, max_new_tokens=length, batch_size=200), models).mean
    assert exact > 0.1  # or there would be nothing to measure
    assert abs(found["sequence_reverse_kl_nats"] - exact) < 4 * math.sqrt(variance / count)


def test_a_student_that_is_its_teacher_is_at_no_distance(make_models, words):
    models = make_models()
    models = replace(models, teacher=LocalTeacher(models.student))
    found = evaluate(make({"words": words}), models).mean
    assert found["reverse_kl_nats"] == pytest.approx(0, abs=1e-5)
    assert found["forward_kl_nats"] == pytest.approx(0, abs=1e-5)
    assert found["entropy_nats"] > 0.1


def test_answers_that_are_not_neutral_are_not_what_divergences_are_measured_on(make_models, words, calls):
    evaluate(make({"words": words}, temperature=0.0, seeds=[1, 2], samples=2), make_models())
    made = [(call["who"], call["sampling"].temperature, len(call["answers"])) for call in calls]
    assert sorted(made) == [
        ("student", 0.0, 3),  # scored, once a seed
        ("student", 0.0, 3),
        ("student", 1.0, 3),  # for reverse KL and entropy
        ("teacher", 0.0, 2),  # shown in the samples
        ("teacher", 1.0, 3),  # for the forward KL
    ]


def test_the_teacher_answers_once_and_runs_no_more_for_the_forward_kl(make_models, words, calls):
    models, evaluator = make_models(), make({"words": words})
    first = evaluate(evaluator, models)
    forwards = []
    models.teacher.model.model.register_forward_hook(lambda *_: forwards.append(1))
    del calls[:]
    again = evaluate(evaluator, models)
    assert [call["who"] for call in calls] == ["student"]
    assert len(forwards) == 2  # micro-batches of the reverse KL: three answers, two at a time
    assert again.mean == first.mean and again.samples == first.samples


def test_a_teacher_that_changes_answers_anew(make_models, eager_logprobs, words, calls):
    models = make_models()
    evaluator = Evaluator({"words": words}, EvalConfig(max_new_tokens=6, batch_size=2), seed=3, keeps_teacher=False)
    before = evaluate(evaluator, models).mean["forward_kl_nats"]
    with torch.no_grad():
        models.teacher.model.lm_head.weight.mul_(1.5)
    del calls[:]
    after = evaluate(evaluator, models).mean["forward_kl_nats"]
    assert [call["who"] for call in calls] == ["student", "teacher"]
    forward = []
    for sequence in answered(words, calls[1]["answers"]):
        q, p = (eager_logprobs(model, sequence) for model in (models.student, models.teacher.model))
        forward.append((p.exp() * (p - q)).sum(1))
    assert after == pytest.approx(torch.cat(forward).mean().item(), rel=1e-4) != pytest.approx(before, rel=1e-2)


def test_of_a_teacher_that_cannot_answer_the_divergences_on_the_students_samples_are_left(make_models, words, calls):
    whole, models = make_models(), make_models()
    models.teacher.abilities = frozenset({"hidden", "read"})
    found, expected = evaluate(make({"words": words}), models), evaluate(make({"words": words}), whole)
    assert found.mean == {name: value for name, value in expected.mean.items() if name != "forward_kl_nats"}
    assert [call["who"] for call in calls] == ["student", "student", "teacher"]
    assert all("teacher" not in record for record in found.samples)
    with pytest.raises(ValueError, match="needs a teacher that can be evaluated itself, which LocalTeacher cannot"):
        evaluate(make({"words": words}), models, who="teacher")


def test_noise_depends_on_run_seed_and_set_alone(make_models, words, calls):
    models = make_models(teacher=False)
    evaluate(make({"a": words, "b": words}, seeds=[1, 2]), models)
    evaluate(make({"a": words, "b": words}, seeds=[1, 2]), models)
    evaluate(make({"a": words}, seeds=[1], seed=4), models)
    seeds = [call["seed"] for call in calls]
    assert seeds[:4] == seeds[4:8] and len(set(seeds[:4] + seeds[8:])) == 5
    assert all(list(call["keys"]) == [0, 1, 5] for call in calls)


def test_seeds_give_means_and_deviations(make_models, words, calls):
    found = evaluate(make({"words": words}, seeds=[1, 2, 3]), make_models()).sets["words"]
    drawn = [call["answers"] for call in calls if call["who"] == "student"]
    lengths = [statistics.fmean(len(answer.response) for answer in answers) for answers in drawn]
    assert len(lengths) == 3 and len(set(lengths)) > 1
    assert found["length_tokens"] == pytest.approx(statistics.fmean(lengths))
    assert found["length_tokens_std"] == pytest.approx(statistics.stdev(lengths))
    assert found["reverse_kl_nats_std"] > 0
    assert "loss_nats_std" not in found and "forward_kl_nats_std" not in found  # measured once


def test_a_reference_that_was_cut_off_has_no_end_to_leave_out(make_models, words):
    found = evaluate(make({"words": words}, length_buckets=[1, 2]), make_models()).sets["words"]
    assert {name for name in found if name.startswith("rouge_l_")} == {"rouge_l_0_1", "rouge_l_2_2", "rouge_l_3_up"}


def test_what_cannot_be_measured_is_absent(make_models):
    bare = prompt_set(example(0, [3, 4]))
    found = evaluate(make({"bare": bare}), make_models(teacher=False)).mean
    assert sorted(found) == ["ended_share", "entropy_nats", "length_tokens"]
    assert evaluate(make({"bare": bare}, teacher=False), make_models()).mean.keys() == found.keys()


def test_examples_without_references_are_left_out_of_the_scores(make_models, words, calls):
    mixed = prompt_set(*words.examples, example(7, [3, 4]))
    found = evaluate(make({"mixed": mixed}), make_models(teacher=False)).mean
    texts = [" ".join(f"w{i}" for i in answer.response if i) for answer in calls[0]["answers"]]
    scores = [rouge_l(text, one.references) for text, one in zip(texts, words.examples, strict=False)]
    assert found["rouge_l"] == pytest.approx(statistics.fmean(scores))


def test_the_mean_is_over_the_sets_that_have_the_metric(make_models, words):
    sets = {"words": words, "bare": prompt_set(example(0, [3, 4]))}
    found = evaluate(make(sets, seeds=[1, 2]), make_models())
    entropies = [found.sets[name]["entropy_nats"] for name in sets]
    assert found.mean["entropy_nats"] == pytest.approx(statistics.fmean(entropies))
    assert found.mean["rouge_l"] == found.sets["words"]["rouge_l"]
    assert found.mean["rouge_l_std"] == found.sets["words"]["rouge_l_std"]


def test_the_teacher_itself(make_models, eager_logprobs, words, calls):
    models, evaluator = make_models(), make({"words": words})
    evaluate(evaluator, models)
    answers = answered(words, next(call["answers"] for call in calls if call["who"] == "teacher"))
    del calls[:]
    found = evaluate(evaluator, models, who="teacher")
    assert not calls  # its answers are there already
    entropy = [-(p.exp() * p).sum(1) for p in (eager_logprobs(models.teacher.model, one) for one in answers)]
    assert found.mean["entropy_nats"] == pytest.approx(torch.cat(entropy).mean().item(), rel=1e-4)
    assert found.mean["length_tokens"] == statistics.fmean(len(one.response) for one in answers)
    assert {"rouge_l", "loss_nats"} <= found.mean.keys()
    assert not {"reverse_kl_nats", "forward_kl_nats"} & found.mean.keys()
    with pytest.raises(ValueError, match="evaluating the teacher needs a teacher, and there is none"):
        evaluate(evaluator, make_models(teacher=False), who="teacher")


def test_samples_show_prompt_reference_answer_and_teacher(make_models, words, calls):
    found = evaluate(make({"words": words}, samples=2), make_models()).samples
    student, teacher = (next(call["answers"] for call in calls if call["who"] == who) for who in ("student", "teacher"))
    assert [(one["set"], one["index"], one["prompt"], one["reference"]) for one in found] == [
        ("words", 0, "prompt 0", "w6 w7"),
        ("words", 1, "prompt 1", "nothing"),
    ]
    for record, answer, beside in zip(found, student, teacher, strict=False):
        assert record["answer"] == " ".join(f"w{i}" for i in answer.response if i != 0)
        assert record["teacher"] == " ".join(f"w{i}" for i in beside.response if i != 0)
        assert record["teacher_ended"] == (beside.response[-1] == 0)
        assert (record["length_tokens"], record["ended"]) == (len(answer.response), answer.response[-1] == 0)


def test_a_set_without_prompts_is_named():
    with pytest.raises(ValueError, match=r"eval\.sets\.empty"):
        make({"empty": prompt_set()})


def test_in_a_set_with_a_context_the_distance_is_from_the_teacher_that_reads_it(
    make_models, eager_logprobs, words, calls
):
    models = make_models()
    told = prompt_set(
        *(replace(one, teacher_prompt="told", teacher_prompt_ids=[11, 12, *one.prompt_ids]) for one in words)
    )
    found = evaluate(make({"words": told}), models)
    by_whom = {call["who"]: call["answers"] for call in calls}
    assert [one.prompt for one in by_whom["teacher"]] == [one.teacher_prompt_ids for one in told]

    def both(one, answer):
        q = eager_logprobs(models.student, TokenSequence(one.prompt_ids, answer.response))
        return q, eager_logprobs(models.teacher.model, TokenSequence(one.teacher_prompt_ids, answer.response))

    q, p = map(torch.cat, zip(*map(both, told, by_whom["student"]), strict=True))
    assert found.mean["reverse_kl_nats"] == pytest.approx((q.exp() * (q - p)).sum(1).mean().item(), rel=1e-4)
    q, p = map(torch.cat, zip(*map(both, told, by_whom["teacher"]), strict=True))
    assert found.mean["forward_kl_nats"] == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-4)
    assert [one["teacher_prompt"] for one in found.samples] == ["told"] * 3

    judged = evaluate(make({"words": told}), models, "teacher").mean
    own = [TokenSequence(one.teacher_prompt_ids, one.response_ids) for one in told]
    surprise = [
        -eager_logprobs(models.teacher.model, one).gather(1, torch.tensor(one.response)[:, None]) for one in own
    ]
    assert judged["loss_nats"] == pytest.approx(torch.cat(surprise).mean().item(), rel=1e-4)


def test_answers_are_sampled_as_the_keys_say(make_models, words, calls):
    models, plain = make_models(), {"top_p": 1.0, "top_k": 0, "no_repeat_ngram_size": 0}
    for keys in (
        plain,
        {"temperature": 0.7, "top_p": 0.5, "top_k": 3, "no_repeat_ngram_size": 2},
        {"temperature": 0.0},
    ):
        calls.clear()
        evaluate(make({"words": words}, **keys), models)
        wanted = {**plain, "temperature": 1.0, "max_new_tokens": 6, **keys}
        assert {name: getattr(calls[0]["sampling"], name) for name in wanted} == wanted

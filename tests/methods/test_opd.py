"""opd against formulas in float64 on full logits, its task reward, broken runs, two ranks, and what the report shows."""

import importlib.util
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from minillm import UserError
from minillm.config.methods.opd_keys import OPD
from minillm.config.root import StageConfig
from minillm.data.instructions import Example
from minillm.data.stream import Stream
from minillm.engine.module import TermLoss
from minillm.engine.torch import TorchEngine
from minillm.losses import TokenStats
from minillm.methods import build_method
from minillm.methods.opd import policy_objective
from minillm.methods.protocol import Observation, TrainingData
from minillm.rollout.buffer import Rollout, RolloutBuffer
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.noise import distinct_keys
from minillm.rollout.rollouts import Sampling
from tests.methods.conftest import SHOWN, assert_same_run, stage_of, steps_of
from tests.runs import in_a_child, panels, train

ROOT = Path(__file__).parents[2]
# a reward that depends on everything that it is given, and differs from answer to answer
JUDGE = """
def judge(prompt, answer, record):
    return sum(map(ord, answer)) / 999 - len(record["references"]) + record["index"] / 4 - ("?" in prompt)
"""


def stage(*, temperature: float = 1.0, **method) -> StageConfig:
    rollout = {"buffer_size": 6, "batch_size": 4, "max_new_tokens": 7, "temperature": temperature}
    return stage_of(6, rollout=rollout, name="opd", **method)


@pytest.fixture
def data(models, tmp_path):
    examples = [
        Example(i, [60 + i, 70, 71 + i][: 1 + i % 3], [90], "why?"[i % 2 :][:4], ("a", "b")[: i % 3]) for i in range(6)
    ]
    return TrainingData(Stream(examples, seed=1), None, LocalRollouts(models), tmp_path)


@pytest.fixture
def judge(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(JUDGE)
    return f"{path}:judge"


def token_log_probs(model, item, temperature=1.0):  # -> (T,) float64
    """Log-probabilities of the tokens of an answer under a model in float64, from one unpadded sequence."""
    ids, first = torch.tensor([item.prompt + item.response]), len(item.prompt) - 1
    logits = model(ids).logits[0, first:-1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(item.response)[:, None])[:, 0]


def answer_rewards(buffer, data, models):
    """JUDGE of every answer, written once more."""
    examples = {example.index: example for example in data.prompts.items}
    rewards = []
    for item in buffer:
        example = examples[item.key]
        text = models.tokenizer.decode([token for token in item.response if token not in models.eos_ids])
        rewards.append(sum(map(ord, text)) / 999 - len(example.references) + item.key / 4 - ("?" in example.prompt))
    return rewards


@pytest.mark.parametrize(
    ("cliprange", "weight", "temperature"),
    [(None, None, 1.0), (0.1, None, 1.0), (None, 0.5, 1.0), (0.1, 0.5, 1.0), (None, None, 1.5), (0.1, 0.5, 0.7)],
)
def test_loss_and_gradient_are_those_of_full_logits_in_float64(cliprange, weight, temperature, models, data, judge):
    rewarded = {} if weight is None else {"task_reward": judge, "task_reward_weight": weight}
    method = build_method(stage(cliprange=cliprange, temperature=temperature, **rewarded))
    buffer = method.collect(data, models, draw=0)
    student, teacher = models.student, models.teacher.model
    rewards = [0.0] * len(buffer) if weight is None else answer_rewards(buffer, data, models)
    assert weight is None or len(set(rewards)) > 2
    student.double(), teacher.double()
    with torch.no_grad():
        old, judged = ([token_log_probs(model, item) for item in buffer] for model in (student, teacher))
        drawn = [token_log_probs(student, item, temperature) for item in buffer]
    student.float(), teacher.float()
    # the weights move between collecting and the step: from the second step of a buffer on, q is not q_old
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)

    (term,) = method.terms(list(buffer), data, models)
    total, metrics = TermLoss(student, vocab_size=models.vocab_size, backend="torch")(term)
    loss = total * term.weight / term.count
    found = torch.autograd.grad(loss, list(student.parameters()))

    student.double()
    want, tokens, silenced, ratios = 0.0, 0, 0, 0.0
    for item, before, of_teacher, sampled, reward in zip(buffer, old, judged, drawn, rewards, strict=True):
        now = token_log_probs(student, item)
        for t in range(len(item.response)):
            advantage = float(of_teacher[t] - before[t]) + (weight or 0.0) * reward
            advantage *= (before[t] - sampled[t]).exp().item()
            ratio = (now[t] - before[t]).exp()
            ratios += ratio.item()
            token = -advantage * ratio
            if cliprange is not None:  # no gradient where the ratio has gone too far in the direction of the advantage
                too_far = ratio > 1 + cliprange if advantage > 0 else ratio < 1 - cliprange
                token = -advantage * ratio.clamp(1 - cliprange, 1 + cliprange) if too_far else token
                silenced += bool(too_far)
            want, tokens = want + token, tokens + 1
    want = want / tokens
    gradients = torch.autograd.grad(want, list(student.parameters()))
    student.float()
    assert tokens > len(buffer)
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    assert metrics["policy_ratio"].item() == pytest.approx(ratios, rel=1e-4)
    for ours, theirs in zip(found, gradients, strict=True):
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-3, atol=2e-5 * float(theirs.abs().max()) + 1e-7)
    if cliprange is None:
        assert "clipped_share" not in metrics
    else:
        assert 0 < silenced < tokens and metrics["clipped_share"].item() == silenced


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("cliprange", [None, 0.2])
def test_its_expected_gradient_is_that_of_the_reverse_kl(cliprange, temperature):
    """Over all tokens v, each as often as s samples it: sum_v s(v) * loss(v) has the gradient of KL(q || p), also with a
    clip range, since no weight is in the ratio that it clips; at a temperature the gradient is another one without it."""
    generator = torch.Generator().manual_seed(1)
    z, target = (torch.randn(50, dtype=torch.float64, generator=generator) for _ in range(2))
    log_p = target.log_softmax(-1)
    z.requires_grad_(True)
    old, drawn = z.detach().log_softmax(-1), (z.detach() / temperature).log_softmax(-1)
    vectors = {"student_logprob": old, "teacher_logprob": log_p, "mixture_logprob": drawn}
    buffer = RolloutBuffer([Rollout(0, [1], list(range(50)), True, dict(vectors), {}, {})])
    method = build_method(stage(temperature=temperature, cliprange=cliprange))
    method._keep_advantages(buffer, None)

    def gradient(advantage):
        stats = TokenStats({"student_logprob": z.log_softmax(-1)})
        loss, _ = policy_objective(cliprange)(stats, advantage=advantage, old_logprob=old)
        return torch.autograd.grad((drawn.exp() * loss).sum(), z)[0]

    log_q = z.log_softmax(-1)
    (want,) = torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), z)
    torch.testing.assert_close(gradient(buffer[0].vectors["advantage"].double()), want, rtol=1e-5, atol=1e-7)
    unweighted = gradient(log_p - old)
    assert torch.allclose(unweighted, want, rtol=1e-5, atol=1e-7) == (temperature == 1.0)


def test_answers_are_the_students_own_and_scored_by_prompt(asked, monkeypatch):
    one, scored = asked(name="opd"), []

    def score(models, answers, *, keys, judges, batch_size):
        scored.append((models, answers, keys, batch_size))
        raise InterruptedError

    monkeypatch.setattr("minillm.methods.opd.score", score)
    with pytest.raises(InterruptedError):
        build_method(one.config).collect(one.data, "models", draw=3)
    (call,) = one.calls
    numbers = [prompt[0] - 20 for prompt in call["prompts"]]  # Example 40 + i begins with token 60 + i
    assert call["sampling"] == Sampling(9) and call.get("who", "student") == "student"
    assert (call["seed"], call["draw"], call["batch_size"]) == (7, 3, 2) and call["extras"] == [SHOWN] * 5
    assert call["keys"] == distinct_keys(numbers) and len(set(numbers)) == 3
    ((models, answers, keys, batch_size),) = scored
    assert models == "models" and keys == numbers and batch_size == 2
    assert [answer.response[0] for answer in answers] == [key % 200 for key in call["keys"]]


def test_a_step_needs_no_more_of_the_teacher_than_the_advantages(models, data, monkeypatch):
    method = build_method(stage())
    buffer = method.collect(data, models, draw=0)
    assert not any("teacher" in name for name in buffer.state())
    assert {tuple(item.vectors) for item in buffer} == {("advantage", "old_logprob")}
    monkeypatch.setattr(models.teacher.model.model, "forward", lambda *a, **k: pytest.fail("the teacher was run again"))
    kept = RolloutBuffer.from_state(buffer.state())
    ours, theirs = (method.terms(list(one), data, models)[0] for one in (kept, buffer))
    assert ours.count == theirs.count == sum(len(item.response) for item in buffer)
    assert all(torch.equal(ours.inputs[name], theirs.inputs[name]) for name in theirs.inputs)


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_it_records_the_reverse_kl_and_the_reward_of_its_answers(temperature, models, data, judge):
    method = build_method(stage(temperature=temperature, task_reward=judge, task_reward_weight=0.0))
    buffer = method.collect(data, models, draw=0)
    found = method.observe(Observation("step", {}, 1))
    assert set(OPD.panels) < set(found)
    # of weight 0 the reward is measured, and no part of an advantage
    advantages = torch.cat([item.vectors["advantage"] for item in buffer]).double()
    assert found["sampled_reverse_kl_nats"] == pytest.approx(-advantages.mean().item(), rel=1e-5)
    rewards = answer_rewards(buffer, data, models)
    assert found["task_reward"] == pytest.approx(sum(rewards) / len(rewards))
    with torch.no_grad():
        exact = []
        for item in buffer:
            ids, first = torch.tensor([item.prompt + item.response]), len(item.prompt) - 1
            log_q, log_p = (
                model(ids).logits[0, first:-1].double().log_softmax(-1)
                for model in (models.student, models.teacher.model)
            )
            exact.append((log_q.exp() * (log_q - log_p)).sum(-1))
    assert found["reverse_kl_nats"] == pytest.approx(torch.cat(exact).mean().item(), rel=1e-4)
    restored = build_method(stage(task_reward=judge))
    restored.load_state_dict(method.state_dict())
    assert restored.observe(Observation("step", {}, 2)) == found
    assert method.observe(Observation("evaluation", {}, 2)) == {}


@pytest.mark.parametrize(
    "body, message",
    [
        (
            "return None",
            r"returned None \(NoneType\) for an answer to prompt \d of data.prompts; it must return a finite",
        ),
        ("return 'good'", r"returned 'good' \(str\)"),
        ("return float('nan')", r"returned nan \(float\)"),
        ("return float('inf')", r"returned inf \(float\)"),
        (
            "return 1 / 0",
            r"raised ZeroDivisionError for .* prompt \d .*: division by zero \(.*wrong.py, line 2\); it must return",
        ),
    ],
)
def test_a_reward_that_is_no_number_is_said_before_anything_is_sampled(body, message, models, data, tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(f"def judge(prompt, answer, record):\n    {body}\n")
    method = build_method(stage(task_reward=f"{path}:judge"))
    data.rollouts.sample = lambda *arguments, **keys: pytest.fail("sampled")
    with pytest.raises(UserError, match=rf"^method\.task_reward: {path}:judge {message}"):
        method.collect(data, models, draw=0)


def test_a_reward_that_fails_at_one_answer_names_its_prompt(models, data, tmp_path):
    path = tmp_path / "picky.py"
    path.write_text("calls = []\ndef judge(prompt, answer, record):\n    calls.append(record)\n"
                    "    return 1.0 if len(calls) < 4 else record['index'] * float('nan')\n")  # fmt: skip
    method = build_method(stage(task_reward=f"{path}:judge"))
    order = [example.index for example in Stream(data.prompts.items, seed=1).take(3)]
    with pytest.raises(UserError, match=f"for an answer to prompt {order[2] + 1} of data.prompts"):
        method.collect(data, models, draw=0)


@pytest.mark.parametrize("reward", [True, 2, np.float32(0.5)])
def test_whatever_is_a_number_is_a_reward(reward, models, data, tmp_path):
    method = build_method(stage())
    method.task_reward = lambda prompt, answer, record: reward
    plain = [item.vectors["advantage"] for item in build_method(stage()).collect(data, models, draw=0)]
    again = TrainingData(Stream(data.prompts.items, seed=1), None, LocalRollouts(models), tmp_path)
    found = [item.vectors["advantage"] for item in method.collect(again, models, draw=0)]
    for with_reward, without in zip(found, plain, strict=True):
        torch.testing.assert_close(with_reward, without + float(reward), rtol=0, atol=1e-5)


def test_keys_that_are_wrong_or_do_nothing_are_named(judge):
    assert [*OPD(name="opd", task_reward=judge).findings(), *OPD(name="opd", task_reward=judge).idle_keys()] == []
    assert [key for key, *_ in OPD(name="opd").idle_keys()] == ["task_reward_weight"]
    assert [key for key, *_ in OPD(name="opd", task_reward="").findings()] == ["task_reward"]
    ((key, message, _),) = OPD(name="opd", task_reward=judge.replace("judge", "jugde")).findings()
    assert key == "task_reward" and "did you mean judge?" in message


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_run) -> Path:
    """A run of five steps, three buffers; beside it `calls`, a file with a dot for every reward."""
    folder = tmp_path_factory.mktemp("opd")
    text = JUDGE.replace("    return ", f"    open({str(folder / 'calls')!r}, 'a').write('.')\n    return ")
    (folder / "rewards.py").write_text(text)
    document = small_run(folder, layers=1)
    del document["eval"]
    # with a large epsilon AdamW does not turn a gradient that is rounding into a whole step
    document["train"] |= {"max_steps": 5, "adam_epsilon": 1e-3}
    document["stages"] = {
        "teacher": {"student": {"config": {"hidden_size": 24}}, "train": {"max_steps": 2}},
        "distil": {
            "teacher": {"path": "stage:teacher"},
            "method": {"name": "opd", "cliprange": 0.2, "task_reward": f"{folder}/rewards.py:judge"},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_a_run_that_was_killed_inside_a_buffer_goes_on_bit_for_bit(recipe, trained, tmp_path):
    broken = tmp_path / "broken"

    def work(*, dies_at: int = 0) -> int:
        def child():
            take = TorchEngine.step
            left = [dies_at]

            def step(*arguments):
                left[0] -= 1
                return os.kill(os.getpid(), signal.SIGKILL) if left[0] == 0 else take(*arguments)

            TorchEngine.step = step
            train(recipe, f"output_dir={broken}", "save.in_background=false", resume=broken.is_dir())

        return in_a_child(child)

    for dies_at, taken in ((4, 1), (3, 3)):  # a buffer is of two steps; the teacher's stage takes two before
        assert os.WIFSIGNALED(work(dies_at=dies_at)) and len(steps_of(broken, "distil")) == taken
    assert work() == 0
    assert_same_run(broken, trained)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_zero_3_take_the_same_steps_and_ask_once_for_a_reward(recipe, trained, request):
    calls = recipe.with_name("calls")
    calls.write_text("")
    two = request.getfixturevalue("two_ranks")  # only now: the calls are counted
    for ours, theirs in zip(steps_of(two, "distil"), steps_of(trained, "distil"), strict=True):
        for key in ("loss", "policy_ratio", *OPD.panels):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
    assert len(calls.read_text()) == 3 * 4 + 1  # three buffers of four answers, and one call before the first


def test_the_picture_has_panels_of_its_own(trained):
    drawn, steps = panels(trained), steps_of(trained, "distil")
    for name, (title, _) in OPD.panels.items():
        assert [one[name] for one in steps] in [list(line.get_ydata()) for line in drawn[title]]
    assert len({one["task_reward"] for one in steps}) == 3  # one a buffer


def test_its_recipe_is_planned(monkeypatch):
    from minillm.config.loader.run_plan import load_run
    from minillm.planning.planner import plan_run

    monkeypatch.chdir(ROOT)
    stages = plan_run(load_run([Path("configs/opd.yaml")]), gpu="cpu").stages
    assert [term.name for term in stages[-1].work.terms] == ["policy"]
    assert "teacher" in stages[-1].work.scorings[0].models

"""step_by_step: the loss and gradients of full logits in float64, whole runs, and records without a label."""

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from minillm import UserError
from minillm.config.errors import ConfigErrors
from minillm.config.loader.run_plan import load_run
from minillm.config.methods.step_by_step_keys import Task
from minillm.config.root import StageConfig
from minillm.data.instructions import Example, load_prompts
from minillm.data.stream import Stream
from minillm.engine.module import TermLoss
from minillm.engine.step_sums import divisors
from minillm.methods import build_method
from minillm.methods.protocol import Observation, TrainingData
from minillm.models.batch import TokenSequence
from minillm.models.tokenizers import byte_tokenizer
from minillm.planning.planner import plan_run
from minillm.planning.work import work_of
from minillm.reporting.rationale_report import rationale_sections
from minillm.rollout.rollouts import Answer, Sampling
from tests.methods.conftest import RecordingRollouts, steps_of
from tests.runs import in_a_child, panels, records, train

ROOT = Path(__file__).parents[2]
WEIGHTS = {"label": 0.7, "rationale": 0.4, "both": 1.5}
# answers of different lengths, so that one mean over all tokens is another number; the second record has no label
ANSWERS = [
    {"label": [90], "rationale": [91, 92, 93, 94, 95], "both": [91, 92]},
    {"label": [], "rationale": [96, 97, 98], "both": [93]},
    {"label": [99, 100], "rationale": [101, 102], "both": [94, 95, 96]},
    {"label": [103], "rationale": [104, 105, 106, 107], "both": [97]},
]


def method(*, size: int = 4):
    tasks = {name: Task(prefix=f"{name}: ", answer="{label}", weight=weight) for name, weight in WEIGHTS.items()}
    return build_method(
        StageConfig(
            output_dir="unused",
            student={"path": "unused"},
            method={"name": "step_by_step", "tasks": {name: task.model_dump() for name, task in tasks.items()}},
            train={"max_steps": 1, "per_device_train_batch_size": size},
        )
    )


@pytest.fixture
def data(tmp_path):
    examples = [
        Example(
            index, [60], [], "", (), tasks=
            {name: TokenSequence([60 + index, 70, *range(place)], answer, index) for place, (name, answer) in
             enumerate(answers.items())},
        )
        for index, answers in enumerate(ANSWERS)
    ]  # fmt: skip
    return TrainingData(Stream(examples, seed=1), None, RecordingRollouts(), tmp_path)


def loss_of(terms, models):
    """The loss of micro-batches as an engine adds it up, and the sums of the metrics."""
    side = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch")
    divided_by = divisors(terms)
    loss, sums = torch.zeros(()), {}
    for term in terms:
        one, metrics = side(term)
        loss = loss + term.weight * one / (divided_by[term.name] or 1.0)
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    return loss, sums


@pytest.mark.parametrize("micro_batch", [4, 1], ids=["at_once", "record_by_record"])  # one record has no label
def test_loss_and_gradients_are_those_of_full_logits_in_float64(micro_batch, make_models, data):
    models, subject = make_models(teacher=False), method()
    items = subject.collect(data, models, draw=0)
    assert sorted(item.key for item in items) == [0, 1, 2, 3]
    parts = [items[start : start + micro_batch] for start in range(0, 4, micro_batch)]
    loss, sums = loss_of([term for part in parts for term in subject.terms(part, data, models)], models)
    found = torch.autograd.grad(loss, list(models.student.parameters()))

    student = models.student.double()
    try:
        want, means = torch.zeros((), dtype=torch.float64), {}
        for place, (name, weight) in enumerate(WEIGHTS.items()):
            tokens = []
            for index, answers in enumerate(ANSWERS):
                prompt, answer = [60 + index, 70, *range(place)], answers[name]
                log_q = student(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
                tokens += [-log_q[len(prompt) - 1 + t, token] for t, token in enumerate(answer)]
            means[name] = torch.stack(tokens).mean()
            want = want + weight * means[name]
        gradients = torch.autograd.grad(want, list(student.parameters()))
    finally:
        student.float()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for name in WEIGHTS:
        count = sum(len(answers[name]) for answers in ANSWERS)
        assert sums[f"cross_entropy_nats/{name}"] / count == pytest.approx(means[name].item(), rel=1e-5)
    scale = max(one.abs().max().item() for one in gradients)
    assert scale > 1e-3
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5 * scale)


def test_records_without_an_answer_are_counted(data, make_models):
    subject = method()
    subject.collect(data, None, draw=0)
    said = subject.observe(Observation("step", {}, 1))
    assert said == {
        "unanswered_percent/label": 25.0,
        "unanswered_percent/rationale": 0.0,
        "unanswered_percent/both": 0.0,
    }


def test_a_step_without_any_label_trains_the_other_tasks(data, make_models):
    models, subject = make_models(teacher=False), method(size=1)
    (bare,) = [item for _ in range(4) for item in subject.collect(data, models, draw=0) if item.key == 1]
    terms = {term.name: term for term in subject.terms([bare], data, models)}
    loss, _ = loss_of(list(terms.values()), models)
    others, _ = loss_of([terms["rationale"], terms["both"]], models)
    assert terms["label"].count == 0 and loss.item() == others.item() > 1
    assert all(one.isfinite().all() for one in torch.autograd.grad(loss, list(models.student.parameters())))


ASKS = {"prompt": "Q: 1 + 1\nA: 1 and 1. #### 2\n\nQ: {question}\nA:", "parser": "gsm8k", "stop": ["\n\nQ:"]}


@dataclass
class Scripted(RecordingRollouts):
    """Answers by the key of the prompt, and counts the calls."""

    texts: dict[int, str] = field(default_factory=dict)

    def sample(self, prompts, sampling, *, keys, **arguments):
        super().sample(prompts, sampling, keys=keys, **arguments)
        ids = [[*byte_tokenizer()(self.texts[key]).input_ids, 256] for key in keys]
        return [Answer(prompt, one, True, torch.zeros(len(one))) for prompt, one in zip(prompts, ids, strict=True)]


@pytest.fixture
def writing(make_models, tmp_path):
    """A function that collects three records of a stage whose teacher has written; and the models."""
    lines = [json.dumps({"question": f"{n} + {n}", "answer": f"theirs #### {n}"}) for n in range(3)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    texts = {0: " none. #### 0\n\nQ: 9 + 9\nA: no #### 18", 1: " I do not know", 2: "#### 4"}
    models, rollouts = make_models(), Scripted(texts=texts)

    def collect(**keys):
        asks = ASKS | keys.pop("few_shot", {})
        config = StageConfig(
            output_dir="unused", student={"path": "unused"}, teacher={"path": "large"},
            method={"name": "step_by_step", "rationales": "teacher", "few_shot": asks, **keys}, rollout={"max_new_tokens": 60},
            data={"prompts": {"path": str(tmp_path / "sums.jsonl"), "template": "none", "parser": "gsm8k"}},
            train={"max_steps": 1, "per_device_train_batch_size": 3},
        )  # fmt: skip
        needs = config.method.needs()
        options = {"tasks": needs.tasks, "few_shot": needs.few_shot, "written": needs.written}
        prompts = load_prompts(config.data.prompts, models.tokenizer, **options)
        data = TrainingData(Stream(prompts.examples, seed=1), None, rollouts, tmp_path / "written")
        records = build_method(config).collect(data, models, draw=0)
        decode = models.tokenizer.decode
        return {one.key: {name: decode(task.response) for name, task in one.tasks.items()} for one in records}

    return collect, rollouts, tmp_path


def test_what_the_teacher_wrote_takes_the_place_of_the_records_own_parts(writing):
    collect, rollouts, folder = writing
    end = byte_tokenizer().eos_token
    rationales = {0: "none." + end, 1: "", 2: ""}  # an empty rationale is an answer of nothing but its end
    labels = {0: f"0{end}", 1: "", 2: f"4{end}"}
    both = collect(labels="teacher")
    assert {key: one["label"] for key, one in both.items()} == labels
    assert {key: one["rationale"].removesuffix(end) for key, one in both.items()} == {
        key: text.removesuffix(end) for key, text in rationales.items()
    }
    (asked,) = rollouts.asked
    texts = [byte_tokenizer().decode(prompt) for prompt in asked["prompts"]]
    assert sorted(texts) == [f"Q: 1 + 1\nA: 1 and 1. #### 2\n\nQ: {n} + {n}\nA:" for n in range(3)]
    assert asked["who"] == "teacher" and asked["sampling"] == Sampling(60, 0.0)
    # the answers are found again, and a record keeps the label that it has
    own = collect()
    assert len(rollouts.asked) == 1
    assert {key: one["label"] for key, one in own.items()} == {n: f"{n}{end}" for n in range(3)}
    summary = json.loads((folder / "written" / "rationales.json").read_text())
    assert (summary["answers"], summary["without_rationale"], summary["without_label"]) == (3, 2, 1)
    assert [one["answer"] for one in summary["samples"]["unlabelled"]] == [" I do not know"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"few_shot": {"prompt": "{question}?"}}, "was written to another prompt"),
        ({"few_shot": {"temperature": 0.5}}, "were sampled with another sampling"),
    ],
)
def test_answers_to_other_words_are_not_taken(writing, keys, message):
    collect, _, _ = writing
    collect()
    with pytest.raises(UserError, match=message):
        collect(**keys)


def test_a_teacher_that_writes_is_planned(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides = ["method.rationales=teacher", "teacher.path=" + str(tmp_path), "rollout.max_new_tokens=40",
                 "method.few_shot={prompt: '{question}', parser: gsm8k, max_prompt_length: 77}"]  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 117}))
    (stage,) = load_run([Path("configs/step_by_step.yaml")], overrides).stages
    (decoding,) = work_of(stage.config, 1).decodings
    assert (decoding.models, decoding.prompt, decoding.answer, decoding.total) == (("teacher",), 77, 40, 0)
    with pytest.raises(ConfigErrors, match="41 tokens of answer after up to 77 of prompt .method.few_shot.max_prompt"):
        load_run([Path("configs/step_by_step.yaml")], [*overrides, "rollout.max_new_tokens=41"])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_run) -> Path:
    """A stage on the records' own rationales, and one on those that a teacher writes, which has learned how answers look."""
    folder = tmp_path_factory.mktemp("step_by_step")
    document = small_run(folder, layers=1)
    document["eval"] = {"sets": {}}
    texts = [f"add {n} and {n}. #### {2 * n}" if n % 3 else f"no label for {n}" for n in range(8)]
    lines = [json.dumps({"question": f"{n} + {n}", "answer": text}) for n, text in enumerate(texts)]
    (folder / "sums.jsonl").write_text("\n".join(lines))
    document["data"] = {"prompts": {"path": str(folder / "sums.jsonl"), "template": "none", "parser": "gsm8k",
                                    "max_prompt_length": 24, "max_response_length": 20}}  # fmt: skip
    learned = {"question": "Q: {question}\nA:", "answer": " so####7", "parser": None}
    shown = {"data": {"prompts": document["data"]["prompts"] | learned}, "save": {}}
    shown["train"] = {"max_steps": 35, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    (folder / "teacher.yaml").write_text(yaml.safe_dump(document | shown))
    assert in_a_child(lambda: train(folder / "teacher.yaml", f"output_dir={folder / 'teacher'}")) == 0

    document["train"] |= {"max_steps": 4, "learning_rate": 1e-3}
    document["rollout"] = {"batch_size": 4, "max_new_tokens": 12}
    document["method"] = {"name": "step_by_step"}
    asks = {"prompt": "Q: {question}\nA:", "parser": "gsm8k", "stop": ["\n"], "temperature": 1.0}
    document["stages"] = {
        "main": {},
        "written": {
            "teacher": {"path": str(folder / "teacher" / "final")},
            "method": {"rationales": "teacher", "labels": "teacher", "few_shot": {**asks, "max_prompt_length": 16}},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


KEYS = [f"{kind}/{task}" for kind in ("cross_entropy_nats", "unanswered_percent") for task in ("label", "rationale")]


def test_a_run_that_was_killed_goes_on_bit_for_bit(trained, killed, one_thread):
    broken, places = killed(first=24, later=7)
    assert {stage for stage, steps in places if 0 < steps < 4} == {"main", "written"}, places
    written = [(one / "written" / "written" / "answers.jsonl").read_text() for one in (broken, trained)]
    assert sorted(written[0].splitlines()) == sorted(written[1].splitlines())
    assert records(broken) == records(trained)
    ours, theirs = (load_file(one / "final" / "model.safetensors") for one in (broken, trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_zero_3_take_the_same_steps(trained, two_ranks):
    theirs = steps_of(trained, "main")
    assert {one["unanswered_percent/label"] for one in theirs} >= {
        50.0
    }  # a rank without a label beside one that has it
    for stage in ("main", "written"):
        for mine, other in zip(*(steps_of(folder, stage) for folder in (two_ranks, trained)), strict=True):
            for key in ("loss", "loss/label", "loss/rationale", *KEYS):
                assert mine.get(key) == pytest.approx(other.get(key), rel=1e-4, abs=1e-6), (stage, key)


def test_rationales_that_the_teacher_writes_are_trained_on_and_reported(trained):
    """What it wrote is read once more here, from the archive, by the words of the parser."""
    header, *lines = map(json.loads, (trained / "written" / "written" / "answers.jsonl").read_text().splitlines())
    assert header["teacher"]["path"].endswith("teacher/final") and header["sampling"]["temperature"] == 1.0
    texts = {one["key"]: byte_tokenizer().decode(one["response"], skip_special_tokens=True) for one in lines}
    labelled = [text for text in texts.values() if "####" in text.partition("\n")[0]]
    assert sorted(texts) == list(range(8)) and len(labelled) > 0
    steps = steps_of(trained, "written")
    counted = [one["unanswered_percent/label"] for one in steps]
    assert sum(counted) / len(counted) == pytest.approx(100 * (8 - len(labelled)) / 8)  # four steps of two
    assert any(one["cross_entropy_nats/rationale"] > 1 for one in steps)
    (section,) = rationale_sections(trained)
    assert section.startswith("## Rationales written for stage written\n\nThe teacher wrote 8 answers.")
    assert f"no label in {8 - len(labelled)} " in section and "| 1 + 1 |" in section and "### With a label" in section


def test_the_picture_has_the_loss_of_each_task_and_what_lacks_an_answer(trained):
    drawn, steps = panels(trained), steps_of(trained, "main")
    for task in ("label", "rationale"):
        for title, key in (
            (f"Cross-entropy of task {task}", f"cross_entropy_nats/{task}"),
            (f"Records without a {task}", f"unanswered_percent/{task}"),
        ):
            assert [one[key] for one in steps] in [list(line.get_ydata()) for line in drawn[title]], title


def test_its_recipe_is_planned(monkeypatch):
    monkeypatch.chdir(ROOT)
    work = plan_run(load_run([Path("configs/step_by_step.yaml")]), gpu="cpu").stages[-1].work
    assert [(one.name, one.batch, one.rows, one.teacher) for one in work.terms] == [
        ("label", 16, 16 * 48, False),
        ("rationale", 16, 16 * 48, False),
    ]

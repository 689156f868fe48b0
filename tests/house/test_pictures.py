"""Models of images and text from the data to an answer: trained by methods that do not know of pictures, resumed bit for
bit, asked about a picture; and the loss is that of the picture, to a value computed without any of this."""

import json
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from minillm.cli.eval import evaluate_model, evaluation_plan
from minillm.cli.generate import Answerer
from minillm.config.data import InstructionKeys, JsonlPrompts
from minillm.config.models import StudentConfig, TeacherConfig
from minillm.data.instructions import PromptSet, load_prompts
from minillm.engine.module import TermLoss
from minillm.evaluate.token_statistics import token_statistics
from minillm.methods.supervised import mixed_term
from minillm.models.batch import TokenSequence
from minillm.models.loading import load_student, load_teacher
from minillm.models.tokenizers import load_tokenizer
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Sampling
from minillm.rollout.scoring import score
from minillm.teachers.local import LocalTeacher
from minillm.teachers.open import open_named
from minillm.teachers.pair import Models
from minillm.teachers.preflight import preflight
from tests.pictures import picture, save_seeing
from tests.runs import Silent, die_after, in_a_child, records, train

CPU = torch.device("cpu")
METHODS = {
    "kd": {"name": "kd"},
    "minillm": {"name": "minillm", "ppo_epochs": 2, "lm_coef": 0.0},
    "llavadi": {"name": "llavadi", "affinity_coef": 1.0},
}
SOME_PARTS = {"train": ["projector", "vision"], "vision_from_layer": 1}


@pytest.fixture
def data(tmp_path):
    """Eight records: a picture by its path, and an answer."""
    lines = []
    for number, answer in enumerate(("red", "a blue one", "two", "dots", "green", "it is a cat", "no", "left")):
        picture(number).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"prompt": "what?", "completion": answer, "image": f"{number}.png"}))
    (tmp_path / "seen.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def recipe(folder, method: str, kind: str, **student):
    prompts = {"type": "jsonl", "path": str(folder / "seen.jsonl"), "template": "chat",
               "max_prompt_length": 128, "max_response_length": 8}  # fmt: skip
    document = {
        "output_dir": str(folder / "run"),
        "seed": 5,
        "student": {"path": str(save_seeing(kind, folder / "student")), **student},
        "teacher": {"path": str(save_seeing(kind, folder / "teacher", width=48, seed=1))},
        "data": {"prompts": prompts},
        "rollout": {"buffer_size": 4, "batch_size": 4, "max_new_tokens": 6},
        "method": METHODS[method],
        "train": {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
        "eval": {"steps": 2, "sets": {"held_out": {**prompts, "limit": 3}}, "max_new_tokens": 6},
        "save": {"steps": 1, "keep": 9},
        "log": {"report_to": []},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def part_of(name: str) -> str:
    """The part that a weight's name says it is of; of the vision tower's layers below the first, none that is trained."""
    words = {"projector": ("projector", "connector", "merger", "newline"), "vision": ("vision", "visual")}
    part = next((part for part, parts in words.items() if any(word in name for word in parts)), "language")
    return "lower vision" if part == "vision" and ".layers.1." not in name else part


@pytest.mark.parametrize(
    "method, kind, student",
    [
        ("kd", "qwen2_5_vl", {}),
        ("minillm", "llava", {}),
        ("kd", "llava_onevision", SOME_PARTS),
        ("llavadi", "idefics3", {}),
        ("llavadi", "paligemma", {"train": ["projector"]}),
    ],
)
def test_a_run_that_was_killed_takes_the_steps_of_an_unbroken_one(data, one_thread, method, kind, student):
    path = recipe(data, method, kind, **student)
    whole, _ = train(path)
    broken = f"output_dir={data / 'broken'}"

    def killed():
        die_after(25)
        train(path, broken)

    assert in_a_child(killed) & 0x7F == signal.SIGKILL
    assert not (data / "broken" / "final").exists()
    again, _ = train(path, broken, resume=True)
    assert records(whole.parent) == records(again.parent)
    for file in ("model.safetensors", "processor_config.json"):
        assert (whole / file).read_bytes() == (again / file).read_bytes()
    steps = [record for record in records(whole.parent) if record["kind"] == "train"]
    assert len(steps) == 4 and steps[0]["loss"] != steps[-1]["loss"]
    before, after = (load_file(folder / "model.safetensors") for folder in (data / "student", whole))
    changed = {part_of(name) for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed >= {*student.get("train", ["language"])} and (not student or changed <= {*student["train"]}), changed

    (held_out,) = evaluate_model(str(again), evaluation_plan([path]), Silent())["sets"].values()
    last = [record for record in records(whole.parent) if record["kind"] == "eval" and record["who"] == "student"][-1]
    assert held_out == pytest.approx(last["sets"]["held_out"], rel=1e-5)

    models, _ = open_named(str(again), None)
    keys = InstructionKeys(template="chat")
    said = [
        Answerer(models, keys, Sampling(8), seed=1, images=[str(data / f"{number}.png")]).ask("what?")["student"]
        for number in (0, 0, 1)
    ]
    assert said[0] == said[1] != said[2]


def eager_loss(model, teacher, processor, files, answers) -> torch.Tensor:
    """The mean forward KL from full float64 logits, record by record, from what the processor makes of the record."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for file, answer in zip(files, answers, strict=True):
        message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
        text = processor.apply_chat_template(message, add_generation_prompt=True)
        made = processor(images=[picture(file)], text=[text], return_tensors="pt")
        made.pop("labels", None)
        response = torch.tensor([processor.tokenizer(answer).input_ids + [256]])
        ids = torch.cat([made.pop("input_ids"), response], 1)
        kinds = {}
        if "mm_token_type_ids" in made:
            kinds["mm_token_type_ids"] = torch.cat([made.pop("mm_token_type_ids"), torch.zeros_like(response)], 1)
        made.pop("attention_mask")
        logs = []
        for one in (teacher, model):
            logits = one(input_ids=ids, attention_mask=torch.ones_like(ids), **made, **kinds).logits
            logits = logits[0, -response.shape[1] - 1 : -1].double()
            # what stands for a picture is no part of an answer
            banned = torch.arange(logits.shape[1]) == one.config.image_token_id
            logs.append(logits.masked_fill(banned, -torch.inf).log_softmax(-1))
        p, q = logs
        kept = p.isfinite()
        total = total + (p.exp()[kept] * (p[kept] - q[kept])).sum()
        count += response.shape[1]
    return total / count


def opened(data, kind: str) -> tuple[Models, PromptSet]:
    """A pair of models that see, and the first three prompts."""
    student_path, teacher_path = save_seeing(kind, data / "s"), save_seeing(kind, data / "t", width=48, seed=1)
    options = {"output_dir": data, "device": CPU}
    config = StudentConfig(path=str(student_path))
    student = load_student(config, seed=0, **options)
    teacher = LocalTeacher(load_teacher(TeacherConfig(path=str(teacher_path)), **options))
    tokenizer = load_tokenizer(config, data)
    models, _ = preflight(student, teacher, tokenizer, tokenizer, CPU)
    keys = JsonlPrompts(path=str(data / "seen.jsonl"), template="chat", limit=3, max_response_length=20)
    return models, load_prompts(keys, tokenizer)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_answers_are_scored_and_measured_with_the_pictures_that_they_were_sampled_with(data, who):
    models, prompts = opened(data, "llava")
    keys = [example.index for example in prompts]
    options = {"keys": keys, "seed": 1, "draw": 0, "who": who, "batch_size": 2}
    extras = [example.extras for example in prompts]
    answers = LocalRollouts(models).sample([one.prompt_ids for one in prompts], Sampling(6), extras=extras, **options)
    buffer = score(models, answers, keys=keys, batch_size=2)
    sequences = [TokenSequence(one.prompt, one.response, extras=one.extras) for one in answers]
    measured = token_statistics(models, sequences, fields=(f"{who}_logprob",), batch_size=2)[f"{who}_logprob"]
    for answer, rollout, one in zip(answers, buffer, measured, strict=True):
        torch.testing.assert_close(rollout.vectors[f"{who}_logprob"], answer.logprobs, atol=1e-4, rtol=0)
        torch.testing.assert_close(one, answer.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "idefics3"])
def test_the_loss_is_that_of_the_picture(data, kind):
    models, prompts = opened(data, kind)
    student, teacher, tokenizer = models.student, models.teacher, models.tokenizer
    loss_of = TermLoss(student, vocab_size=models.vocab_size, backend="auto")

    def loss(examples) -> torch.Tensor:
        term = mixed_term([example.sequence for example in examples], models, divergence="forward_kl", ce_ratio=0.0)
        return loss_of(term)[0] / term.count

    ours = loss(prompts.examples)
    answers = ("red", "a blue one", "two")
    expected = eager_loss(student, teacher.model, tokenizer.picture_processor, (0, 1, 2), answers)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)
    ours.backward()
    grad = student.model.get_decoder().layers[0].self_attn.q_proj.weight.grad.clone()
    student.zero_grad()
    expected.backward()
    torch.testing.assert_close(
        grad, student.model.get_decoder().layers[0].self_attn.q_proj.weight.grad, rtol=1e-3, atol=1e-5
    )

    for number in range(3):
        picture(70 + number).save(data / f"{number}.png")
    other = load_prompts(
        JsonlPrompts(path=str(data / "seen.jsonl"), template="chat", limit=3, max_response_length=20), tokenizer
    )
    assert [example.prompt_ids for example in other] == [example.prompt_ids for example in prompts]
    assert abs(loss(other.examples).item() - ours.item()) > 1e-3

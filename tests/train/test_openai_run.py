"""Runs with a teacher of protocol openai: what they learn from, what they refuse before the first step, and their plan."""

import json

import pytest
import yaml

from minillm import UserError
from minillm.cli.main import main
from minillm.models.saving import save_model
from minillm.models.tokenizers import byte_tokenizer
from tests.conftest import tiny_llama
from tests.runs import records, train
from tests.teachers.openai_server import FakeVllm

# kd asks while it steps, gkd of what the student writes, opd and minillm weigh what was sampled, which may be unlikely
METHODS = {"kd": {}, "gkd": {}, "opd": {}, "minillm": {"alpha": 0.0, "lm_coef": 0.0}}


@pytest.fixture
def server():
    server = FakeVllm(tiny_llama(vocab_size=257, hidden_size=48, seed=1))
    yield server
    server.stop()


@pytest.fixture
def recipe(small_run, tmp_path, server):
    """A function that writes a run of a method with the server's teacher."""

    def write(method: str = "kd", **keys):
        document = small_run(tmp_path, layers=1)
        document["student"]["config"]["vocab_size"] = 257
        document["method"] = {"name": method, **METHODS[method]}
        document["teacher"] = {"type": "served", "protocol": "openai", "url": f"{server.url}/v1", "tokenizer": "byte",
                               "k": 5, "patience_seconds": 0.2, **keys}  # fmt: skip
        path = tmp_path / f"{method}.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    return write


@pytest.mark.parametrize("method", METHODS)
def test_methods_learn_from_it_and_are_compared_with_it(recipe, server, tmp_path, method):
    train(recipe(method))
    steps = [one for one in records(tmp_path / "run") if one["kind"] == "train"]
    measured = [one for one in records(tmp_path / "run") if one["kind"] == "eval"][-1]["mean"]
    assert [one["step"] for one in steps] == [1, 2] and measured["reverse_kl_nats"] > 0
    assert all(asked["prompt_logprobs"] == 5 for asked in server.requests)


@pytest.mark.parametrize("method", ["kd", "opd", "minillm"])
def test_one_of_several_is_asked_about_its_records_alone(recipe, server, tmp_path, method):
    """Beside one that gives hidden states, in a step and in a buffer; with a context, which it is sent."""
    path = recipe(method)
    document = yaml.safe_load(path.read_text())
    save_model(tiny_llama(vocab_size=257, layers=1, seed=3), byte_tokenizer(), tmp_path / "math")
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    named = [{**line, "domain": ("math", "chat")[place % 2]} for place, line in enumerate(lines)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
    document["teachers"] = {"chat": document.pop("teacher"), "math": {"path": str(tmp_path / "math")}}
    document["teachers_by"] = {"field": "domain"}
    document["data"]["prompts"] |= {"teacher_context": "Hint: {completion}", "max_teacher_prompt_length": 40}
    path.write_text(yaml.safe_dump(document))
    train(path)
    measured = [one for one in records(tmp_path / "run") if one["kind"] == "eval"][-1]["mean"]
    assert measured["reverse_kl_nats"] > 0
    sent = [byte_tokenizer().decode(text) for asked in server.requests for text in asked["prompt"]]
    read = [text for text in sent if any(line["prompt"] in text for line in named)]
    assert any("Hint: " in text for text in read)
    assert not any(line["prompt"] in text for line in named if line["domain"] == "math" for text in read)
    assert (tmp_path / "run" / "written" / "main" / "served_teacher-chat.json").is_file()
    server.longest = 12
    with pytest.raises(UserError, match=r"data.prompts, read by teacher 'chat': a text may have \d+ tokens"):
        train(path, f"output_dir={tmp_path / 'other'}", "eval=null")
    server.longest = 512
    server.model = tiny_llama(vocab_size=257, hidden_size=48, seed=9)
    with pytest.raises(UserError, match="began with tiny as its teacher, and what is served now, tiny, differs by"):
        train(path, "train.max_steps=3", resume=True)


def test_a_run_does_not_go_on_with_other_weights_under_the_same_name(recipe, server, tmp_path):
    path = recipe()
    train(path, "train.max_steps=1", "eval=null")
    server.model = tiny_llama(vocab_size=257, hidden_size=48, seed=9)
    with pytest.raises(UserError, match="began with tiny as its teacher, and what is served now, tiny, differs by"):
        train(path, "train.max_steps=2", "eval=null", resume=True)


def test_texts_beyond_what_the_servers_read_are_refused_before_the_first_step(recipe, server):
    server.longest = 12
    with pytest.raises(UserError, match=r"data.prompts: a text may have \d+ tokens, and the teacher's servers read 11"):
        train(recipe(), "eval=null")


def test_another_tokenizer_is_refused(recipe, assets):
    with pytest.raises(UserError, match="student and teacher have different tokenizers"):
        train(recipe(tokenizer=str(assets / "models" / "stories260k")))


def test_a_plan_asks_no_server_and_has_the_ids_of_a_step(recipe, server, capsys):
    server.stop()
    assert main(["plan", str(recipe()), "--gpu", "cpu", "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"].values()
    held = stage["memory_bytes"]["update"]["device"]
    assert stage["parameters"]["teacher"] == 0 and stage["served_teacher"] == server.url
    assert held["teacher hidden states"] == 2 * 8 * 5 * 12 and held.get("teacher weights", 0) == 0
    server.start()

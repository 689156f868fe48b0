"""A plan with a served teacher has its head alone, with the sizes that the server says or those of the model it names."""

import json

import pytest
import yaml

from minillm.cli.main import main
from minillm.models.saving import save_model
from minillm.models.tokenizers import byte_tokenizer
from tests.conftest import tiny_llama

HEAD, ROW = 257 * 48 * 4, 48 * 4  # bytes in fp32


@pytest.fixture
def recipe(small_run, tmp_path):
    """A small run with a teacher of hidden size 48 that nobody serves."""
    document = small_run(tmp_path, layers=1)
    document["student"]["config"]["vocab_size"] = 257
    document["teacher"] = {"type": "served", "url": "http://127.0.0.1:9", "model": str(tmp_path / "teacher")}
    save_model(tiny_llama(vocab_size=257, hidden_size=48, seed=1), byte_tokenizer(), tmp_path / "teacher")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def plan(capsys, *words) -> dict:
    assert main(["plan", *map(str, words), "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"].values()
    return stage


def memory(stage: dict, phase: str, part: str) -> int:
    return stage["memory_bytes"][phase]["device"].get(part, 0)


METHODS = {
    "kd": (),
    "gkd": (),
    "minillm": ("method.alpha=0.0", "method.lm_coef=0.0"),
    "minillm of the teacher": ("method.alpha=1.0", "method.lm_coef=0.0"),
    "distillm2": (),
    "dpkd": (),
}


# on a GPU a buffer's rows lie in the host's memory, and those of a step are moved there
@pytest.mark.parametrize(("method", "gpu"), [*((method, "cpu") for method in METHODS), ("minillm", "H100-80GB")])
def test_the_head_alone_is_loaded(recipe, capsys, method, gpu):
    words = [recipe, f"method.name={method.partition(' ')[0]}", *METHODS[method], "--gpu", gpu]
    stage = plan(capsys, *words)
    assert stage["served_teacher"] == "http://127.0.0.1:9" and stage["parameters"]["teacher"] == HEAD // 4
    local = plan(capsys, *words, f"teacher={{type: local, path: {recipe.parent / 'teacher'}}}")
    for phase in stage["memory_bytes"]:
        assert memory(stage, phase, "teacher weights") == HEAD < memory(local, phase, "teacher weights")
        assert memory(stage, phase, "teacher KV cache") == 0
    for part in ("student weights", "optimizer states", "activations", "teacher hidden states", "rollout buffer"):
        assert memory(stage, "update", part) == memory(local, "update", part), part
    assert memory(stage, "evaluation", "teacher hidden states") >= 2 * 8 * ROW  # two prompts of eight tokens at most


def test_likeliest_ids_take_no_head(recipe, capsys):
    stage = plan(capsys, recipe, "method.name=kd", "teacher.rows=top_k", "teacher.k=5", "--gpu", "cpu")
    assert memory(stage, "update", "teacher weights") == 0
    assert memory(stage, "update", "teacher hidden states") == 2 * 8 * 5 * 12


def test_a_server_that_answers_says_the_sizes(recipe, capsys, served_model, live):
    server = live(served_model)
    words = [recipe, "method.name=kd", "teacher.model=null", "--gpu", "cpu"]
    stage = plan(capsys, *words, f"teacher.url={server.url}")
    assert stage["parameters"]["teacher"] == HEAD // 4
    assert main(["plan", *map(str, words)]) == 2
    assert "a plan without a server takes its sizes from teacher.model" in capsys.readouterr().err
    assert main(["plan", *map(str, words[:2]), f"teacher.url={server.url}", "teacher.model=null"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"the teacher is served by {server.url}: its weights are not loaded, of them the head alone" in printed

"""A teacher with another tokenizer that is served: the steps are bit for bit those with the same teacher in this process."""

import importlib.util
import json

import pytest
import yaml

from minillm.config.loader.run_plan import load_run
from minillm.models.saving import save_model
from minillm.planning.planner import plan_run
from minillm.serving.served_model import ServedModel
from tests.conftest import tiny_llama
from tests.other_tokenizer import small_bpe
from tests.runs import records, train
from tests.serving.conftest import live  # noqa: F401  a fixture

pytestmark = pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="uvicorn is not installed")


@pytest.mark.parametrize("method", [{"name": "uld", "top_k": 7}, {"name": "gold", "on_policy": 0.5, "ce_coef": 1.0}],
                         ids=["uld", "gold"])  # fmt: skip
def test_the_steps_are_those_with_the_teacher_here(method, small_run, tmp_path, live, monkeypatch):  # noqa: F811
    """References are asked for a step ahead, in the teacher's ids; answers when they are there."""
    from minillm.teachers.served import ServedTeacher

    ahead, expect = [], ServedTeacher.expect
    monkeypatch.setattr(
        ServedTeacher, "expect", lambda self, batches: expect(self, ahead.extend(batches) or ahead[-2:])
    )
    tokenizer = small_bpe()
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=48, layers=1, seed=5)
    save_model(model, tokenizer, tmp_path / "teacher")
    server = live(ServedModel("other", model.eval().requires_grad_(False), tokenizer))
    document = small_run(tmp_path, layers=1)
    document["train"] |= {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    document |= {"method": method, "save": {"keep": 9, "best": False}}
    sources = {"here": {"path": str(tmp_path / "teacher")}, "there": {"type": "served", "url": server.url}}
    for name, teacher in sources.items():
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**document, "teacher": teacher}, sort_keys=False))
        train(tmp_path / "run.yaml", f"output_dir={tmp_path / name}")
    ours, theirs = (records(tmp_path / name) for name in ("there", "here"))
    assert ours == theirs and any(one["kind"] == "eval" for one in ours)
    texts = {tuple(one.response) for batch in ahead for one in batch.sequences}
    answers = [json.loads(line)["completion"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert texts and all(tokenizer.decode(text[:-1]) in answers for text in texts)
    (stage,) = plan_run(load_run([tmp_path / "run.yaml"]), gpu="cpu").stages
    assert stage.simulation.teacher.parameters == len(tokenizer) * 48  # its head

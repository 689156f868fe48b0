"""Methods that take several answers to each prompt: so many fewer prompts, other answers, and runs that go on bit for bit."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from minillm.config.root import StageConfig
from minillm.data.instructions import Example
from minillm.data.stream import Stream
from minillm.methods import build_method
from minillm.methods.protocol import TrainingData
from minillm.rollout.local import decoding_check
from minillm.rollout.local.decoder import Decoder
from minillm.rollout.local.local_rollouts import LocalRollouts
from tests.runs import records, train

EXAMPLES = [Example(index, [60 + index] * (2 + index % 3), [90, 91], "", ()) for index in range(9)]


@pytest.mark.parametrize("method", ["minillm", "opd", "gkd", "seqkd"])
def test_a_collection_is_of_fewer_prompts(method, make_models, tmp_path):
    keys = {"minillm": {"lm_coef": 0.0}, "gkd": {"on_policy": 1.0}}.get(method, {})
    config = StageConfig(
        output_dir=str(tmp_path), seed=3, student={"path": "unused"}, teacher={"path": "unused"},
        method={"name": method, **keys}, train={"max_steps": 1, "per_device_train_batch_size": 6},
        rollout={"buffer_size": 6, "batch_size": 6, "max_new_tokens": 9, "answers_per_prompt": 3},
    )  # fmt: skip
    models, prompts = make_models(), Stream(EXAMPLES, seed=1)
    data = TrainingData(prompts, None, LocalRollouts(models, share_prompts=True), tmp_path)
    built = build_method(config)
    items = built.collect(data, models, 0)
    taken = [example.index for example in Stream(EXAMPLES, seed=1).take(2)]
    assert [item.key for item in items] == taken * 3
    assert prompts.state_dict() == {"taken": 2, "items": 9}
    for number in range(2):
        assert len({tuple(item.response) for item in items[number::2]}) == 3
    if method == "seqkd":  # in the next pass too every prompt has all of its answers, of which each was written once
        prompts.take(7)
        again = built.collect(data, models, 1)
        lines = (tmp_path / "answers.jsonl").read_text().splitlines()
        assert len(lines) == 1 + 3 * len(EXAMPLES)
        assert len({tuple(item.response) for item in again[::2]}) == 3


@pytest.fixture
def recipe(small_run, tmp_path):
    document = small_run(tmp_path, layers=1)
    document["rollout"]["answers_per_prompt"] = 2
    document["train"]["num_train_epochs"] = 1
    document["train"]["max_steps"] = None
    del document["eval"]
    document["stages"] = {
        "a_teacher": {"student": {"config": {"hidden_size": 24}}, "train": {"max_steps": 1}},
        "distil": {"teacher": {"path": "stage:a_teacher"}, "method": {"name": "minillm", "lm_coef": 0.0}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_run_reads_each_prompt_once_and_goes_on_bit_for_bit(recipe, tmp_path, monkeypatch):
    rows, hidden = [], Decoder.hidden

    def counting(self, input_ids, *others, prompts, **options):
        rows.extend([len(input_ids)] * prompts)
        return hidden(self, input_ids, *others, prompts=prompts, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "hidden", counting)
        for name in ("decoding_error", "copying_error", "refilling_error"):  # whose prompts are not counted
            patch.setattr(decoding_check, name, lambda model, *others: 0.0)
        whole, _ = train(recipe, f"output_dir={tmp_path / 'whole'}")
    assert sum(rows) == 2 * 8
    steps = [one for one in records(tmp_path / "whole") if (one["stage"], one["kind"]) == ("distil", "train")]
    # eight prompts, two answers each, in steps of two, each answer trained on twice
    assert len(steps) == 8 * 2 * 2 // 2
    assert steps[-1]["passes"] == 1.0
    train(recipe, f"output_dir={tmp_path / 'broken'}", "stages.distil.train.max_steps=3")
    broken, _ = train(recipe, f"output_dir={tmp_path / 'broken'}", resume=True)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (broken, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert records(tmp_path / "broken") == records(tmp_path / "whole")

"""Files and overrides to typed stages, or every problem at once with file and line; and nothing heavy imported."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillm.config.errors import ConfigErrors
from minillm.config.loader.evaluation_plan import load_evaluation
from minillm.config.loader.run_plan import load_run, resolved
from minillm.config.loader.yaml_text import dump
from minillm.config.root import StageConfig, method_classes
from minillm.config.shape import Group, all_keys
from tests.config.shortest import EVALUATED, shortest_method

EXAMPLE = """
output_dir: runs/stories
seed: 7
student: {path: models/big, init: prune, layers: [0, 2, 4]}
teacher: {path: models/big}
data:
  prompts: {type: jsonl, path: data/train.jsonl, template: alpaca, max_prompt_length: 256}
  corpus:  {type: text, path: data/*.txt, block_size: 512}
rollout: {buffer_size: 256, max_new_tokens: 256, temperature: 1.0, top_k: 0, top_p: 1.0}
method:  {name: minillm, preset: paper, alpha: 0.2, gamma: 1.0, length_norm: true, ppo_epochs: 4, cliprange: 0.2,
          lm_coef: 1.0}
train:   {max_steps: 5000, per_device_train_batch_size: 8, gradient_accumulation_steps: 8, learning_rate: 5.0e-6,
          lr_scheduler_type: constant_with_warmup, warmup_steps: 100, max_grad_norm: 1.0, bf16: true}
engine:  {type: torch}
eval:    {steps: 100, sets: {dolly: {path: data/train.jsonl}}, metric: rouge_l}
save:    {steps: 500, keep: 2}
log:     {report_to: [tensorboard]}
stages:
  warmup: {method: {name: sft}, train: {max_steps: 300, learning_rate: 5.0e-4}}
  distil: {student: {path: stage:warmup, init: pretrained}}
"""


def errors_of(files, overrides=()) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        load_run(files, overrides)
    assert len(caught.value.problems) == len(set(caught.value.problems))
    return [str(problem) for problem in caught.value.problems]


def test_a_file_without_stages_is_one_stage(recipe):
    plan = recipe.load()
    assert [stage.name for stage in plan.stages] == ["main"]
    assert plan.output_dir == Path("runs/one")
    assert plan.files == [Path("run.yaml")]
    assert plan.document == recipe.document


def test_stages_inherit_and_replace(recipe):
    plan = load_run([recipe.write(EXAMPLE)])
    warmup, distil = (stage.config for stage in plan.stages)
    assert [stage.name for stage in plan.stages] == ["warmup", "distil"]
    assert warmup.method.name == "sft"
    assert (warmup.train.max_steps, warmup.train.learning_rate, warmup.train.bf16) == (300, 5e-4, True)
    assert (distil.method.name, distil.method.alpha, distil.train.max_steps) == ("minillm", 0.2, 5000)
    assert (distil.student.path, distil.student.init) == ("stage:warmup", "pretrained")
    assert plan.document == yaml.safe_load(EXAMPLE)


def test_files_merge_left_to_right_then_overrides(recipe):
    base = recipe.write(recipe.document, "base.yaml")
    more = recipe.write("train: {max_steps: 20, learning_rate: 1e-4}\nseed: 3\n", "more.yaml")
    plan = load_run([base, more], ["seed=4", "data.prompts.limit=5", "method.alpha=0"])
    config = plan.stages[0].config
    assert (config.train.max_steps, config.train.learning_rate, config.seed) == (20, 1e-4, 4)
    assert (config.data.prompts.limit, config.data.prompts.path, config.method.alpha) == (5, "data/train.jsonl", 0)


def test_a_stage_that_is_null_above_is_taken_away(recipe):
    file = recipe.write(EXAMPLE)
    assert [stage.name for stage in load_run([file], ["stages.distil=null"]).stages] == ["warmup"]
    over = recipe.write("stages: {distil: null}\n", "over.yaml")
    assert [stage.name for stage in load_run([file, over]).stages] == ["warmup"]
    (problem,) = errors_of([file], ["stages.warmup=null"])
    assert "stages.distil.student.path" in problem and "warmup" in problem


def test_a_value_at_the_root_never_beats_a_stages_own(recipe):
    file = recipe.write(EXAMPLE)
    warmup, distil = (stage.config.train for stage in load_run([file], ["train.max_steps=7"]).stages)
    assert (warmup.max_steps, distil.max_steps) == (300, 7)
    warmup, distil = (stage.config.train for stage in load_run([file], ["stages.warmup.train.max_steps=3"]).stages)
    assert (warmup.max_steps, warmup.learning_rate, distil.max_steps) == (3, 5e-4, 5000)
    over = recipe.write("train: {max_steps: 9}\nstages: {distil: {seed: 1}}\n", "over.yaml")
    warmup, distil = (stage.config for stage in load_run([file, over]).stages)
    assert (warmup.train.max_steps, distil.train.max_steps, warmup.seed, distil.seed) == (300, 9, 7, 1)


def test_overrides_of_a_choice_come_in_any_order(recipe):
    for overrides in (["method.name=kd", "method.ce_ratio=0.25"], ["method.ce_ratio=0.25", "method.name=kd"]):
        method = recipe.load(*overrides).stages[0].config.method
        assert (method.name, method.ce_ratio) == ("kd", 0.25)
    for overrides in (
        ["data.prompts.type=pydoc", "data.prompts.limit=3"],
        ["data.prompts.limit=3", "data.prompts.type=pydoc"],
    ):
        prompts = recipe.load(*overrides).stages[0].config.data.prompts
        assert (prompts.type, prompts.limit) == ("pydoc", 3)


def test_a_group_that_may_be_absent_can_be_taken_out(recipe):
    config = recipe.load("method={name: sft}", "teacher=null", "data.corpus=").stages[0].config
    assert config.teacher is None and config.data.corpus is None


def test_all_problems_of_all_files_overrides_and_stages_at_once(recipe):
    file = recipe.write(
        """output_dir: runs/x
student: {path: models/big}
teacher: {path: models/bog}
data: {prompts: {path: data/train.jsonl}, corpus: {path: data/*.txt}}
method:
  name: minillm
  lenght_norm: true
train:
  max_steps: ten
stages:
  first: {method: {name: sft, ppo_epochs: 3}}
  second: {rollout: {buffer_size: 100}}
"""
    )
    more = recipe.write("data: {prompts: {templat: none}}\nsave: {keep: 0}\n", "more.yaml")
    lines = errors_of([file, more], ["train.lr=1e-4", "stages.secnd.seed=1", "stages.first.seed=-1"])
    assert lines == [
        "run.yaml:3: teacher.path: no such folder: models/bog (did you mean models/big?)",
        "run.yaml:7: method.lenght_norm: in stage second: unknown key (did you mean length_norm?)",
        "run.yaml:9: train.max_steps: expected a whole number, not 'ten'",
        "run.yaml:11: stages.first.method.ppo_epochs: unknown key for name sft (minillm has ppo_epochs)",
        "run.yaml:12: stages.second.rollout.buffer_size: 100 answers do not divide into steps of 8 "
        "(per_device_train_batch_size 8 x gradient_accumulation_steps 1); the nearest that do: 96 and 104",
        "more.yaml:1: data.prompts.templat: unknown key (did you mean template?)",
        "more.yaml:2: save.keep: must be at least 1, not 0",
        "command line: stages.first.seed: must be at least 0, not -1",
        "command line: stages.secnd: no file has this stage (did you mean second?)",
        "command line: train.lr: unknown key (did you mean learning_rate?)",
    ]


def test_the_whole_message_counts_and_lists(recipe):
    with pytest.raises(ConfigErrors) as caught:
        recipe.load("seed=-1", "save.keep=0")
    assert str(caught.value).splitlines() == [
        "2 problems in the configuration:",
        "  command line: save.keep: must be at least 1, not 0",
        "  command line: seed: must be at least 0, not -1",
    ]


def test_what_is_missing_is_said_once_or_for_the_stage_that_lacks_it(recipe):
    assert recipe.problems(train=...)["train"].startswith("missing")
    found = recipe.problems(train=..., stages={"a": {"train": {"max_steps": 1}}, "b": {}})
    assert found["train"].startswith("in stage b: missing")


def test_what_may_stand_in_an_unreadable_file_is_not_called_missing(recipe):
    half = recipe.write("output_dir: x\nstudent: {path: models/big, lyers: 3}\n", "half.yaml")
    broken = recipe.write("train: {max_steps: 3\n", "broken.yaml")
    lines = errors_of([half, broken, "gone.yaml"])
    assert [line.partition(":")[0] for line in lines] == ["half.yaml", "broken.yaml", "gone.yaml"]
    assert "lyers" in lines[0]


def test_what_belongs_to_the_run_is_not_a_stages(recipe):
    stage = {"output_dir": "y", "log": {"report_to": [], "steps": 2}, "stages": {"inner": {}}}
    found = recipe.problems(stages={"only": stage})
    assert set(found) == {"stages.only.output_dir", "stages.only.log.report_to", "stages.only.stages"}
    assert all("top of the file" in message for message in found.values())


def test_stages_that_are_none(recipe):
    assert [stage.name for stage in recipe.load(stages={"one": None, "two": {}}).stages] == ["one", "two"]
    assert [stage.name for stage in recipe.load(stages={}).stages] == ["main"]
    assert set(recipe.problems(stages=["one"])) == {"stages"}
    assert set(recipe.problems(stages={"one": 3})) == {"stages.one"}
    assert "folder" in recipe.problems(stages={"../up": {}})["stages.../up"]
    assert recipe.problems(stage={"one": {}}) == {"stage": "unknown key (did you mean stages?)"}


def test_paths_stay_as_written_and_the_output_folder_is_expanded(recipe, monkeypatch):
    monkeypatch.setenv("HERE", str(recipe.folder))
    plan = recipe.load(output_dir="$HERE/out", teacher__path="${HERE}/models/big")
    assert plan.output_dir == recipe.folder / "out"
    # so that a checkpoint of one machine is the same recipe on another
    assert plan.stages[0].config.teacher.path == "${HERE}/models/big"


@pytest.mark.parametrize("name", method_classes())
def test_every_default_may_be_written_out(recipe, name):
    plan = recipe.load(method=shortest_method(name), eval=EVALUATED)
    assert load_run([recipe.write(dump(resolved(plan)))]).stages == plan.stages


@pytest.mark.parametrize("staged", [False, True])
def test_the_resolved_document_loads_to_the_same_plan(recipe, staged):
    text = EXAMPLE if staged else EXAMPLE.partition("stages:")[0]
    plan = load_run([recipe.write(text)], ["method.preset=lmops"])
    again = load_run([recipe.write(dump(resolved(plan)), "again.yaml")])
    assert again.stages == plan.stages
    assert resolved(again) == resolved(plan)
    assert plan.stages[-1].config.method.gamma == 1.0  # given explicitly: the preset does not beat it
    assert plan.stages[-1].config.method.whiten == "all"


KEYS = [None, "stages", "one", *sorted({part for key in all_keys(Group(StageConfig)) for part in key.split(".")})]
values = st.sampled_from(
    [None, True, 0, -1, 2.5, "x", "stage:one", "./x", "$X", [], [1], ["x"], [{}], "hf", "kd", "sft"]
)
nested = st.recursive(values, lambda inner: st.dictionaries(st.sampled_from(KEYS), inner, max_size=4), max_leaves=12)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), nested, max_size=4), st.lists(nested, max_size=2), st.booleans())
def test_any_document_loads_or_is_explained(recipe, document, overrides, valid_below):
    files = [recipe.write(recipe.document, "base.yaml")] if valid_below else []
    files.append(recipe.write(dump(document), "any.yaml"))
    written = [f"train.max_steps={dump(value).strip()}" for value in overrides]
    for load in (load_run, load_evaluation):
        try:
            load(files, written)
        except ConfigErrors as errors:
            assert all(problem.message for problem in errors.problems)


def test_loading_imports_nothing_heavy(recipe):
    recipe.write(recipe.document)
    code = (
        "import sys; from minillm.config.loader.run_plan import load_run; load_run(['run.yaml'])\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'triton', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

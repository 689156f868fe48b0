"""The verbs: what they call with what, and what they print where."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

import minillm
from minillm.cli.arguments import BENCHMARKS, LARGEST_SEED, make_parser
from minillm.cli.main import VERBS, main
from minillm.config import keys
from minillm.config.evaluation import EvalConfig


def test_train_loads_files_and_overrides_in_any_order(folder, trained):
    Path("more.yaml").write_text("seed: 3\n")
    assert main(["train", "run.yaml", "train.max_steps=4", "--resume", "more.yaml", "data.prompts.limit=1"]) == 0
    ((plan, resume, console),) = trained
    config = plan.stages[0].config
    assert (config.train.max_steps, config.seed, config.data.prompts.limit, resume) == (4, 3, 1, True)
    assert hasattr(console, "preflight")


@pytest.mark.parametrize("word", ["nonsense", "max_steps", "runs"])
def test_a_word_that_is_neither_file_nor_override_says_what_an_override_is(folder, capsys, word):
    Path("runs").mkdir()
    assert main(["train", "run.yaml", word]) == 2
    printed = capsys.readouterr().err
    if word == "runs":
        assert "runs: cannot be read as a text file" in printed
    else:
        assert (
            f"  {word}: no such file (the current folder is {folder}); an override is written group.key=value"
            in printed
        )


def test_a_misspelt_file_is_not_taken_for_an_override(folder, capsys):
    assert main(["train", "runn.yaml"]) == 2
    assert capsys.readouterr().err.endswith(f"runn.yaml: no such file (the current folder is {folder})\n")


def test_a_file_may_have_an_equals_sign(folder, trained):
    Path("run.yaml").rename("lr=1.yaml")
    assert main(["train", "lr=1.yaml"]) == 0
    assert trained[0][0].files == [Path("lr=1.yaml")]


def test_train_does_not_write_into_a_folder_that_holds_something(folder, trained, capsys):
    Path("runs/one").mkdir(parents=True)
    assert main(["train", "run.yaml"]) == 0  # empty
    Path("runs/one/metrics.jsonl").write_text("")
    assert main(["train", "run.yaml"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "runs/one is not empty" in printed.err and "--resume" in printed.err and "output_dir=" in printed.err
    assert main(["train", "run.yaml", "--resume"]) == 0
    assert [resume for _, resume, _ in trained] == [False, True]


def test_a_launcher_of_several_processes_is_refused(folder, trained, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "run.yaml"]) == 2
    assert "one process" in capsys.readouterr().err
    assert trained == []


@pytest.mark.parametrize("verb", ["train", "validate"])
def test_every_problem_is_printed_to_stderr_alone(folder, trained, capsys, verb):
    assert main([verb, "run.yaml", "train.lr=3", "seed=-1"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "minillm: 2 problems in the configuration:",
        "  command line: seed: must be at least 0, not -1",
        "  command line: train.lr: unknown key (did you mean learning_rate?)",
    ]
    assert trained == []


def test_validate_prints_what_loads_to_the_same(folder, capsys):
    assert main(["validate", "run.yaml", "seed=5"]) == 0
    first = capsys.readouterr().out
    assert yaml.safe_load(first)["seed"] == 5
    Path("again.yaml").write_text(first)
    assert main(["validate", "again.yaml"]) == 0
    assert capsys.readouterr().out == first


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


HEAVY = "print([name for name in ('torch', 'transformers', 'datasets', 'rich', 'matplotlib') if name in sys.modules])"


@pytest.mark.parametrize("arguments", [["validate", "run.yaml"], ["validate", "gone.yaml"], ["schema"], ["--help"]])
def test_what_loads_no_model_imports_nothing_heavy(folder, arguments):
    code = f"import sys\nfrom minillm.cli.main import main\ntry:\n    main({arguments})\nexcept SystemExit:\n    pass\n{HEAVY}"
    result = run_python(code)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_eval_takes_configurations_data_and_options(folder, monkeypatch):
    from minillm.cli import eval as verb

    calls = []

    def evaluation_plan(files, overrides, *, seeds, max_prompts):
        calls.append((files, overrides, seeds, max_prompts))
        return types.SimpleNamespace(eval=EvalConfig(distinct=[4]))

    def evaluate_model(model, plan, console, *, dtype, output, figures, delta, alpha):
        assert (delta, alpha) == (None, None)
        calls.append((model, dtype, output, figures))

    monkeypatch.setattr(verb, "evaluation_plan", evaluation_plan)
    monkeypatch.setattr(verb, "evaluate_model", evaluate_model)
    command = ["eval", "runs/one", "run.yaml", "eval.top_k=5", "--seeds", "1", "2", "--max-prompts", "7"]
    assert main([*command, "--dtype", "bfloat16", "--output", "out.json", "--figures", "pictures"]) == 0
    assert main(["eval", "teacher", "run.yaml"]) == 0
    assert calls == [
        ([Path("run.yaml")], ["eval.top_k=5"], [1, 2], 7),
        ("runs/one", "bfloat16", Path("out.json"), Path("pictures")),
        ([Path("run.yaml")], [], None, None),
        ("teacher", "float32", None, None),
    ]


def test_generate_passes_every_option(folder, monkeypatch):
    from minillm.cli import generate as verb

    calls = []
    monkeypatch.setattr(verb, "generate", lambda model, *, console, **options: calls.append((model, options)))
    assert main(["generate", "runs/one", "--prompt", "a", "--prompt", "b", "--top-k", "5", "--template", "none"]) == 0
    ((model, options),) = calls
    assert (model, options["prompts"], options["top_k"], options["template"]) == ("runs/one", ["a", "b"], 5, "none")
    assert options["teacher"] is None


def test_the_options_of_generate_are_the_parameters_of_the_function():
    import inspect

    from minillm.cli.generate import generate

    options = vars(make_parser().parse_args(["generate", "x"])).keys() - {"verb"}
    assert options | {"console"} == inspect.signature(generate).parameters.keys()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_bench_hands_everything_to_the_benchmark(fake, name):
    calls = []
    fake(f"minillm.benchmarks.{name}", main=lambda argv: calls.append(argv) or 3)
    assert main(["bench", name, "--match", "x", "--help", "a=b"]) == 3
    assert calls == [["--match", "x", "--help", "a=b"]]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_there(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", name, "--help"])
    assert caught.value.code == 0
    assert "--output" in capsys.readouterr().out


def test_bench_imports_neither_configuration_nor_models():
    code = (
        "import sys, types\nsys.modules['minillm.benchmarks'] = types.ModuleType('b')\n"
        "fake = sys.modules['minillm.benchmarks.kernels'] = types.ModuleType('k'); fake.main = lambda argv: 0\n"
        "from minillm.cli.main import main\nmain(['bench', 'kernels'])\n"
        "print([name for name in ('pydantic', 'transformers', 'rich', 'yaml') if name in sys.modules])"
    )
    assert run_python(code).stdout.strip() == "[]"


def test_report_writes_one_and_compares_several(folder, fake, capsys):
    compared = []

    def compare_reports(runs, *, figure):
        compared.append((runs, figure))
        return "# a against b\n"

    fake("minillm.reporting.report", write_report=lambda run: run / "report.md", compare_reports=compare_reports)
    assert main(["report", "runs/a"]) == 0
    assert capsys.readouterr().out == f"{Path('runs/a/report.md')}\n"
    assert main(["report", "runs/a", "runs/b", "--figure", "both.png"]) == 0
    assert capsys.readouterr().out == "# a against b\n"
    assert compared == [([Path("runs/a"), Path("runs/b")], Path("both.png"))]


def test_a_report_of_something_else_is_a_message(folder, capsys):
    assert main(["report", "runs/none"]) == 2
    assert "is not a run's folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["report", "runs/a", "--figure", "x.png"], "--figure draws the curves of several runs"),
        (["report", "runs/a", "runs/b", "--figure", "runs"], "--figure: runs is a folder"),
        (["eval", "runs/a", "run.yaml", "--output", "runs"], "--output: runs is a folder; name a file"),
        (["eval", "runs/a", "run.yaml", "--figures", "run.yaml"], "--figures: run.yaml is a file, not a folder"),
        (["eval", "runs/a", "e.yaml", "--figures", "f"], "there is nothing to draw; set one of eval.exposure_bias"),
        (["eval", "teacher", "run.yaml", "--dtype", "float16"], "whose dtype is teacher.dtype"),
        (["generate", "x", "--temperature", "0", "--top-k", "5"], "no effect at --temperature 0"),
        (["generate", "x", "--temperature", "0", "--top-p", "0.5"], "no effect at --temperature 0"),
        (["experiment", "--arms", "kd"], "--arms: name the experiment as well"),
        (["experiment", "--output", "x", "--report"], "--output, --report: name the experiment as well"),
        (["experiment", "x", "--list", "--report"], "--report has no effect beside --list"),
        (["experiment", "x", "--list", "--seed", "1"], "--seed has no effect beside --list"),
        (["experiment", "x", "--report", "--seed", "1"], "--seed has no effect beside --report"),
        (["experiment", "x", "--report", "--arms", "kd"], "--arms has no effect beside --report"),
        (["experiment", "x", "--output", "run.yaml"], "--output: run.yaml is a file, not a folder"),
        (
            ["experiment", "stories", "nonsense"],
            "'nonsense' is not an override; an override is written group.key=value",
        ),
        (["experiment", "stories", "--seed", "99"], "--seed 99: the report is about the seeds"),
    ],
)
def test_options_that_would_do_nothing_or_fail_in_the_end_are_refused_at_once(folder, assets, capsys, command, words):
    Path("runs").mkdir()
    Path("e.yaml").write_text("eval: {sets: {a: {path: train.jsonl}}}\n")
    assert main(command) == 2
    assert words in capsys.readouterr().err


def test_schema_prints_json(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["stages"]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["trian"],
        ["train"],
        ["train", "x.yaml", "--resum3"],
        ["bench", "nothing"],
        ["schema", "extra"],
        ["generate", "x", "--seed", "-1"],
        ["generate", "x", "--seed", str(2**63)],
        ["eval", "x", "y.yaml", "--seeds", "1", "9" * 5000],
        ["plan", "x.yaml", "--world-size", "two"],
    ],
    ids=lambda argv: " ".join(argv)[:40],
)
def test_wrong_commands_are_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: minillm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "words"),
    [("two", "expected a whole number, not 'two'"), ("0", "must be at least 1, not 0"), ("1.5", "not '1.5'")],
)
def test_numbers_of_options_are_checked_in_words(capsys, value, words):
    with pytest.raises(SystemExit):
        main(["plan", "x.yaml", "--world-size", value])
    assert words in capsys.readouterr().err


def test_a_seed_is_the_same_number_on_the_command_line_and_in_a_file():
    assert LARGEST_SEED == keys.LARGEST_SEED


def test_every_verb_has_its_function():
    import importlib

    (verbs,) = (action for action in make_parser()._actions if action.dest == "verb")
    for verb in verbs.choices.keys() - {"bench"} - VERBS.keys():
        assert callable(importlib.import_module(f"minillm.cli.{verb}").run)


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"minillm {minillm.__version__}\n"


def test_a_reader_that_has_seen_enough(folder):
    command = f"{sys.executable} -m minillm.cli.main schema | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout == "{\n"
    assert result.stderr == ""


def test_experiments_are_listed_where_none_is_named(folder, capsys):
    Path("configs/experiments").mkdir(parents=True)
    Path("configs/experiments/mine.yaml").write_text("title: What I measure\n")
    for command in (["experiment"], ["experiment", "--list"]):
        assert main(command) == 0
        listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert listed["mine"] == "What I measure" and "equal student tokens" in listed["stories"]


def test_every_option_is_explained():
    (verbs,) = (action for action in make_parser()._actions if action.dest == "verb")
    bare = [
        f"{verb} {action.option_strings or action.dest}"
        for verb, parser in verbs.choices.items()
        for action in parser._actions
        if not action.help
    ]
    assert not bare

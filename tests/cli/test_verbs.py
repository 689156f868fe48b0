"""The verbs: what they call with what, and what they print where."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import minillm
from minillm.cli.arguments import BENCHMARKS, make_parser
from minillm.cli.main import main


def test_train_loads_files_and_overrides_in_any_order(folder, trained):
    Path("more.yaml").write_text("seed: 3\n")
    assert main(["train", "run.yaml", "train.max_steps=4", "--resume", "more.yaml", "data.prompts.limit=1"]) == 0
    ((plan, resume, console),) = trained
    config = plan.stages[0].config
    assert (config.train.max_steps, config.seed, config.data.prompts.limit, resume) == (4, 3, 1, True)
    assert hasattr(console, "preflight")


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


def test_eval_takes_configurations_data_and_options(folder, fake):
    calls = []

    def evaluation_plan(files, overrides, *, seeds, max_prompts):
        calls.append((files, overrides, seeds, max_prompts))
        return "plan"

    def evaluate_model(model, plan, console, *, dtype, output, figures):
        calls.append((model, plan, dtype, output, figures))

    fake("minillm.cli.eval", evaluation_plan=evaluation_plan, evaluate_model=evaluate_model)
    command = ["eval", "runs/one", "run.yaml", "eval.top_k=5", "--seeds", "1", "2", "--max-prompts", "7"]
    assert main([*command, "--dtype", "bfloat16", "--output", "out.json", "--figures", "pictures"]) == 0
    assert calls == [
        ([Path("run.yaml")], ["eval.top_k=5"], [1, 2], 7),
        ("runs/one", "plan", "bfloat16", Path("out.json"), Path("pictures")),
    ]


def test_generate_passes_every_option(folder, fake):
    calls = []
    fake("minillm.cli.generate", generate=lambda model, *, console, **options: calls.append((model, options)))
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


def test_schema_prints_json(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["stages"]


@pytest.mark.parametrize(
    "argv", [[], ["trian"], ["train"], ["train", "x.yaml", "--resum3"], ["bench", "nothing"], ["schema", "extra"]]
)
def test_wrong_commands_are_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: minillm" in capsys.readouterr().err


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

"""Every recipe in configs/ is valid without a network, and fits the hardware that its header names."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoConfig

from minillm.cli.main import main
from minillm.config.loader.evaluation_plan import load_evaluation
from minillm.config.loader.run_plan import load_run
from minillm.data.labels import load_labels
from minillm.models.tokenizers import byte_tokenizer
from minillm.planning.architectures import known_architecture
from minillm.planning.planner import plan_run
from minillm.planning.sizes import count_parameters

ROOT = Path(__file__).parents[1]
# configs that are not a run by themselves
LAYERS = {"base.yaml", "zero3.yaml"}
RECIPES = sorted(
    path
    for folder in ("paper", "modern")
    for path in (ROOT / "configs" / folder).glob("*.yaml")
    if path.name not in LAYERS
)
NEEDS = {"engine: {type: deepspeed": "deepspeed", "lora: {": "peft"}  # what a recipe says -> the package it takes

PARAMETERS = {
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-large": 774_030_080,
    "openai-community/gpt2-xl": 1_557_611_200,
    "facebook/opt-1.3b": 1_315_758_080,
    "facebook/opt-2.7b": 2_651_596_800,
    "facebook/opt-6.7b": 6_658_473_984,
    "facebook/opt-13b": 12_853_473_280,
    "huggyllama/llama-7b": 6_738_415_616,
    "huggyllama/llama-13b": 13_015_864_320,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "TinyLlama/TinyLlama_v1.1": 1_100_048_384,
    "nickypro/tinyllama-15M": 15_191_712,
    "Qwen/Qwen1.5-1.8B": 1_836_828_672,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-8B-Base": 8_190_735_360,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    # language model, CLIP-L/336 and two projecting layers
    "llava-hf/llava-1.5-13b-hf": 13_016_519_680 + 303_507_456 + 31_467_520,
    "your/llava-mobilellama-2.7b": 2_701_560_320 + 2 * 64 * 2560 + 303_507_456 + 1025 * 2560 + 2561 * 2560,
    "your/llava-qwen2-0.5b": 494_032_768 + 303_507_456 + 1025 * 896 + 897 * 896,
    "your/llava-qwen2-7b": 7_615_616_512 + 303_507_456 + 1025 * 3584 + 3585 * 3584,
}


def command(path: Path, verb: str) -> list[str]:
    """The words after `minillm VERB` of the command in a recipe's header."""
    header = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    line = next(line for line in header if re.search(rf"\b{verb}\s+configs/", line))
    return shlex.split(line)[shlex.split(line).index(verb) + 1 :]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def skip_without_its_packages(path: Path) -> None:
    text = "".join(Path(word).read_text() for word in command(path, "train"))
    for words, package in NEEDS.items():
        if words in text and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_by_the_command_in_its_header(recipe, capsys):
    skip_without_its_packages(recipe)
    assert main(["validate", *command(recipe, "train")]) == 0
    capsys.readouterr()


def test_the_run_with_a_served_teacher_is_valid_without_a_server(capsys):
    assert main(["validate", "configs/served.yaml"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("family", sorted({path.stem.partition("-")[0] for path in RECIPES}))
def test_recipes_fit_the_hardware_in_their_headers(family):
    """A family at a time: its recipes share a teacher, whose stage is planned once a process."""
    for path in (path for path in RECIPES if path.stem.partition("-")[0] == family):
        skip_without_its_packages(path)
        words = command(path, "plan")
        options = dict(zip(words[:-1], words[1:], strict=True))
        files = [Path(word) for word in words if word.endswith(".yaml")]
        run = plan_run(load_run(files), gpu=options["--gpu"], world_size=int(options.get("--world-size", 1)))
        assert run.fits, (path.stem, {stage.name: stage.peak for stage in run.stages})


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_an_architecture_has_as_many_parameters_as_the_model(name, parameters):
    architecture = AutoConfig.from_pretrained(known_architecture(name, [ROOT / "configs" / "architectures"]))
    assert count_parameters(architecture) == parameters


def test_the_calibration_sets_are_read_from_folders_of_the_same_fields(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for one in messages %}<{{ one.role }}>{{ one.content }}{% endfor %}<assistant>"
    records = {
        "sst2": {"idx": 0, "sentence": "a delight", "label": 1},
        "boolq": {"question": "is snow cold", "answer": False, "passage": "Snow is warm."},
    }
    for name, record in records.items():
        DatasetDict(validation=Dataset.from_list([record])).save_to_disk(tmp_path / name)
    overrides = [f"eval.calibration.{name}.path={tmp_path / name}" for name in records]
    plan = load_evaluation([ROOT / "configs" / "calibration.yaml"], overrides)
    found = {name: load_labels(keys, tokenizer, name=name) for name, keys in plan.eval.calibration.items()}
    asked = {name: one.questions[0] for name, one in found.items()}
    assert "positive or negative?\n\na delight<assistant>" in tokenizer.decode(asked["sst2"].prompt_ids)
    assert "Snow is warm.\n\nQuestion: is snow cold? " in tokenizer.decode(asked["boolq"].prompt_ids)
    assert {name: plan.eval.calibration[name].words[one.label] for name, one in asked.items()} == {
        "sst2": "positive",
        "boolq": "no",
    }


def test_the_quickstart_of_images_and_text_is_valid(capsys):
    pytest.importorskip("easy_vqa")
    assert main(["validate", "configs/image_text/quickstart.yaml"]) == 0
    capsys.readouterr()

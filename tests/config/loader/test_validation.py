"""Typed groups, and every mistake in plain words at the path where it is."""

import copy
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.config.loader.validation import usable_groups, validate_stage
from minillm.config.root import STAGE_SHAPE, method_classes
from minillm.config.shape import all_keys

METHODS = ", ".join(method_classes())
VALID = {
    "output_dir": "runs/x",
    "student": {"path": "a/b"},
    "method": {"name": "sft"},
    "train": {"max_steps": 3},
}


def changed(path: str, value):
    data = copy.deepcopy(VALID)
    *above, key = path.split(".")
    group = data
    for part in above:
        group = group.setdefault(part, {})
    group[key] = value
    return data


def found(data) -> dict[str, str]:
    _, findings = validate_stage(data)
    return {".".join(map(str, finding.path)): finding.message for finding in findings}


def test_a_valid_stage_has_its_defaults():
    config, findings = validate_stage(changed("data.prompts.path", "x.jsonl"))
    assert findings == []
    assert config.data.prompts.type == "jsonl"
    assert config.train.per_device_train_batch_size == 8
    assert config.engine.type == "torch"


def test_no_type_is_bent_into_another():
    # 1 for true, "3" for 3, 3.0 for 3 and true for 1 all pass elsewhere, and all hide a mistake
    wrong = {"train.bf16": 1, "train.max_steps": "3", "seed": True, "save.keep": 3.0, "train.learning_rate": "1e-4"}
    for path, value in wrong.items():
        assert list(found(changed(path, value))) == [path]
    assert validate_stage(changed("train.learning_rate", 1))[0].train.learning_rate == 1.0


def test_values_never_change_after_loading():
    config, _ = validate_stage(VALID)
    with pytest.raises(ValueError, match="frozen"):
        config.train.max_steps = 4


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("train.max_stepz", 3, "did you mean max_steps?"),
        ("train.lr", 3, "did you mean learning_rate?"),
        ("train.batch_size", 3, "did you mean per_device_train_batch_size?"),
        ("trian.max_steps", 3, "did you mean train?"),
        ("learning_rate", 3, "did you mean train.learning_rate?"),
        ("train.ppo_epochs", 3, "did you mean method.ppo_epochs?"),
        ("method.ppo_epochs", 3, "for name sft (minillm has ppo_epochs)"),
        ("method.betta", 0.2, "beta)"),
        ("eval.sets.a.pth", "x", "did you mean path?"),
        ("engine.qqqqqq", 1, "there are type, device, backend"),
        ("method.name", "minilm", f"is not one of {METHODS} (did you mean minillm?)"),
        ("data.prompts.type", "parket", "did you mean parquet?"),
        ("data.prompts.type", ["hf"], "is not one of jsonl"),
        ("engine.type", "fsdp", "'fsdp' is not one of torch, deepspeed"),
        ("log.report_to", ["wandb"], "only tensorboard"),
        ("student.init", "pruned", "did you mean prune?"),
        ("train.max_steps", "3", "leave the quotes out"),
        ("train.max_steps", 1.5, "expected a whole number, not 1.5"),
        ("train.max_steps", 0, "must be at least 1, not 0"),
        ("train.adam_beta2", 1.0, "must be less than 1, not 1.0"),
        ("train.learning_rate", float("inf"), "must be finite"),
        ("train.learning_rate", "nan", "expected a number, not 'nan'"),
        ("seed", 2**63, "must be at most 9223372036854775807, not 9223372036854775808"),
        ("eval.seeds", [2**64], "must be at most 9223372036854775807"),
        ("student.path", 3, "put it in quotes"),
        ("student.layers", "all", "expected a whole number or a list, not 'all'"),
        ("student.layers", [0, -1], "must be at least 0, not -1"),
        ("student.layers", 0, "must be at least 1, not 0"),
        ("train.max_seconds", -3, "must be greater than 0, not -3"),
        ("train.max_seconds", True, "expected a number or text, not true"),
        ("train.max_seconds", "long", "'long' is not what goes here"),
        ("engine.device", "gpu", "auto (a GPU where there is one), cpu, cuda or cuda:N"),
        ("eval.seeds", [], "must not be empty"),
        ("eval.seeds", 3, "expected a list, not 3"),
        ("eval.sets", [1], "expected keys and values, not [1]"),
        ("eval.sets.a", "x.jsonl", "expected keys and values, not 'x.jsonl'"),
        ("save", None, "leave the group out"),
        ("train.lr_scheduler_kwargs.power", "two", "expected a number, not 'two'"),
        ("teacher.dtype", "float32", "a Hugging Face folder"),
        ("data.corpus.block_size", 8, ".txt.gz"),
    ],
)
def test_one_mistake_is_one_message_in_plain_words(path, value, words):
    messages = found(changed(path, value))
    assert len(messages) == 1
    assert words in next(iter(messages.values()))


def test_a_missing_key_is_said_at_its_own_path():
    messages = found({"method": {"alpha": 0.2}, "teacher": {}})
    assert set(messages) == {"output_dir", "student", "train", "method.name", "teacher.path"}
    assert METHODS in messages["method.name"]
    assert all(message.startswith("missing") for message in messages.values())


def test_a_misspelt_required_key_is_not_also_missing():
    assert found(changed("teacher.pth", "x")) == {"teacher.pth": "unknown key (did you mean path?)"}


def test_errors_of_a_choice_are_about_the_chosen_branch_alone():
    messages = found(changed("data.prompts", {"type": "pydoc", "path": "x", "split": "dev"}))
    assert set(messages) == {"data.prompts.path", "data.prompts.split"}
    assert "jsonl, parquet, hf and text have path" in messages["data.prompts.path"]


def test_an_item_of_a_list_is_named():
    _, (finding,) = validate_stage(changed("student.layers", [0, 1, -2]))
    assert finding.path == ("student", "layers", 2)


def test_usable_groups_leave_out_what_is_wrong_and_no_more():
    data = changed("train.lr", 3)
    data |= {"method": {"name": "minilm"}, "teacher": {}, "rollout": {"top_k": -1, "buffer_size": 8}, "data": 3}
    _, findings = validate_stage(data)
    groups = usable_groups(data, findings)
    assert not {"method", "teacher", "data"} & set(groups)
    assert groups["train"].max_steps == 3
    assert (groups["rollout"].top_k, groups["rollout"].buffer_size) == (0, 8)
    assert groups["eval"].metric == "rouge_l"


def test_one_useless_part_of_a_group_does_not_take_the_others_along():
    data = changed("data", {"prompts": {"limit": 3}, "corpus": {"type": "pydoc", "block_size": 9}})
    _, findings = validate_stage(data)
    group = usable_groups(data, findings)["data"]
    assert (group.prompts, group.corpus.block_size) == (None, 9)
    data = changed("data", {"prompts": {"type": "pydok"}, "corpus": {"type": "pydoc", "block_size": 9}})
    _, findings = validate_stage(data)
    assert usable_groups(data, findings)["data"] == group


values = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        2.5,
        "x",
        "1e-4",
        [],
        [1],
        ["x"],
        {},
        {"type": "hf"},
        {"name": "kd"},
        {"path": 3},
        {"a": {"b": 1}},
    ]
)
JARGON = re.compile(r"\b(Input|pydantic|union|tag|discriminator|validation|Extra|instance|attributes|NoneType)\b")


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(sorted(set(all_keys(STAGE_SHAPE)))), values, max_size=5))
def test_any_nonsense_is_explained_without_jargon(changes):
    data = copy.deepcopy(VALID)
    for path, value in changes.items():
        *above, key = path.split(".")
        group = data
        for part in above:
            if not isinstance(group.get(part), dict):
                group[part] = {}
            group = group[part]
        group[key] = copy.deepcopy(value)
    config, findings = validate_stage(data)
    assert (config is None) == bool(findings)
    for finding in findings:
        assert finding.message and not JARGON.search(finding.message), finding
    usable_groups(data, findings)

"""Files and overrides as trees, and which of two values wins where they are merged."""

import pytest

from minillm.config.loader.document import merge, read_file, read_override
from minillm.config.root import STAGE_SHAPE
from minillm.config.tree import COMMAND_LINE, Origin, wrap


def read(tmp_path, text):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    problems = []
    return read_file(path, problems), problems


def test_files_that_cannot_be_read(tmp_path):
    problems = []
    assert read_file(tmp_path / "none.yaml", problems) is None
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert read_file(tmp_path / "binary.yaml", problems) is None
    assert read_file(tmp_path, problems) is None
    assert ["no such file" in problems[0].message, len(problems)] == [True, 3]
    node, problems = read(tmp_path, "# nothing yet\n")
    assert (node.plain(), problems) == ({}, [])


@pytest.mark.parametrize("text", ["train", "=3", "train..x=1", ".a=1", "a.=2"])
def test_what_is_no_override(text):
    problems = []
    assert read_override(text, problems) is None
    assert problems[0].file == COMMAND_LINE
    assert repr(text) in problems[0].message


def test_an_override_that_is_not_yaml_is_text_unless_it_began_as_a_list():
    assert read_override("data.path=*.jsonl", []).plain() == {"data": {"path": "*.jsonl"}}
    assert read_override("a={b: 1}", []).plain() == {"a": {"b": 1}}
    problems = []
    assert read_override("a=[1, 2", problems) is None
    assert problems[0].path == "a"


def test_an_empty_group_changes_nothing_and_is_no_override():
    problems = []
    read_override("train={}", problems)
    assert problems[0].path == "train" and "null takes it away" in problems[0].message


def merged(under, over):
    return merge(wrap(under, Origin("under")), wrap(over, Origin("over")), STAGE_SHAPE).plain()


def test_groups_merge_key_by_key_and_lists_are_replaced():
    under = {"train": {"max_steps": 3, "bf16": True}, "eval": {"seeds": [1, 2]}}
    over = {"train": {"max_steps": 4}, "eval": {"seeds": [3]}, "seed": 1}
    expected = {"train": {"max_steps": 4, "bf16": True}, "eval": {"seeds": [3]}, "seed": 1}
    assert merged(under, over) == expected


def test_a_changed_discriminator_replaces_its_group():
    under = {"method": {"name": "minillm", "alpha": 0.5}, "data": {"prompts": {"type": "parquet", "path": "x"}}}
    assert merged(under, {"method": {"name": "kd"}})["method"] == {"name": "kd"}
    assert merged(under, {"method": {"name": "minillm", "gamma": 0.9}})["method"]["alpha"] == 0.5
    assert merged(under, {"method": {"gamma": 0.9}})["method"]["name"] == "minillm"
    assert merged(under, {"data": {"prompts": {"type": "pydoc"}}})["data"]["prompts"] == {"type": "pydoc"}
    # a group that does not say its type has the default one
    default = {"data": {"prompts": {"path": "x", "limit": 3}}}
    assert merged(default, {"data": {"prompts": {"type": "pydoc"}}})["data"]["prompts"] == {"type": "pydoc"}
    assert merged(default, {"data": {"prompts": {"type": "jsonl"}}})["data"]["prompts"]["limit"] == 3


def test_a_name_that_is_no_discriminator_is_a_key_like_any_other():
    under = {"data": {"prompts": {"type": "hf", "path": "org/set", "name": "first"}}}
    over = {"data": {"prompts": {"name": "second"}}}
    assert merged(under, over)["data"]["prompts"] == {"type": "hf", "path": "org/set", "name": "second"}


def test_merging_inside_freely_named_sets():
    under = {"eval": {"sets": {"a": {"path": "x", "limit": 2}, "b": {"type": "pydoc", "split": "test"}}}}
    over = {"eval": {"sets": {"a": {"limit": 3}, "b": {"path": "y", "type": "text"}}}}
    expected = {"a": {"path": "x", "limit": 3}, "b": {"path": "y", "type": "text"}}
    assert merged(under, over)["eval"]["sets"] == expected


def test_null_takes_a_group_or_an_entry_of_one_away():
    under = {"eval": {"steps": 5, "sets": {"a": {"path": "x"}, "b": {"path": "y"}}}, "train": {"warmup_steps": 3}}
    assert merged(under, {"eval": {"sets": {"a": None}}})["eval"]["sets"] == {"b": {"path": "y"}}
    assert merged(under, {"eval": {"sets": None}})["eval"] == {"steps": 5}
    assert merged(under, {"eval": None}) == {"train": {"warmup_steps": 3}}
    assert merged(under, {"eval": {"steps": None}})["eval"]["steps"] is None  # a value, which null replaces


def test_merged_values_remember_where_they_were_written():
    tree = merge(
        wrap({"train": {"a": 1, "b": 2}}, Origin("under", 3)), wrap({"train": {"b": 4}}, Origin("over", 9)), STAGE_SHAPE
    )
    assert tree.closest(("train", "a"))[0].origin == Origin("under", 3, ("train", "a"))
    assert tree.closest(("train", "b"))[0].origin == Origin("over", 9, ("train", "b"))


@pytest.mark.parametrize("written", ["a\nb", "a\n\nb", "a b\nc"])
def test_a_line_break_of_the_command_line_stays_one(written):
    """YAML would make a space of it: the run would land in another folder than the one that was named."""
    problems = []
    assert read_override(f"output_dir={written}", problems).plain() == {"output_dir": written}
    assert read_override("train={max_steps: 3,\n bf16: true}", problems).plain() == {
        "train": {"max_steps": 3, "bf16": True}
    }
    assert problems == []

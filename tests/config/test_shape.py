"""The schema as dotted paths walk it."""

import pytest

from minillm.config.root import StageConfig
from minillm.config.shape import Choice, Group, Leaf, Many, all_keys, child_shape, describe, group_of, places, walk

STAGE = Group(StageConfig)


def test_the_choices_and_what_they_mean_by_default():
    method, prompts = STAGE.child("method"), STAGE.child("data").child("prompts")
    assert isinstance(method, Choice) and (method.key, method.default) == ("name", None)
    assert isinstance(prompts, Choice) and (prompts.key, prompts.default) == ("type", "jsonl")
    assert method.pick({"name": "kd"}).model.__name__ == "KD"
    assert prompts.pick({}).model.__name__ == "JsonlPrompts"
    assert method.pick({}) is None
    assert method.pick({"name": ["kd"]}) is None
    # a discriminator is told from a key that happens to have its name
    assert isinstance(prompts.options["hf"].child("name"), Leaf)


def test_walking_through_groups_sets_and_lists():
    data = {"eval": {"sets": {"type": {"type": "pydoc", "split": "test"}}}, "student": {"layers": [0, 2]}}
    assert walk(STAGE, data, ("eval", "sets", "type", "split"))[1] == "test"
    assert group_of(*walk(STAGE, data, ("eval", "sets", "type"))).model.__name__ == "PydocPrompts"
    assert isinstance(walk(STAGE, data, ("eval", "sets"))[0], Many)
    assert walk(STAGE, data, ("student", "layers", 1))[1] == 2
    assert walk(STAGE, data, ("student", "layers", 9)) == (None, None)
    assert child_shape(STAGE, {}, "nothing") is None


def test_every_key_of_every_choice_is_known():
    keys = set(all_keys(STAGE))
    assert {"train.max_steps", "method.alpha", "method.ce_ratio", "data.prompts.split", "eval.sets"} <= keys
    assert not any(key.startswith("eval.sets.") for key in keys)


def test_places_are_found_in_every_branch_and_nowhere_else():
    data = {
        "output_dir": "o",
        "student": {"path": "s", "tokenizer": "t", "revision": "r"},
        "teacher": None,
        "data": {"prompts": {"path": "p"}, "corpus": {"type": "pydoc", "path": "no key of pydoc"}},
        "eval": {"sets": {"a": {"type": "hf", "path": "h", "name": "n"}, "b": {"path": 3}, "c": None}},
        "train": "not even a group",
    }
    found = {text: place.kind for _, place, text in places(STAGE, data)}
    assert found == {"o": "folder", "s": "model", "t": "tokenizer", "p": "files", "h": "dataset"}


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("student.layers", "a whole number or a list"),
        ("train.max_seconds", "a number or text"),
        ("train.bf16", "true or false"),
        ("student.init", "one of pretrained, prune, upcycle, random"),
    ],
)
def test_types_in_words(path, words):
    shape, _ = walk(STAGE, {}, tuple(path.split(".")))
    assert describe(shape.annotation) == words

"""Which keys of a configuration are shown."""

from minillm.reporting.settings import differing_keys, settings_table

BASE = {
    "output_dir": "runs/x",
    "student": {"path": "a/b"},
    "teacher": {"path": "a/c"},
    "method": {"name": "minillm"},
    "train": {"max_steps": 10},
}


def rows(text: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    return {line[0]: line[1:] for line in lines}


def test_keys_away_from_their_default_are_shown_with_it():
    settings = {**BASE, "train": {"max_steps": 10, "learning_rate": 5e-6, "adam_beta2": 0.99}}
    shown = rows(settings_table({"main": settings}))
    assert shown["`train.adam_beta2`"] == ["0.95", "0.99"]
    assert shown["`train.max_steps`"] == ["none", "10"]
    assert "`train.learning_rate`" not in shown  # written out, but the default
    assert "`output_dir`" not in shown


def test_what_a_preset_changes_is_shown():
    shown = rows(settings_table({"main": {**BASE, "method": {"name": "minillm", "preset": "lmops"}}}))
    assert shown["`method.gamma`"] == ["1.0", "0.95"]


def test_sets_by_name_and_stages_side_by_side():
    warmup = {
        **BASE,
        "method": {"name": "sft"},
        "eval": {"sets": {"dolly": {"type": "jsonl", "path": "d", "limit": 5}}},
    }
    shown = rows(settings_table({"warmup": warmup, "distil": BASE}))
    assert shown["`eval.sets.dolly.limit`"] == ["none", "5", "–"]
    assert shown["`method.name`"] == ["–", "sft", "minillm"]


def test_keys_of_another_version_stand_beside_those_of_today():
    written = {"train": {"max_steps": 10, "no_such_key": 3}, "method": {"name": "minillm", "gamma": 0.9, "delta": 1}}
    shown = rows(settings_table({"main": {**BASE, **written}}))
    assert shown["`train.no_such_key`"] == ["–", "3"] and shown["`method.delta`"] == ["–", "1"]
    assert shown["`method.gamma`"] == ["1.0", "0.9"] and shown["`train.max_steps`"] == ["none", "10"]
    assert "`method.alpha`" not in shown


def test_a_configuration_that_cannot_be_read_any_more_is_shown_as_it_was_written():
    shown = rows(settings_table({"main": {"method": {"name": "forgotten", "depth": 3}, "train": {"max_steps": 10}}}))
    assert shown == {"`method.name`": ["forgotten"], "`method.depth`": ["3"], "`train.max_steps`": ["10"]}


def test_what_was_taken_out_is_not_changed_in_the_callers_keys():
    settings = {**BASE, "train": {"max_steps": 10, "no_such_key": 3}}
    settings_table({"main": settings})
    assert settings["train"] == {"max_steps": 10, "no_such_key": 3}


def test_differing_keys_are_those_on_which_runs_do_not_agree():
    other = {**BASE, "train": {"max_steps": 10, "learning_rate": 1e-4}, "method": {"name": "kd", "skew": 0.3}}
    shown = rows(differing_keys({"one": {"main": BASE}, "two": {"main": other}}))
    assert shown == {
        "`method.name`": ["minillm", "kd"],
        "`method.skew`": ["–", "0.3"],
        "`train.learning_rate`": ["5e-06", "0.0001"],
    }


def test_runs_that_agree_have_no_table():
    assert differing_keys({"one": {"main": BASE}, "two": {"main": BASE}}) == ""

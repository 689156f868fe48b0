"""Problems of several stages, said once and where they help."""

FIRST = {"method": {"name": "sft"}}


def test_a_key_of_the_command_line_that_only_another_stage_knows_names_that_stage(recipe):
    stages = {"first": {}, "second": {"method": {"name": "minillm"}}}
    found = recipe.problems("method.ppo_epochs=3", method={"name": "sft"}, stages=stages)
    assert found == {
        "method.ppo_epochs": "in stage first: unknown key for name sft (minillm has ppo_epochs); "
        "write stages.second.method.ppo_epochs"
    }
    # in a file the two stand apart, and what is wrong there is the file's
    found = recipe.problems(method={"name": "sft", "ppo_epochs": 3}, stages=stages)
    assert found["method.ppo_epochs"].endswith("(minillm has ppo_epochs)")


def test_a_key_that_does_something_in_one_stage_is_not_called_without_effect(recipe):
    stages = {"first": FIRST, "second": {}}
    assert recipe.problems("rollout.buffer_size=8", stages=stages) == {}
    found = recipe.problems("rollout.buffer_size=8", stages={"first": FIRST, "second": FIRST})
    assert found == {"rollout.buffer_size": "has no effect: method sft samples no answers"}
    # a stage that has its own does not make use of the one at the root
    own = {"second": {"rollout": {"buffer_size": 16}}}
    found = recipe.problems("rollout.buffer_size=8", stages={"first": FIRST, **own})
    assert found == {"rollout.buffer_size": "in stage first: has no effect: method sft samples no answers"}

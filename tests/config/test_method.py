"""Configuration classes of methods: what they must declare, and how one of another package is made known."""

from typing import ClassVar, Literal

import pytest

from minillm.config.loader.schema import file_schema
from minillm.config.loader.stages import stage_documents
from minillm.config.method import MethodConfig
from minillm.config.methods.gkd_keys import GKD
from minillm.config.methods.kd_keys import KD
from minillm.config.methods.minillm_keys import MiniLLM
from minillm.config.needs import Needs, TermNeeds, UndeclaredNeeds
from minillm.config.root import method_classes


def test_a_method_that_does_not_declare_its_needs_is_refused():
    with pytest.raises(UndeclaredNeeds, match="Silent must define `needs`"):

        class Silent(MethodConfig):
            name: Literal["silent"]
            summary: ClassVar[str] = "x"

    with pytest.raises(UndeclaredNeeds, match="`summary`"):

        class Bare(MethodConfig):
            name: Literal["bare"]

            def needs(self) -> Needs:
                return Needs(())

    with pytest.raises(UndeclaredNeeds):  # what it inherits is another method's

        class Heir(KD):
            name: Literal["heir"]


def test_the_value_that_does_away_with_a_need():
    assert MiniLLM(name="minillm").value_without("corpus") == 0
    assert GKD(name="gkd").value_without("references") == 1

    class Stubborn(MethodConfig):
        name: Literal["stubborn"]
        often: int = 3
        summary: ClassVar[str] = "x"

        def needs(self) -> Needs:
            return Needs((), corpus=True, because={"corpus": "often"})

    assert Stubborn(name="stubborn").value_without("corpus") is None


def test_unset_values_are_those_of_the_preset():
    assert MiniLLM(name="minillm", preset="lmops").unset_value("gamma") == 0.95
    assert MiniLLM(name="minillm").unset_value("gamma") == 1.0


class Elsewhere(MethodConfig):
    """A method of another package."""

    name: Literal["elsewhere"]
    strength: float = 1.0
    summary: ClassVar[str] = "elsewhere"

    def needs(self) -> Needs:
        return Needs((TermNeeds("own", ("references",)),), references=True)


def test_a_registered_method_loads_merges_and_is_explained(recipe, registered):
    before = ", ".join(method_classes())
    assert f"is not one of {before}" in recipe.problems(method={"name": "elsewhere"})["method.name"]
    registered(Elsewhere)
    plan = recipe.load(method={"name": "elsewhere", "strength": 2.0})
    assert isinstance(plan.stages[0].config.method, Elsewhere)
    assert plan.stages[0].config.method.strength == 2.0
    # its name replaces the group of another method, and keys are merged into its own
    stages = {"one": {}, "two": {"method": {"name": "elsewhere"}}, "three": {"method": {"alpha": 0.5}}}
    methods = [
        stage.config.method for stage in recipe.load(method={"name": "minillm", "alpha": 0.1}, stages=stages).stages
    ]
    assert [method.name for method in methods] == ["minillm", "elsewhere", "minillm"]
    document = {"method": {"name": "elsewhere", "strength": 2.0}, "stages": {"a": {"method": {"name": "elsewhere"}}}}
    assert stage_documents(document)["a"]["method"]["strength"] == 2.0

    found = recipe.problems(method={"name": "elswhere"})["method.name"]
    assert found == f"'elswhere' is not one of {before}, elsewhere (did you mean elsewhere?)"
    assert recipe.problems(method={"name": "elsewhere", "strenght": 1.0}) == {
        "method.strenght": "unknown key (did you mean strength?)"
    }
    assert "expected a number" in recipe.problems(method={"name": "elsewhere", "strength": "x"})["method.strength"]
    assert "(elsewhere has strength)" in recipe.problems(method={"name": "sft", "strength": 1.0})["method.strength"]
    assert recipe.problems(method={"name": "elsewhere"}, teacher=...) == {}


def test_a_registered_method_is_in_the_schema_of_editors(registered):
    assert "Elsewhere" not in file_schema()["$defs"]
    registered(Elsewhere)
    assert file_schema()["$defs"]["Elsewhere"]["properties"]["name"]["const"] == "elsewhere"


def test_a_name_belongs_to_one_method(registered):
    class Copy(MethodConfig):
        name: Literal["kd"]
        summary: ClassVar[str] = "x"

        def needs(self) -> Needs:
            return Needs(())

    with pytest.raises(ValueError, match="'kd' is KD already; give .*Copy another"):
        registered(Copy)
    registered(Elsewhere)
    registered(Elsewhere)  # importing a package twice is fine

"""One document taken apart into its stages, plain, as a report reads config.yaml."""

from minillm.config.loader.stages import stage_documents


def test_stages_of_a_plain_document():
    document = {
        "output_dir": "x",
        "method": {"name": "minillm", "alpha": 0.1},
        "data": {"prompts": {"type": "hf", "path": "org/set", "name": "a"}},
        "stages": {"first": {"method": {"name": "sft"}}, "second": {"data": {"prompts": {"name": "b"}}}, "third": None},
    }
    stages = stage_documents(document)
    assert list(stages) == ["first", "second", "third"]
    assert stages["first"]["method"] == {"name": "sft"}
    assert stages["second"]["data"]["prompts"] == {"type": "hf", "path": "org/set", "name": "b"}
    assert stages["third"] == {key: value for key, value in document.items() if key != "stages"}


def test_a_document_without_stages_is_one():
    assert stage_documents({"seed": 1}) == {"main": {"seed": 1}}
    assert stage_documents({"seed": 1, "stages": {"odd": 3}}) == {}

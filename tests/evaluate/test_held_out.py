"""Held-out data of every kind reaches student and teacher as the same, or is refused before anything is measured."""

import json
from types import SimpleNamespace

import pytest

from minillm import UserError
from minillm.config.data import JsonlPairs, JsonlPrompts
from minillm.data.instructions import load_prompts
from minillm.data.pairs import load_pairs
from minillm.data.sources import DataError
from minillm.evaluate.held_out import require_shared_data
from tests.pictures import build_processor, picture


def test_pictures_and_ids_are_those_of_both(tmp_path):
    processor, other = build_processor("llava"), build_processor("llava")
    picture(0).save(tmp_path / "0.png")
    asked = {"prompt": "?", "image": "0.png"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps({**asked, "response": "no"}) + "\n")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**asked, "chosen": "yes", "rejected": "no"}) + "\n")
    ours, template = processor.tokenizer, {"template": "none"}
    sets = {"a": load_prompts(JsonlPrompts(path=str(tmp_path / "prompts.jsonl"), **template), ours)}
    pairs = {"b": load_pairs(JsonlPairs(path=str(tmp_path / "pairs.jsonl"), **template), ours)}
    asked = []
    models = SimpleNamespace(tokenizer=ours, require_shared=lambda name, ids: asked.append((name, len(list(ids)))))
    require_shared_data("eval", sets, {}, pairs, models, [other.tokenizer])
    assert asked == [("eval.sets.a", 2), ("eval.preference.pairs.b", 3)]
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    for some, name in (((sets, {}, {}), "eval.sets.a"), (({}, {}, pairs), "eval.preference.pairs.b")):
        with pytest.raises(DataError, match=f"{name}: .* prepare them differently"):
            require_shared_data("eval", *some, models, [other.tokenizer])

    def refuse(name, ids):
        raise UserError(name)

    models.require_shared = refuse
    with pytest.raises(UserError, match="^eval.preference.pairs.b$"):
        require_shared_data("eval", {}, {}, pairs, models, [ours])

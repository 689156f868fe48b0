"""`--delta` and `--alpha` of generate and eval, with models of one tokenizer and of two."""

import io
import json

import pytest

from minillm import UserError
from minillm.cli.eval import evaluate_model, evaluation_plan
from minillm.cli.generate import generate
from minillm.models.saving import save_model
from minillm.models.vocabulary_map import FOLDER
from minillm.reporting.console import Console


@pytest.fixture
def folder(tmp_path, monkeypatch, make_models, assets):
    """MODEL and DELTA of bytes, and a link to one of other words."""
    made = make_models()
    save_model(made.teacher.model, made.tokenizer, tmp_path / "model")
    save_model(made.student, made.tokenizer, tmp_path / "delta")
    (tmp_path / "other").mkdir()
    for file in (assets / "models" / "stories260k").iterdir():
        (tmp_path / "other" / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(model: str, **options) -> str:
    stream = io.StringIO()
    with Console(file=stream) as console:
        generate(model, console=console, prompts=["hello"], max_new_tokens=8, template="none", **options)
    return stream.getvalue()


def test_a_delta_changes_what_is_generated_and_alpha_by_how_much(folder):
    answers = {alpha: said("model", delta="delta", alpha=alpha, temperature=0.0) for alpha in (None, 1.0, 1e-9, 9.0)}
    alone = said("model", temperature=0.0)
    assert answers[None] == answers[1.0] != alone == answers[1e-9]
    assert answers[9.0] not in (alone, answers[1.0]) and "Two tokenizers" not in answers[1.0]


def test_with_two_tokenizers_it_is_said_first_how_much_maps(folder):
    shown = said("model", delta="other", temperature=0.0)
    table, answer = shown.index("Two tokenizers"), shown.index("student")
    assert table < answer and "256 (99.6%)" in shown[table:answer] and "1 (0.4%)" in shown[table:answer]
    assert shown[answer:] != said("model", temperature=0.0)
    assert len([*(folder / "other" / FOLDER).iterdir()]) == 1
    assert said("model", delta="other", temperature=0.0) == shown


def test_a_pair_is_evaluated(folder):
    records = [{"prompt": f"say {word}", "completion": word} for word in ("yes", "no")]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    keys = ["eval.max_new_tokens=4", "eval.sets.held_out.template=none"]
    plan = evaluation_plan([folder / "held_out.jsonl"], keys)
    losses = {}
    for delta, alpha in ((None, None), ("delta", None), ("delta", 1e-9), ("other", 0.5)):
        with Console(file=io.StringIO()) as console:
            result = evaluate_model("model", plan, console, delta=delta, alpha=alpha, output=folder / "result.json")
        losses[delta, alpha] = result["mean"]["loss_nats"]
        kept = json.loads((folder / "result.json").read_text())
        assert (kept.get("delta"), kept.get("alpha")) == (delta, None if delta is None else alpha or 1.0)
        assert ("vocabulary_map" in kept) == (delta == "other")
    assert kept["vocabulary_map"] == {"unmapped": 0, "exact": 256, "shorter": 0, "longer": 0, "special": 1}
    assert losses["delta", 1e-9] == pytest.approx(losses[None, None], rel=1e-6)
    assert len({round(one, 4) for one in losses.values()}) == 3
    with Console(file=io.StringIO()) as console, pytest.raises(UserError, match="no `teacher`"):
        evaluate_model("teacher", plan, console, delta="delta")


def test_a_chat_is_put_to_a_delta_in_its_own_template(folder, make_models, monkeypatch):
    """Both chats are read, each by its tokenizer's template: the delta's prompt is not the text of the model's."""
    from minillm.rollout.local import delta_stream

    config = json.loads((folder / "other" / "tokenizer_config.json").read_text())
    (folder / "other" / "tokenizer_config.json").unlink()
    config["chat_template"] = (
        "Q: {{ messages[0]['content'] }} A:{% if messages[1] is defined %} {{ messages[1]['content'] }}</s>{% endif %}"
    )
    (folder / "other" / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "held_out.jsonl").write_text('{"prompt": "hi", "completion": "no"}\n')
    read = []
    begin = delta_stream.TranslatedText.__init__

    def remember(self, delta, prompt):
        begin(self, delta, prompt)
        read.append((delta.translation.tokenizer.decode(prompt), delta.tokenizer.decode(self.ids)))

    monkeypatch.setattr(delta_stream.TranslatedText, "__init__", remember)
    plan = evaluation_plan([folder / "held_out.jsonl"], ["eval.max_new_tokens=2", "eval.sets.held_out.template=chat"])
    with Console(file=io.StringIO()) as console:
        evaluate_model("model", plan, console, delta="other")
        generate("model", console=console, delta="other", prompts=["hi"], max_new_tokens=2)
    assert set(read) == {("<user>hi\n<assistant>", "Q: hi A:")}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha": 0.5}, "--alpha has no effect without --delta"),
        ({"delta": "delta", "alpha": 0.0}, "--alpha is 0.0; it must be a number above 0"),
        ({"delta": "delta", "alpha": -1.0}, "--alpha is -1.0"),
        ({"delta": "nowhere/at/all"}, "nowhere/at/all: no such folder"),
    ],
)
def test_what_is_wrong_with_the_options_is_named(folder, options, message):
    with pytest.raises(UserError, match=message):
        said("model", **options)

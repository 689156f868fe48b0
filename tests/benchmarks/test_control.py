"""The benchmark of deltas counts upper-case letters, and shuffles a map between two tokenizers."""

import json
import math

from minillm.benchmarks.control import main, upper_case_percent
from minillm.models.saving import save_model


def test_the_share_of_upper_case_letters():
    assert upper_case_percent(["Ab c", "9 D"]) == 50
    assert math.isnan(upper_case_percent(["1, 2"]))


def test_a_model_alone_with_a_delta_and_with_a_shuffled_map(tmp_path, make_models, assets, capsys):
    made = make_models()
    save_model(made.teacher.model, made.tokenizer, tmp_path / "model-1")
    made.student.model.norm.weight.data.zero_()  # all logits of this delta are 0
    save_model(made.student, made.tokenizer, tmp_path / "nothing-1")
    records = [{"prompt": f"say {word}", "completion": word.upper()} for word in ("yes", "no")]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    other = str(assets / "models" / "stories260k")
    given = ["--prompts", str(tmp_path / "held_out.jsonl"), "--tokens", "4", "--output", str(tmp_path / "control.md")]
    assert main([str(tmp_path / "model-{seed}"), other, "--delta", str(tmp_path / "nothing-{seed}"), *given]) == 0
    page = (tmp_path / "control.md").read_text()
    assert page in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()[2:7]]
    assert [row[2] for row in rows] == ["its own", "with the delta's"] * 2 + ["with the delta's, map shuffled"]
    # they change neither answers nor losses, through whatever map
    assert rows[0][3:] == rows[1][3:] and rows[2][3:] == rows[3][3:] == rows[4][3:]

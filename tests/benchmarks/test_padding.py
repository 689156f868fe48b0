"""The benchmark of micro-batches takes the same steps cut and packed all ways, and counts their padding."""

import json

from minillm.benchmarks.padding import WAYS, main
from minillm.models.tokenizers import byte_tokenizer


def test_a_table_of_all_ways(tmp_path, capsys):
    byte_tokenizer().save_pretrained(tmp_path / "model")
    # of every four answers two have 1 token and two have 9, with their end: prompts of one
    lines = [json.dumps({"prompt": "a", "completion": "b" * (8 * (place % 2))}) for place in range(8)]
    lines = [line.replace('"completion": ""', '"completion": "c"') for line in lines]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    sizes = "--template none --student 16x1 --teacher 32x1 --batch-size 4 --micro-batches 2 --steps 1 --device cpu"
    words = [str(tmp_path / "data.jsonl"), "--tokenizer", str(tmp_path / "model"), *sizes.split()]
    assert main([*words, "--output", str(tmp_path / "padding.md")]) == 0
    page = (tmp_path / "padding.md").read_text()
    assert page in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()[2:6]]
    assert [row[0] for row in rows] == list(WAYS.values())
    assert int(rows[0][1]) > 0 and rows[1][1] == "0"  # eight items of two lengths, in micro-batches of four
    assert rows[2][1] == rows[3][1] == "0"
    assert rows[0][4] == "1.00" and all(float(row[3]) > 0 for row in rows)  # steps so small may take 0.00 s

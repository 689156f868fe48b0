"""The benchmark of mixtures measures both ways and says so."""

import torch

from minillm.benchmarks.mixture import BOTH, main


def test_a_table_of_both_ways(tmp_path, capsys):
    threads = torch.get_num_threads()
    sizes = "--student 16x1 --teacher 32x1 --vocab 40 --prompts 3 --prompt-tokens 6 --tokens 5 --repeats 1 --batch-size 2 --device cpu"
    assert main([*sizes.split(), "--output", str(tmp_path / "mixture.md")]) == 0
    assert torch.get_num_threads() == threads
    page = (tmp_path / "mixture.md").read_text()
    assert page in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()[2:6]]
    assert [row[:2] for row in rows] == [
        [answers, way] for answers in ("full", "ending") for way in (BOTH, "shared coins")
    ]
    assert all(float(cell) > 0 for row in rows for cell in row[4:]) and all(row[5] == "1.00" for row in rows[::2])
    assert "| alpha | 0.2 |" in page and "2 side by side" in page

"""Make the old runs anew: `python -m tests.old_runs.make CHECKOUT`, with a checkout of the commit COMMIT.

Each run is trained twice with that code. Once to its end: NAME.jsonl has its records, without clocks. Once until it is
stopped: NAME.tar.xz has its folder, and in unbroken/NAME/final the weights that the other one left. made.json has the
machine. tests/test_old_runs.py reads all this; what it proves is lost where the runs are made anew with a later version.
"""

import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.old_runs.trains import PORTABLE, Train, Trains
from tests.runs import records

COMMIT = "91d1a0ef3daca838c9f26ba519230c98f03e67f0"
HERE = Path(__file__).parent
# Before which call of its optimiser a run is killed, or told to stop by Ctrl-C (trains.Train).
STOPS = {
    "minillm": {"stop": 30},
    "gkd": {"stop": 5, "signal": signal.SIGINT},
    "seqkd": {"stop": 8},
    "two_ranks": {"stop": 13, "signal": signal.SIGINT, "ranks": 2},
}
DRAWN = {"curves.png", "report.md"}  # from the rest, by every stage that ends


def main(checkout: Path) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True)
    if commit.stdout.strip() != COMMIT:
        raise SystemExit(f"{checkout} is a checkout of {commit.stdout.strip()}, not of {COMMIT}")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        for pattern in ("*.yaml", "*.jsonl", "*.txt"):
            for path in HERE.glob(pattern):
                if path.stem not in STOPS or path.suffix == ".yaml":
                    shutil.copy(path, made)
        with Trains(checkout) as trains:
            make(made, trains)
        for name in STOPS:
            pack(made, name)
        describe(made)


def make(folder: Path, trains: Trains) -> None:
    """Train in `folder`, which has the configurations and the data."""

    def both(name: str, *words: str) -> None:
        words = ["common.yaml", f"{name}.yaml", *words]
        unbroken = [*words, f"output_dir=unbroken/{name}"]
        trains.train(Train(str(folder), f"{name}-unbroken", unbroken, ranks=STOPS[name].get("ranks", 1)))
        trains.train(Train(str(folder), name, words, **STOPS[name]))

    both("minillm")
    shutil.copytree(folder / "minillm" / "stages" / "teacher", folder / "teacher")
    shutil.copytree(folder / "unbroken" / "minillm" / "final", folder / "start")
    both("gkd")
    answers = write_answers(folder, trains)
    for run in (folder / "seqkd", folder / "unbroken" / "seqkd"):
        (run / "written" / "main").mkdir(parents=True)
        (run / "written" / "main" / "answers.jsonl").write_text(answers)
    both("seqkd", "--resume")
    both("two_ranks")


def write_answers(folder: Path, trains: Trains) -> str:
    """answers.jsonl of the teacher, back to front: answers that a run can read, and that none would write."""
    trains.train(Train(str(folder), "answers", ["common.yaml", "seqkd.yaml", "output_dir=answers"], stop=1))
    header, *lines = (folder / "answers" / "written" / "main" / "answers.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    for answer in answers:
        end = len(answer["response"]) - answer["ended"]  # the EOS stays where it is
        answer["response"] = answer["response"][:end][::-1] + answer["response"][end:]
    return "".join(f"{line}\n" for line in [header, *map(json.dumps, answers)])


def pack(folder: Path, name: str) -> None:
    """NAME.jsonl and NAME.tar.xz, which has the same bytes for the same files."""
    lines = [json.dumps(record) for record in records(folder / "unbroken" / name)]
    (HERE / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    stopped = [path for path in (folder / name).rglob("*") if path.name not in DRAWN]
    unbroken = [*(folder / "unbroken" / name / "final").rglob("*.safetensors")]
    with tarfile.open(HERE / f"{name}.tar.xz", "w:xz", preset=9) as archive:
        for path in sorted(path for path in stopped + unbroken if path.is_file()):
            content = path.read_bytes()
            member = tarfile.TarInfo(str(path.relative_to(folder)))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def describe(folder: Path) -> None:
    """made.json: the code and the machine."""
    told = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    cpu = {name.strip(): value.strip() for name, value in told.items()}
    content = {
        "commit": COMMIT,
        "env": json.loads((folder / "unbroken" / "minillm" / "env.json").read_text()),
        "cpu": {name: cpu[name] for name in ("model name", "cpu family", "model")},
        "environment_variables": PORTABLE,
    }
    (HERE / "made.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

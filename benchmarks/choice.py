"""`minillm bench choice`: the corpus that the experiment `miniplm` chooses from, and what runs have kept of it.

Half of the documents are stories as they are, a quarter are other stories with their words in random order, and a quarter
are a few stories again and again: the best half to choose holds the first kind alone. Each kind is a file in each of two
random halves of the corpus.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from minillm import UserError
from minillm.benchmarks.machine import show_page
from minillm.config.paths import expand
from minillm.data.selection import SELECTION
from minillm.data.sources import read_texts

HALVES = ("half-a", "half-b")
KINDS = ("clean", "shuffled", "repeated")
REPEATS = 40  # of a story in `repeated`


def main(argv: list[str] | None = None) -> int:
    """Writes the corpus with --corpus, and prints a table of RUNs; writes that with --output. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    if arguments.corpus:
        texts = [text for _, text in read_texts(expand(arguments.stories))][arguments.skip :]
        write_corpus(texts, Path(arguments.corpus), arguments.seed)
    if arguments.runs:
        show_page(kept_table(arguments.runs), arguments.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minillm bench choice", description=__doc__.partition("\n\n")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="runs or experiments with a stage of miniplm")
    parser.add_argument("--corpus", metavar="DIR", help="write the corpus into this folder")
    parser.add_argument(
        "--stories",
        metavar="FILES",
        default="$MINILLM_ASSETS/data/tinystories/stories.jsonl",
        help="texts that it is made of (default: %(default)s)",
    )
    parser.add_argument("--skip", type=int, default=128, help="texts that are held out (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the corpus (default: %(default)s)")
    parser.add_argument("--output", metavar="MD", help="write the table")
    return parser


def write_corpus(texts: Sequence[str], folder: Path, seed: int) -> None:
    """Write DIR/half-{a,b}/{clean,shuffled,repeated}.jsonl: twice as many clean documents as of either other kind, of
    different stories.

    Raises UserError for too few texts.
    """
    generator = random.Random(seed)
    texts = generator.sample(texts, len(texts))
    # 2n stories as they are, n to be shuffled, and as many as n documents need to be repeated
    size = len(texts) * REPEATS // (3 * REPEATS + 1)
    if size < 1:
        raise UserError(f"--stories: {len(texts)} texts are too few for the three kinds; 4 is the least")
    clean, shuffled, repeated = texts[: 2 * size], texts[2 * size : 3 * size], texts[3 * size :]
    documents = {
        "clean": clean,
        "shuffled": [" ".join(generator.sample(words := text.split(), len(words))) for text in shuffled],
        "repeated": [repeated[place // REPEATS] for place in range(size)],
    }
    every = [(kind, text) for kind in KINDS for text in documents[kind]]
    generator.shuffle(every)
    for half, name in enumerate(HALVES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for kind in KINDS:
            lines = [json.dumps({"text": text}) + "\n" for one, text in every[half::2] if one == kind]
            (folder / name / f"{kind}.jsonl").write_text("".join(lines), encoding="utf-8")


def kept_table(runs: Sequence[str]) -> Iterator[str]:
    """Lines of a Markdown table: of each stage that chose, the documents of each kind and the part of them that it kept.

    Raises UserError for a folder without one.
    """
    yield "| stage | kind | documents | kept, % | of a random choice of as many, % |"
    yield "|---|---|--:|--:|--:|"
    for run in runs:
        found = sorted(Path(run).rglob(SELECTION))
        if not found:
            raise UserError(f"{run} has no {SELECTION} below it: no stage of miniplm has ended there")
        for path in found:
            counts = {kind: [0, 0] for kind in KINDS}  # documents, kept
            for source in json.loads(path.read_text(encoding="utf-8"))["sources"]:
                kind = Path(source["source"]).stem
                if kind not in counts:
                    raise UserError(f"{path}: {source['source']} is no file of --corpus")
                counts[kind][0] += source["documents"]
                counts[kind][1] += source["kept"]
            total, kept = (sum(column) for column in zip(*counts.values(), strict=True))
            for kind, (documents, part) in counts.items():
                yield f"| {path.parent} | {kind} | {documents} | {100 * part / documents:.1f} | {100 * kept / total:.1f} |"


if __name__ == "__main__":
    sys.exit(main())

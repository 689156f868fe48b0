"""MiniPLM (arXiv 2410.17215): difference sampling, which chooses the documents of a corpus that a teacher finds likelier
than a weaker reference model does. A later stage trains on them, with whatever tokenizer: it reads their text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from minillm.data.score_shards import Scores, ScoreShards, text_hash
from minillm.data.selection import choose, write_selection
from minillm.data.windows import document_ids
from minillm.distributed import collectives
from minillm.methods.protocol import Item, Method, Term, TrainingData
from minillm.methods.written_answers import identity_of
from minillm.models.batch import TokenSequence, collate
from minillm.rollout.scoring import batch_statistics
from minillm.teachers.pair import Models

# The keys of the teacher that its scores depend on.
OF_THE_TEACHER = {"path", "revision", "tokenizer", "dtype", "quantization"}
FIELDS = ("teacher_logprob", "student_logprob")


class DifferenceSampling(Method):
    """s(x) = (1/T) log p(x)/p_ref(x), the mean over the T tokens of a document that do not follow an EOS; the highest
    `ratio` of the corpus is kept, equals by their place, in the order of the corpus.

    A document's ids end with EOS, and its first token is only fed. One that is longer than data.corpus.block_size is read
    in windows of as many ids, of which the last one is the first of the next: every token after the first is predicted
    once, and each window without what was before it. Its score is still one mean over all T tokens.

    Both models read every window once, side by side, at most train.per_device_train_batch_size of them. Pieces of
    the corpus are dealt to the ranks, and each is scored as a whole: the same sums, whoever does it and whatever was
    interrupted.

    The released code differs in what is a document: it joins the texts of a domain and cuts them into chunks of 1,025 tokens,
    which it shuffles, and it drops what is left over at the end; here documents stay whole and in order. Its sort leaves
    the choice between equals open, and its int(ratio * n) can be one too few.
    """

    def collect(self, data: TrainingData, models: Models, draw: int) -> Sequence[Item]:
        raise TypeError("a stage of miniplm takes no step, so that there is nothing to collect")

    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        raise TypeError("a stage of miniplm takes no step, so that it has no loss")

    def prepare(self, data: TrainingData, models: Models, folder: Path) -> None:
        shards, ratio = ScoreShards(data.folder / "scores"), self.config.method.ratio
        missing = collectives.on_rank_0(lambda: shards.prepare(self._scored_by(models), data.documents))
        with models.reading("student", "teacher"):
            collectives.together(lambda: self._score(missing, shards, data, models))

        def write() -> None:
            scores = shards.read(data.documents)
            write_selection(data.documents, scores, choose(scores, ratio), folder, ratio=ratio)

        collectives.on_rank_0(write)

    def _scored_by(self, models: Models) -> dict:
        """The settings that the scores depend on, in words that JSON knows."""
        return {
            "teacher": identity_of(self.config.teacher, models, OF_THE_TEACHER),
            "reference": self.config.method.reference,
            "corpus": self.config.data.corpus.model_dump(mode="json"),
        }

    def _score(self, missing: Sequence[int], shards: ScoreShards, data: TrainingData, models: Models) -> None:
        mine = {missing[place] for place in collectives.rank_slice(len(missing))}
        done, total = len(data.documents.pieces) - len(missing), len(data.documents.pieces)
        for piece, found in data.documents.read_pieces(mine.__contains__):
            scores = score_texts(
                models,
                [text for _, text in found],
                window=self.config.data.corpus.block_size,
                batch_size=self.config.train.per_device_train_batch_size,
            )
            shards.write(piece, scores)
            done += collectives.world_size()  # about as many are done by the others
            data.report_progress("pieces of the corpus scored", min(done, total), total)


@torch.no_grad()
def score_texts(models: Models, texts: Sequence[str], *, window: int, batch_size: int) -> Scores:
    """The mean negative log-likelihoods of teacher and reference (`models.student`), as DifferenceSampling says.

    Args:
        texts: n documents.
        window: ids that a model reads and predicts at a time, two or more.
        batch_size: windows side by side, those of a like length together.
    """
    eos = models.tokenizer.eos_token_id
    ids = [[*document_ids(models.tokenizer, text), eos] for text in texts]
    models.require_shared("data.corpus", ids)
    windows = [
        TokenSequence(one[start : start + 1], one[start + 1 : start + window], key=document)
        for document, one in enumerate(ids)
        for start in range(0, len(one) - 1, window - 1)
    ]
    order = sorted(range(len(windows)), key=lambda place: len(windows[place].response))
    sums = np.zeros((len(windows), len(FIELDS)))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([windows[place] for place in chosen], models.pad_id).to(models.device)
        stats = batch_statistics(models, batch, models.teacher.rows(batch), FIELDS)
        counted = (batch.input_ids.flatten()[batch.rows] != eos).cpu()  # (N,)
        for column, name in enumerate(FIELDS):
            logprobs = torch.where(counted, getattr(stats, name).cpu().double(), 0.0)  # (N,)
            sums[chosen, column] = [one.sum().item() for one in batch.split(logprobs)]
    tokens, totals = np.zeros(len(texts), np.int64), np.zeros((len(texts), len(FIELDS)))
    for place, one in enumerate(windows):
        totals[one.key] -= sums[place]
        tokens[one.key] += sum(token != eos for token in (one.prompt + one.response)[:-1])
    teacher, reference = (totals / np.maximum(tokens, 1)[:, None]).T
    return Scores(tokens, teacher.copy(), reference.copy(), np.array(list(map(text_hash, texts)), np.uint64))


METHOD = DifferenceSampling

"""Several teachers: each is asked about its own records, or all about every one, and their words are taken as one loss."""

from dataclasses import replace

import pytest
import torch

from minillm import UserError
from minillm.config.methods.kd_keys import KD
from minillm.config.needs import ABILITIES
from minillm.engine.module import TermLoss
from minillm.losses import TopK
from minillm.methods.supervised import mixed_term
from minillm.models.batch import TokenSequence, collate
from minillm.models.tokenizers import byte_tokenizer
from minillm.rollout.rollouts import Answer
from minillm.rollout.scoring import score
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models
from minillm.teachers.preflight import preflight
from minillm.teachers.several import SeveralTeachers, shares_of
from minillm.teachers.teacher import TopKRows
from minillm.teachers.vocabularies import PreflightError
from tests.conftest import tiny_llama
from tests.other_tokenizer import small_bpe

VOCAB = 61
# of three lengths, neither teacher's side by side; the last is another teacher's than the first
SEQUENCES = [
    TokenSequence([5, 6], [7, 8, 9], 0, judge="math"),
    TokenSequence([3], [4], 1, judge="chat"),
    TokenSequence([9, 2, 8], [1, 60, 2, 5], 2, judge="math"),
    TokenSequence([11], [12, 13], 3, judge="chat"),
]
WEIGHTS = {"math": 0.7, "chat": 0.3}
READS = frozenset({"read", "logprobs"})


def teacher(seed: int, *, hidden_size: int = 32, vocab_size: int = VOCAB, dtype=torch.float32) -> LocalTeacher:
    model = tiny_llama(vocab_size=vocab_size, hidden_size=hidden_size, layers=1, seed=seed)
    return LocalTeacher(model.to(dtype).requires_grad_(False))


def several(weights: dict[str, float] | None = None, *, alike: bool = False, **options) -> SeveralTeachers:
    """Two teachers of different widths, with heads padded to different sizes; or the same one twice."""
    math = teacher(1, hidden_size=48, vocab_size=VOCAB + 3)
    return SeveralTeachers({"math": math, "chat": math if alike else teacher(2, **options)}, weights, READS)


def models_of(judge, *, seed: int = 0) -> Models:
    student = tiny_llama(vocab_size=VOCAB, layers=1, seed=seed)
    return Models(student, judge, byte_tokenizer(), VOCAB, (0,), 0, torch.device("cpu"))


def gradients(
    models: Models, sequences=SEQUENCES, **options
) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """The loss of a supervised term, the gradient of every weight of the student, and the metrics."""
    options = {"divergence": "forward_kl", "ce_ratio": 0.3, **options}
    term = mixed_term(sequences, models, **options)
    models.student.zero_grad()
    loss, metrics = TermLoss(models.student, vocab_size=VOCAB, backend="torch")(term)
    loss.backward()
    found = {name: one.grad.clone() for name, one in models.student.named_parameters()}
    return loss.item(), found, {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["by field", "weights"])
@pytest.mark.parametrize(
    "divergence", ["forward_kl", "reverse_kl", "jsd", "skew_reverse_kl", "interpolated_cross_entropy"]
)
def test_the_same_teacher_twice_is_that_teacher(weights, divergence):
    both = several(weights, alike=True)
    extra = {"options": {"interpolation": 0.4}} if divergence == "interpolated_cross_entropy" else {}
    loss, found, metrics = gradients(models_of(both), divergence=divergence, **extra)
    alone, expected, measured = gradients(models_of(both.teachers["math"]), divergence=divergence, **extra)
    assert loss == pytest.approx(alone, rel=1e-6)
    assert metrics == pytest.approx(measured, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_a_batch_of_one_teachers_records_is_that_teachers_bit_for_bit():
    both = several()
    own = [one for one in SEQUENCES if one.judge == "chat"]
    loss, found, metrics = gradients(models_of(both), own)
    alone, expected, measured = gradients(models_of(both.teachers["chat"]), own)
    assert (loss, metrics) == (alone, measured)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_the_loss_by_field_is_the_sum_over_the_records_of_each_teacher():
    both = several()
    loss, found, _ = gradients(models_of(both))
    parts = [
        gradients(models_of(one), [sequence for sequence in SEQUENCES if sequence.judge == name])
        for name, one in both.teachers.items()
    ]
    assert loss == pytest.approx(sum(part[0] for part in parts), rel=1e-6)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, sum(part[1][name] for part in parts), rtol=1e-5, atol=1e-6, msg=name)


def test_the_forward_kl_with_weights_has_the_gradient_of_that_to_the_arithmetic_mixture():
    """And the reverse KL that to the normalised geometric mean, by full logits in float64."""
    both = several(WEIGHTS)
    batch = collate(SEQUENCES, 0)

    def logprobs(model):  # (N, V) float64
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)[batch.rows]
        return logits[:, :VOCAB].double().log_softmax(-1)

    theirs = {name: logprobs(one.model) for name, one in both.teachers.items()}
    arithmetic = torch.stack([theirs[name] + torch.tensor(weight).log() for name, weight in WEIGHTS.items()]).logsumexp(
        0
    )
    geometric = sum(weight * theirs[name] for name, weight in WEIGHTS.items()).log_softmax(-1)
    for divergence in ("forward_kl", "reverse_kl"):
        models = models_of(both)
        _, found, _ = gradients(models, divergence=divergence, ce_ratio=0.0)
        models.student.zero_grad()
        q = logprobs(models.student)
        kl = arithmetic.exp() * (arithmetic - q) if divergence == "forward_kl" else q.exp() * (q - geometric)
        kl.sum().backward()
        for name, one in models.student.named_parameters():
            torch.testing.assert_close(found[name], one.grad, rtol=1e-4, atol=1e-5, msg=f"{divergence} {name}")


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["by field", "weights"])
def test_a_cross_entropy_beside_the_whole_divergence_counts_once(weights):
    """kd with ce_coef 1.5: sum_i w_i D_i + 1.5 CE."""
    keys, both = KD(name="kd", ce_coef=1.5), several(weights)
    loss, _, _ = gradients(models_of(both), ce_ratio=keys.ce_share)
    cross_entropy, _, _ = gradients(models_of(None), ce_ratio=1.0)
    apart = [
        (weights or {name: 1.0})[name] * gradients(models_of(one), own, ce_ratio=0.0)[0]
        for name, one in both.teachers.items()
        for own in [[one for one in SEQUENCES if weights or one.judge == name]]
    ]
    assert keys.weight * loss == pytest.approx(sum(apart) + 1.5 * cross_entropy, rel=1e-6)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["by field", "weights"])
def test_each_reads_what_it_is_told_of_the_texts_that_are_its(weights):
    both = several(weights)
    told = [replace(one, teacher_prompt=[50 + one.key] * (3 - one.key) + one.prompt) for one in SEQUENCES[:3]]
    texts = [*told, SEQUENCES[3]]
    for (name, one), share in zip(both.teachers.items(), both.rows(collate(texts, 0)).shares, strict=True):
        own = [text for text in texts if weights or text.judge == name]
        alone = one.rows(collate([replace(text, prompt=text.teacher_prompt or text.prompt) for text in own], 0))
        torch.testing.assert_close(share.rows.hidden, alone.hidden, rtol=1e-5, atol=1e-6)
        untold = one.rows(collate([replace(text, teacher_prompt=None) for text in own], 0))
        assert not torch.allclose(share.rows.hidden, untold.hidden, atol=1e-2)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["by field", "weights"])
def test_rows_come_back_from_their_parts(weights):
    """In a buffer rows of all teachers have one width and one dtype; each gets back its own."""
    both = several(weights, dtype=torch.bfloat16)
    rows = both.rows(collate(SEQUENCES, 0))
    parts = rows.parts()
    assert all(len(tensor) == 10 for tensor in parts.values())
    if weights is None:
        assert parts["hidden"].shape == (10, 48) and parts["hidden"].dtype == torch.float32
    back = both.rows_of(parts)
    for ours, theirs in zip(back.shares, rows.shares, strict=True):
        assert ours.weight == theirs.weight and ours.teacher is theirs.teacher
        assert torch.equal(ours.rows.hidden, theirs.rows.hidden) and ours.rows.hidden.dtype == theirs.rows.hidden.dtype
        assert ours.places is theirs.places is None or torch.equal(ours.places, theirs.places)


def test_rows_of_hidden_states_and_of_likeliest_ids_are_kept_side_by_side():
    class Likeliest:
        """A teacher that gives two ids."""

        abilities, model, vocab_size = frozenset(ABILITIES), None, VOCAB

        def rows(self, batch):
            found = torch.arange(len(batch.rows))
            return self.rows_of({"ids": torch.stack([found, found + 9], 1), "logprobs": -torch.ones(len(found), 2)})

        def rows_of(self, parts):
            return TopKRows(TopK(parts["ids"], parts["logprobs"]))

    from minillm.teachers import several as module

    form = {"ids": (2, torch.int64), "logprobs": (2, torch.float32)}
    both = SeveralTeachers({"math": Likeliest(), "chat": teacher(2)}, None, READS)
    with pytest.MonkeyPatch.context() as patch:
        known = module.row_form
        patch.setattr(module, "row_form", lambda one: form if isinstance(one, Likeliest) else known(one))
        rows = both.rows(collate(SEQUENCES, 0))
        parts = rows.parts()
        back = both.rows_of({name: torch.cat([tensor[8:], tensor[:8]]) for name, tensor in parts.items()})
    assert {name: tuple(one.shape) for name, one in parts.items()} == {
        "judge": (10,), "hidden": (10, 32), "ids": (10, 2), "logprobs": (10, 2)}  # fmt: skip
    chat, math = back.shares
    assert math.places.tolist() == [2, 3, 4, 6, 7, 8, 9] and chat.places.tolist() == [0, 1, 5]
    assert math.rows.top_k.ids[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_a_teacher_without_records_in_a_batch_is_not_asked():
    both = several()
    both.teachers["math"].model = None  # any use of it fails
    rows = both.rows(collate([one for one in SEQUENCES if one.judge == "chat"], 0))
    assert [(share.rows is None, share.is_empty) for share in shares_of(rows)] == [(False, False), (True, True)]


def test_a_text_without_a_teacher_of_its_own_is_refused():
    with pytest.raises(UserError, match="text with key 3 has None for its teacher; the teachers are chat, math"):
        several().rows(collate([*SEQUENCES[:3], replace(SEQUENCES[3], judge=None)], 0))
    bare = replace(collate(SEQUENCES, 0), sequences=())
    with pytest.raises(ValueError, match="a batch with 10 rows must be of sequences"):
        several().rows(bare)


def test_words_of_several_are_never_taken_for_those_of_one():
    rows = several(WEIGHTS).rows(collate(SEQUENCES, 0))
    with pytest.raises(UserError, match="several teachers were taken for those of one"), rows.for_losses():
        pass


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["by field", "weights"])
def test_scores_of_a_buffer_are_each_teachers_or_the_weighted_sums(weights):
    both = several(weights)
    answers = [Answer(one.prompt, one.response, True, torch.zeros(len(one.response))) for one in SEQUENCES]
    judges = [one.judge for one in SEQUENCES]
    options = {"keys": [0, 1, 2, 3], "batch_size": 2}
    buffer = score(models_of(both), answers, judges=judges, **options)
    alone = {name: score(models_of(one), answers, **options) for name, one in both.teachers.items()}
    for place, rollout in enumerate(buffer):
        own = {name: alone[name][place].vectors for name in alone}
        assert rollout.judge == judges[place]
        torch.testing.assert_close(rollout.vectors["student_logprob"], own["math"]["student_logprob"])
        for field in ("teacher_logprob", "reverse_kl"):
            expected = (
                own[rollout.judge][field] if weights is None else sum(w * own[n][field] for n, w in WEIGHTS.items())
            )
            torch.testing.assert_close(rollout.vectors[field], expected, rtol=1e-5, atol=1e-5)


def test_abilities_are_what_all_of_them_can():
    assert several().abilities == READS
    ones = several().teachers
    ones["chat"].abilities = frozenset({"read", "sample"})
    assert SeveralTeachers(ones, None, READS).abilities == {"read"}


def test_the_shared_ids_are_those_of_all_heads_and_every_end_ends():
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    math, chat = (teacher(seed, vocab_size=size + more) for seed, more in ((1, 0), (2, 7)))
    chat.model.generation_config.eos_token_id = [7]
    both = SeveralTeachers({"math": math, "chat": chat}, WEIGHTS, READS)
    models, rows = preflight(
        tiny_llama(vocab_size=size + 2), both, tokenizer, {"math": tokenizer, "chat": tokenizer}, torch.device("cpu")
    )
    assert models.vocab_size == size and {7, tokenizer.eos_token_id} <= set(models.eos_ids)
    table = {name: theirs for name, _, theirs in rows}
    assert table["head rows"] == f"chat: {size + 7:,}, cut to {size:,}; math: {size:,}"
    assert table["model"] == "LlamaForCausalLM"


def test_a_tokenizer_that_is_not_the_students_is_refused_by_the_teachers_name():
    tokenizer = byte_tokenizer()
    both = SeveralTeachers({"math": teacher(1, vocab_size=400), "chat": teacher(2, vocab_size=400)}, None, READS)
    with pytest.raises(PreflightError, match="teacher 'math': student and teacher have different tokenizers"):
        preflight(
            tiny_llama(vocab_size=400), both, tokenizer, {"math": small_bpe(), "chat": tokenizer}, torch.device("cpu")
        )

"""A stage's sizes from what its method declares, against counts by hand."""

import pytest

from minillm import UserError
from minillm.config.loader.run_plan import load_run
from minillm.planning.work import Decoding, Forward, NothingToPlan, TermShape, work_of
from tests.planning.elsewhere import Elsewhere, Sieve
from tests.planning.small import ANSWER, PROMPT

MICRO, BLOCK = 4, 17
LENGTH, ROWS = PROMPT + ANSWER - 1, MICRO * ANSWER


@pytest.fixture
def work(recipe):
    """The work of the small configuration with another method, on one rank."""

    def make(method, *overrides, ranks=1, prompts=True):
        named = isinstance(method, dict)
        # plain text and pairs must have a use in what is loaded, whatever takes its place
        uses = {"data.corpus": {"name": "minillm"}, "data.pairs": {"name": "dpkd", "pairs": "data", "lm_coef": 0.0}}
        base = next((uses[key] for key in uses if any(one.startswith(key) for one in overrides)), {"name": "sft"})
        (stage,) = load_run([recipe(method=method if named else base)], overrides).stages
        changed = {} if named else {"method": method}
        if not prompts:
            changed["data"] = stage.config.data.model_copy(update={"prompts": None})
        return work_of(stage.config.model_copy(update=changed), ranks)

    return make


def elsewhere(**keys):
    return Elsewhere(name="elsewhere", **keys)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus.txt").write_text("plain text")
    return f"data.corpus={{path: {tmp_path / 'corpus.txt'}, block_size: {BLOCK}}}"


@pytest.fixture
def pairs(tmp_path):
    """Pairs with lengths of their own: prompts of 20 tokens and answers of 9, which are 28 that are fed."""
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}')
    return f"data.pairs={{path: {tmp_path / 'pairs.jsonl'}, max_prompt_length: 20, max_response_length: 9}}"


@pytest.mark.parametrize(("alpha", "models"), [(0.0, ("student",)), (0.5, ("student", "teacher")), (1.0, ("teacher",))])
def test_a_buffer_is_sampled_and_scored_once_for_the_steps_of_its_epochs(work, alpha, models):
    """Eight answers, four side by side, in steps of four, twice over."""
    found = work({"name": "minillm", "lm_coef": 0.0, "alpha": alpha}, "rollout.shared_coins=false")
    assert found.decodings == (Decoding(models, 4, PROMPT, ANSWER, total=8, ahead=1),)
    if alpha:
        assert found.scorings == (Forward(("teacher", "student"), 4, LENGTH, 4 * ANSWER, True, total=8),)
    assert found.terms == (TermShape("policy", MICRO, LENGTH, ROWS, teacher=True, from_buffer=True),)
    assert (found.buffered, found.steps_per_collection) == (8, 4)
    several = work({"name": "minillm", "lm_coef": 0.0, "alpha": alpha}, "rollout.answers_per_prompt=2")
    assert several.decodings == (Decoding(models, 4, PROMPT, ANSWER, total=8, per_prompt=2, ahead=1),)


@pytest.mark.parametrize(
    ("method", "keys", "students"),
    [
        ({"name": "minillm", "lm_coef": 0.0, "alpha": 0.0}, ("train.bf16=true",), 1),
        # whose weights are bf16, in which a look at one says nothing
        ({"name": "minillm", "lm_coef": 0.0, "alpha": 0.0}, ("train.bf16=true", "engine.type=deepspeed"), 8),
        ({"name": "opd"}, ("train.bf16=true",), 8),  # which reads the reverse KL
    ],
)
def test_the_students_own_answers_are_scored_as_they_were_drawn(work, method, keys, students):
    """By a pass of the teacher, and a look of the student at one of them."""
    found = work(method, *keys)
    read = {name: one.total for one in found.scorings for name in one.models}
    assert read == {"teacher": 8, "student": students}


def test_they_are_beside_a_served_teacher_too(work):
    """Whose head is here, and reads the hidden states that it sends."""
    served = "teacher={type: served, url: 'http://127.0.0.1:9', model: teacher}"
    look, scores = work({"name": "minillm", "lm_coef": 0.0, "alpha": 0.0}, served).scorings
    assert (look.models, look.total) == (("student",), 1)
    assert (scores.models, scores.kept, scores.total) == ((), ("teacher",), 8)


def test_prompts_are_read_ahead_where_rows_are_refilled(work):
    method = {"name": "minillm", "lm_coef": 0.0}
    layers, both = ("engine.type=deepspeed", "engine.stage=3", "engine.gather=layers"), "rollout.shared_coins=false"
    for keys, ahead in (
        (("rollout.buffer_size=32", "rollout.batch_size=16", both), 4),
        (("rollout.batch_size=8", both), 0),  # no prompt waits
        ((), 0),  # nor reads one beside answers by shared coins
        ((*layers, both), 0),
    ):
        assert [one.ahead for one in work(method, *keys).decodings] == [ahead]


@pytest.mark.parametrize(
    ("keys", "scoring"),
    [
        (("train.bf16=true",), Forward(("student",), 1, LENGTH, ANSWER, True, total=1)),
        (
            ("engine.type=deepspeed", "train.bf16=true"),
            Forward(("student",), 4, LENGTH, 4 * ANSWER, True, total=8, kept=("teacher",)),
        ),
    ],
)
def test_answers_by_shared_coins_are_scored_without_the_teacher(work, keys, scoring):
    method = {"name": "minillm", "lm_coef": 0.0, "alpha": 0.25}
    found = work(method, *keys)  # the default
    (decoding,) = found.decodings
    assert decoding == Decoding(("student", "teacher"), 4, PROMPT, ANSWER, total=8, teacher_share=0.25)
    assert (decoding.asked_share("teacher"), decoding.asked_share("student")) == (0.25, 0.75)
    assert found.scorings == (scoring,)


def test_a_rank_samples_and_scores_its_slice_of_the_buffer(work):
    found = work({"name": "minillm", "lm_coef": 0.0}, "engine.type=deepspeed", "rollout.shared_coins=false", ranks=2)
    assert found.decodings[0].total == found.scorings[0].total == 4
    assert (found.buffered, found.steps_per_collection) == (8, 2)


def test_the_pretraining_term_is_of_blocks_whose_teacher_runs_in_the_step(work, corpus):
    found = work({"name": "minillm", "pt_kd_ratio": 0.5}, corpus)
    policy, pretraining = found.terms
    fed = BLOCK - 1
    assert pretraining == TermShape(
        "pretraining", MICRO, fed, MICRO * fed, teacher=True, from_buffer=False, prompted=False
    )
    assert policy.prompted
    assert found.judged_in_the_step == (pretraining,) and len(found.scorings) == 1


@pytest.mark.parametrize(("answer", "reference", "longest"), [(5, 9, 9), (9, 5, 9)])
def test_steps_of_different_texts_count_at_the_longer_one(work, answer, reference, longest):
    """gkd's, of the student's answers and of references."""
    lengths = (f"rollout.max_new_tokens={answer}", f"data.prompts.max_response_length={reference}")
    found = work({"name": "gkd"}, *lengths)
    (term,) = found.terms
    assert (term.length, term.rows) == (PROMPT + longest - 1, MICRO * longest)
    assert found.decodings == (Decoding(("student",), 4, PROMPT, answer, total=MICRO),)


def test_answers_written_before_the_first_step_cost_a_step_nothing(work):
    plain, judged = (work({"name": "seqkd", "kd_ratio": ratio}) for ratio in (0.0, 0.5))
    assert plain.decodings == judged.decodings == (Decoding(("teacher",), 4, PROMPT, ANSWER, total=0),)
    assert plain.scorings == ()
    assert judged.scorings == (Forward(("teacher",), MICRO, LENGTH, ROWS, False, total=MICRO),)


def test_a_teacher_that_no_term_reads_does_not_run(work):
    assert work({"name": "kd", "ce_ratio": 1.0}).scorings == ()
    assert work({"name": "kd", "ce_ratio": 0.5}).scorings != ()


def test_every_sampler_answers_every_prompt_of_a_step(work):
    found = work(elsewhere(samplers=["student", "teacher"]), "train.gradient_accumulation_steps=3")
    assert [(one.models, one.total, one.batch) for one in found.decodings] == [
        (("student",), 12, 4),
        (("teacher",), 12, 4),
    ]
    assert found.steps_per_collection == 1 and found.buffered == 0


def test_a_buffer_keeps_the_answers_of_all_samplers(work):
    found = work(elsewhere(samplers=["student", "teacher"], buffered=True, judged=True))
    assert [one.total for one in found.decodings] == [8, 8]
    assert found.scorings == (Forward(("teacher", "student"), 4, LENGTH, 4 * ANSWER, True, total=16),)
    assert (found.buffered, found.steps_per_collection) == (16, 4)


def test_a_pair_is_two_sequences_of_every_item(work, pairs):
    found = work(elsewhere(rows=["pairs"], judged=True), pairs)
    rows = 2 * MICRO * 9
    assert found.terms == (TermShape("imitation", 2 * MICRO, 28, rows, teacher=True, from_buffer=False),)
    assert found.scorings == (Forward(("teacher",), 2 * MICRO, 28, rows, False, total=2 * MICRO),)


def test_a_reference_that_is_kept_reads_the_pairs_beside_the_step(work, pairs):
    found = work({"name": "dpkd", "pairs": "data", "lm_coef": 0.0}, pairs, prompts=False)
    rows = 2 * MICRO * 9
    assert found.terms == (TermShape("preference", 2 * MICRO, 28, rows, teacher=False, from_buffer=False),)
    assert found.scorings == (Forward(("teacher",), 2 * MICRO, 28, rows, True, total=2 * MICRO),)
    assert not found.decodings
    free = work({"name": "dpkd", "pairs": "data", "lm_coef": 0.0, "reference_free": True}, pairs)
    assert free.terms == found.terms and free.scorings == ()


def test_a_method_of_plain_text_needs_no_prompts(work, corpus):
    found = work(elsewhere(rows=["corpus"]), corpus, prompts=False)
    assert found.terms == (TermShape("imitation", MICRO, BLOCK - 1, MICRO * (BLOCK - 1), False, False, prompted=False),)


def test_what_gives_the_length_is_missed_by_name(work):
    with pytest.raises(UserError, match="data.prompts is missing"):
        work(elsewhere(), prompts=False)
    with pytest.raises(UserError, match="data.corpus is missing"):
        work(elsewhere(rows=["corpus"]))
    with pytest.raises(UserError, match="data.pairs is missing"):
        work(elsewhere(rows=["pairs"]))


def test_a_stage_without_steps_reads_with_both_models(work, corpus):
    found = work(Sieve(name="sieve"), corpus)
    fed = BLOCK - 1
    assert found.terms == () and found.decodings == ()
    assert found.scorings == (
        Forward(("teacher", "student"), MICRO, fed, MICRO * fed, True, total=MICRO, prompted=False),
    )
    with pytest.raises(NothingToPlan, match="method sieve takes no step and declares neither answers nor texts"):
        work(Sieve(name="sieve", corpus=False))


def test_a_buffer_of_no_whole_number_of_steps_is_refused(work):
    with pytest.raises(UserError, match="rollout.buffer_size 8 does not divide into steps of 4 x 1 on 3 ranks"):
        work({"name": "minillm", "lm_coef": 0.0}, "engine.type=deepspeed", ranks=3)


@pytest.mark.parametrize(
    ("method", "models"),
    [({"name": "kd"}, ("teacher",)), ({"name": "opd"}, ("teacher", "student"))],
)
def test_a_teacher_that_is_told_more_reads_longer_texts(work, method, models):
    told = ("data.prompts.teacher_context=name", "data.prompts.max_teacher_prompt_length=50")
    (forward,) = work(method, *told).scorings
    assert forward.models == models
    assert (forward.length_of("student"), forward.length_of("teacher")) == (LENGTH, 50 + ANSWER - 1)
    (untold,) = work(method).scorings
    assert untold.length_of("teacher") == LENGTH
    (term,) = work(method, *told).terms
    assert term.length == LENGTH


def test_a_teacher_that_answers_reads_what_it_is_told(work):
    told = ("data.prompts.teacher_context=name", "data.prompts.max_teacher_prompt_length=50")
    prompts = {one.models: one.prompt for one in work({"name": "distillm2"}, *told).decodings}
    assert prompts == {("teacher",): 50, ("student",): PROMPT}
    (cached,) = work({"name": "cache"}, *told).scorings
    assert cached.length == 50 + ANSWER - 1  # in a stage of which it is the only model
    evaluated = (
        "eval.sets.a={type: pydoc, max_prompt_length: 30, max_response_length: 9, teacher_context: name, max_teacher_prompt_length: 70}",
        "eval.max_new_tokens=20",
    )
    student, teacher, forward = work({"name": "kd"}, *evaluated).evaluation
    assert (student.prompt, teacher.prompt, forward.length_of("student"), forward.length_of("teacher")) == (
        30,
        70,
        49,
        89,
    )

"""The work of one step as sizes: batches, lengths and the models that take part, from what the method declares.

Every prompt and every answer counts at its longest: a plan is for the worst batch.
"""

from dataclasses import dataclass, replace
from typing import Literal

from minillm import UserError
from minillm.config.data import PlainPrompts, Prompts, RecordKeys
from minillm.config.models import TeacherConfig, teachers_of
from minillm.config.needs import Needs, Rows, Sampler, TermNeeds
from minillm.config.root import StageConfig
from minillm.planning.setting import Setting
from minillm.rollout.local.lagging_decoder import LONGEST_BLOCK
from minillm.rollout.local.shared_prompts import prompts_ahead
from minillm.rollout.local.static_loop import static_room

SAMPLING_MODELS: dict[Sampler, tuple[str, ...]] = {
    "student": ("student",),
    "teacher": ("teacher",),
    "mixture": ("student", "teacher"),
}


class NothingToPlan(UserError):
    """A stage in which no model runs over any text that is known beforehand."""


@dataclass(frozen=True)
class Decoding:
    """Sampling of one kind of answers, `batch` of them side by side."""

    models: tuple[str, ...]  # student, teacher
    batch: int
    prompt: int  # tokens
    answer: int  # tokens
    total: int  # answers of a buffer, on one rank
    per_prompt: int = 1  # of them to each prompt, which is read once for those
    ahead: int = 0  # prompts that are read while rows are full, and wait for one that ends
    cuda_graphs: bool = False
    # of the tokens, where shared coins say which model is asked and the other one catches up; None: all run for each token
    teacher_share: float | None = None

    @property
    def block(self) -> int:
        """Tokens of the longest block in which a model catches up."""
        return min(LONGEST_BLOCK, self.answer - 1)

    def asked_share(self, model: str) -> float:
        """The part of the tokens for which a model is asked."""
        if self.teacher_share is None:
            return 1.0
        return self.teacher_share if model == "teacher" else 1.0 - self.teacher_share

    @property
    def room(self) -> int:
        """Tokens that the caches hold for each answer; the last one is never fed."""
        return static_room(self.prompt, self.answer) if self.cuda_graphs else self.prompt + self.answer - 1

    @property
    def reads_heads(self) -> bool:
        """True where the LM heads take part."""
        return True


@dataclass(frozen=True)
class Forward:
    """Forward passes without a gradient."""

    models: tuple[str, ...]
    batch: int
    length: int  # tokens fed
    rows: int  # of them predict what counts
    statistics: bool  # linear_token_stats follows
    total: int  # sequences of a buffer or step, on one rank
    kept: tuple[str, ...] = ()  # models whose hidden states are there from before, for the statistics
    layers: tuple[int, ...] = (-1,)  # of the teacher whose hidden states at the rows are kept, -1 what its head reads
    prompted: bool = True  # its texts begin with prompts, which may show pictures
    teacher_length: int | None = None  # tokens that the teacher is fed; None: as many as the student

    def length_of(self, model: str) -> int:
        """Tokens that a model is fed."""
        return self.length if model != "teacher" or self.teacher_length is None else self.teacher_length

    @property
    def reads_heads(self) -> bool:
        """True where the LM heads take part; without them it is the teacher of a supervised step."""
        return self.statistics


@dataclass(frozen=True)
class TermShape:
    """One summand of the loss of a micro-batch."""

    name: str
    batch: int  # sequences
    length: int  # tokens fed
    rows: int  # of all sequences, predictions that count
    teacher: bool  # reads the teacher's rows
    from_buffer: bool  # its teacher's hidden states come from the rollout buffer, which lies on the CPU
    trains: str = "student"  # student, teacher
    summed: bool = False  # both models' logits are added up
    sorts: bool = False  # the probabilities of both are sorted, beside a loss of the student alone
    standardizes: bool = False  # logits of both are standardised, beside a loss of the student alone
    features: tuple[tuple[int, int], ...] = ()  # layers of student and teacher that a trained projector each connects
    feature_rows: int = 0  # of all sequences, positions whose features are projected
    affinity_rows: int = 0  # of all sequences, positions whose last hidden states are compared with each other
    prompted: bool = True  # its texts begin with prompts, which may show pictures


@dataclass(frozen=True)
class Work:
    """One step on one rank, with its part of the collection before it."""

    decodings: tuple[Decoding, ...]  # one after the other: every sampler answers every prompt of a collection
    scorings: tuple[Forward, ...]  # of a collection where it is buffered, else of every step
    terms: tuple[TermShape, ...]  # empty where the stage takes no step
    micro_batches: int
    steps_per_collection: int
    buffered: int  # answers kept with the teacher's hidden states, of all ranks
    evaluation: tuple[Decoding | Forward, ...] = ()  # between steps: what is held is of one at a time
    written: Literal["weights", "checkpoint"] | None = None  # from a copy, while steps are taken: the most at a time

    @property
    def moment(self) -> "Work":
        """This work without its repetitions, which memory on a device does not depend on."""
        return replace(
            self,
            decodings=tuple(replace(one, total=0) for one in self.decodings),
            scorings=tuple(replace(one, total=0) for one in self.scorings),
            micro_batches=min(self.micro_batches, 2),
            steps_per_collection=1,
            buffered=0,
            written=None,
        )

    @property
    def judged_in_the_step(self) -> tuple[TermShape, ...]:
        """Terms beside a buffer's whose teacher runs anew in every step, which `scorings` does not count."""
        return tuple(term for term in self.terms if self.buffered and term.teacher and not term.from_buffer)

    def waiting_rows(self, *, from_buffer: bool) -> int:
        """Rows of the teacher's hidden states that all micro-batches of a step hold before it begins."""
        terms = [term for term in self.terms if term.teacher and term.from_buffer == from_buffer]
        return self.micro_batches * sum(term.rows + term.feature_rows * len(term.features) for term in terms)


@dataclass(frozen=True)
class _Text:
    """The sequences of one item of a step, at their longest."""

    sequences: int
    length: int  # tokens fed
    rows: int  # of one sequence, predictions that count
    prompted: bool = True  # it begins with a prompt
    teacher_length: int | None = None  # tokens fed, where the teacher is told more than the student

    def forward(self, models: tuple[str, ...], items: int, *, statistics: bool, total: int, **of_teacher) -> Forward:
        batch = items * self.sequences
        return Forward(
            models,
            batch,
            self.length,
            batch * self.rows,
            statistics,
            total * self.sequences,
            prompted=self.prompted,
            teacher_length=self.teacher_length,
            **of_teacher,
        )

    def at(self, *, prompts: bool) -> "_Text":
        """The same text, every position of which counts where `prompts` says so."""
        return replace(self, rows=self.length) if prompts else self


def work_of(config: StageConfig, world_size: int) -> Work:
    """Compute the sizes of a stage.

    Raises UserError where a length is not known, or a buffer holds no whole number of steps, and NothingToPlan where
    the stage takes no step and declares no texts.
    """
    needs, train, rollout = config.method.needs(), config.train, config.rollout
    micro, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    step = micro * accumulation
    prompts = 0 if needs.written_once else step  # answered for a step; written once, before the first
    if needs.buffered:
        if rollout.buffer_size % (step * world_size):
            raise UserError(
                f"rollout.buffer_size {rollout.buffer_size} does not divide into steps of {micro} x {accumulation} on "
                f"{world_size} ranks"
            )
        prompts = rollout.buffer_size // world_size
    side_by_side = min(rollout.batch_size, prompts or rollout.batch_size)
    return Work(
        decodings=tuple(
            Decoding(
                ("student",) if needs.alone else SAMPLING_MODELS[sampler],
                side_by_side,
                _asked_length(config, sampler),
                rollout.max_new_tokens,
                prompts,
                rollout.answers_per_prompt if needs.several_answers else 1,
                _read_ahead(config, sampler, prompts, side_by_side),
                rollout.cuda_graphs,
                needs.teacher_share if sampler == "mixture" and rollout.by_coins else None,
            )
            for sampler in needs.samples
            if sampler != "teacher" or _reads_here(config)  # else it has written its answers, or writes them elsewhere
        ),
        scorings=_scorings(config, needs, side_by_side, prompts),
        terms=_terms(config, needs),
        micro_batches=accumulation,
        steps_per_collection=prompts * needs.inner_epochs // step if needs.buffered else 1,
        buffered=rollout.buffer_size * len(needs.samples) if needs.buffered else 0,
        evaluation=_evaluation(config),
        written=_written(config, needs),
    )


def _written(config: StageConfig, needs: Needs) -> Literal["weights", "checkpoint"] | None:
    """The most that minillm.train.saver writes from a copy."""
    save = config.save
    if not needs.takes_steps or not save.in_background:
        return None
    return "checkpoint" if save.steps else "weights" if save.best and config.eval.sets else None


def _read_ahead(config: StageConfig, sampler: Sampler, answers: int, side_by_side: int) -> int:
    """Prompts that are read for rows that end, where there are more answers than rows and the loop refills them."""
    rollout, engine = config.rollout, config.engine
    by_layers = engine.type == "deepspeed" and engine.stage == 3 and engine.gather == "layers"
    by_coins = rollout.by_coins and sampler == "mixture"
    if answers <= side_by_side or by_layers or by_coins:
        return 0
    return prompts_ahead(side_by_side)


def _terms(config: StageConfig, needs: Needs) -> tuple[TermShape, ...]:
    micro, terms = config.train.per_device_train_batch_size, []
    for term in needs.terms:
        text = _longest(term, config)
        batch = micro * text.sequences
        from_buffer = needs.buffered and "answers" in term.rows
        terms.append(
            TermShape(
                term.name,
                batch,
                text.length,
                batch * text.at(prompts=term.prompts).rows * term.labels,
                term.teacher and not term.kept,
                from_buffer,
                term.trains,
                term.summed,
                term.sorts,
                term.standardizes,
                term.features,
                batch * text.at(prompts=term.features_prompts).rows * bool(term.features),
                batch * text.length * term.affinity,
                text.prompted,
            )
        )
    return tuple(terms)


def _scorings(config: StageConfig, needs: Needs, side_by_side: int, prompts: int) -> tuple[Forward, ...]:
    """The forward passes without a gradient: of a buffer, of the terms' teacher, or of a stage that takes no step."""
    micro, two = config.train.per_device_train_batch_size, needs.teacher and not needs.alone
    judges = ("teacher", "student") if two else ("student",)
    reader = ("teacher",) if _reads_here(config) else ()
    step = micro * config.train.gradient_accumulation_steps
    if needs.buffered:
        answers = _text("answers", config)
        if config.rollout.by_coins and "mixture" in needs.samples:
            return (_scored_by_coins(answers, config, side_by_side, prompts),)
        total = prompts * len(needs.samples)
        if needs.as_drawn and _teacher_alone_scores(config):
            by_teacher = answers.forward(("teacher",), side_by_side, statistics=True, total=total)
            return (_look_at_one(answers), _as_it_is(config, by_teacher))
        return (_as_it_is(config, answers.forward(judges, side_by_side, statistics=True, total=total)),)
    if needs.takes_steps:
        return tuple(
            _longest(term, config)
            .at(prompts=term.prompts or term.features_prompts or term.affinity)
            .forward(
                (*reader, "student") if term.scored else reader,
                micro,
                statistics=term.scored or term.kept,
                total=step,
                layers=(-1, *sorted({teacher for _, teacher in term.features} - {-1})),
            )
            for term in needs.terms
            if term.teacher and (reader or term.scored)
        )
    declared: dict[Rows, bool] = {"answers": bool(needs.samples), "references": needs.references, "pairs": needs.pairs,
                                  "corpus": needs.corpus}  # fmt: skip
    read = [_text(kind, config) for kind, there in declared.items() if there]
    if not read:
        raise NothingToPlan(
            f"method {config.method.name} takes no step and declares neither answers nor texts that a model reads"
        )
    return tuple(_as_it_is(config, text.forward(judges, micro, statistics=True, total=step)) for text in read)


def _reads_here(config: StageConfig) -> bool:
    """True where the weights of the teacher, or of one of several, are loaded; and where there is none."""
    teachers = teachers_of(config.teacher_side).values()
    return not teachers or any(isinstance(one, TeacherConfig) for one in teachers)


def _as_it_is(config: StageConfig, forward: Forward) -> Forward:
    """A pass in which a teacher that reads elsewhere does not run: its rows are there."""
    if _reads_here(config) or "teacher" not in forward.models:
        return forward
    here = tuple(name for name in forward.models if name != "teacher")
    kinds = {getattr(one, "rows", "hidden") for one in teachers_of(config.teacher_side).values()}
    return replace(forward, models=here, kept=() if kinds == {"top_k"} else ("teacher",))


def _scored_by_coins(answers: _Text, config: StageConfig, side_by_side: int, prompts: int) -> Forward:
    """The passes over answers whose sampling has measured both models: minillm.rollout.scoring."""
    if _looks_at_one(config):
        return _look_at_one(answers)
    return replace(answers.forward(("student",), side_by_side, statistics=True, total=prompts), kept=("teacher",))


def _teacher_alone_scores(config: StageConfig) -> bool:
    """True where what the student was sampled with is taken for its scores, beside the hidden states of one teacher."""
    teachers = [*teachers_of(config.teacher_side).values()]
    return [getattr(one, "rows", "hidden") for one in teachers] == ["hidden"] and _looks_at_one(config)


def _looks_at_one(config: StageConfig) -> bool:
    """True where what is known of the student's answers is compared with a full pass of it over one of them."""
    return Setting.of(config, checkpointing=False).student_dtype == "float32"


def _look_at_one(answers: _Text) -> Forward:
    return answers.forward(("student",), 1, statistics=True, total=1)


def _longest(term: TermNeeds, config: StageConfig) -> _Text:
    texts = (_text(kind, config) for kind in term.rows)
    longest = max(texts, key=lambda text: text.sequences * text.length)
    return replace(longest, sequences=longest.sequences * term.sequences)


def _text(kind: Rows, config: StageConfig) -> _Text:
    if kind == "corpus":
        if config.data.corpus is None:
            raise UserError("data.corpus is missing, so the length of its blocks is not known")
        fed = config.data.corpus.block_size - 1
        return _Text(1, fed, fed, prompted=False)
    if kind == "pairs":
        if config.data.pairs is None:
            raise UserError("data.pairs is missing, so the length of a pair is not known")
        answer = config.data.pairs.max_response_length
        return _Text(2, config.data.pairs.max_prompt_length + answer - 1, answer)
    prompts = _forgotten(config) if kind == "forget" else _prompts(config)
    answer = config.rollout.max_new_tokens if kind == "answers" else prompts.max_response_length
    fed = _prompt_length(prompts) + answer - 1
    if kind == "forget" or not config.method.needs().reads_context or not _told(prompts):
        return _Text(1, fed, answer)
    fed_to_teacher = prompts.longest_for_teacher + answer - 1
    return _Text(1, fed_to_teacher if config.method.needs().alone else fed, answer, teacher_length=fed_to_teacher)


def _prompts(config: StageConfig) -> Prompts:
    if config.data.prompts is None:
        raise UserError("data.prompts is missing, so the length of a prompt is not known")
    return config.data.prompts


def _forgotten(config: StageConfig) -> Prompts:
    if config.data.forget is None:
        raise UserError("data.forget is missing, so the length of an answer to forget is not known")
    return config.data.forget


def _evaluation(config: StageConfig) -> tuple[Decoding | Forward, ...]:
    """The passes of an evaluation: student and teacher answer, and both are run over answers and references."""
    keys, sets = config.eval, config.eval.sets.values()
    if not sets or not config.method.needs().takes_steps:
        return ()
    prompt = max(_prompt_length(prompts) for prompts in sets)
    batch = min(keys.batch_size, max(prompts.limit or keys.batch_size for prompts in sets))
    compared = not config.method.needs().other_tokenizer
    teacher = config.teacher_side
    judged = teacher is not None and keys.teacher and "read" in teacher.abilities and compared
    answers = judged and _reads_here(config) and "sample" in teacher.abilities
    longest = max(keys.max_new_tokens, *(prompts.max_response_length for prompts in sets))
    controls = config.method.needs().controls_teacher  # what answers is the teacher with the student's logits added
    samplers: tuple[Sampler, ...] = ("mixture" if controls else "student", "teacher")
    told = max(prompts.longest_for_teacher if _told(prompts) else _prompt_length(prompts) for prompts in sets)
    asked = max(prompts.limit or batch + 1 for prompts in sets)  # how many a set has is not known without a limit
    answering = [
        Decoding(
            SAMPLING_MODELS[one],
            batch,
            told if one == "teacher" else prompt,
            keys.max_new_tokens,
            0,
            ahead=_read_ahead(config, one, asked, batch),
            cuda_graphs=config.rollout.cuda_graphs,
        )
        for one in samplers[: 1 + answers]
    ]
    models = ("teacher", "student") if judged or controls else ("student",)
    forward = Forward(models, batch, prompt + longest - 1, batch * longest, True, 0)
    if told > prompt:
        forward = replace(forward, teacher_length=told + longest - 1)
    return (*answering, _as_it_is(config, forward))


def _asked_length(config: StageConfig, sampler: Sampler) -> int:
    """Tokens of the longest prompt that is answered."""
    needs = config.method.needs()
    if needs.few_shot is not None:
        return needs.few_shot.max_prompt_length
    prompts = _prompts(config)
    return prompts.longest_for_teacher if sampler == "teacher" and _told(prompts) else _prompt_length(prompts)


def _told(prompts: Prompts) -> bool:
    """True where the teacher is told more than the student."""
    return isinstance(prompts, RecordKeys) and prompts.teacher_context is not None


def _prompt_length(prompts: Prompts) -> int:
    return prompts.prompt_length if isinstance(prompts, PlainPrompts) else prompts.max_prompt_length

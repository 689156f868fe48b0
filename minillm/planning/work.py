"""What a stage does in one step, as sizes: batches, lengths and the models that take part, by phase.

Every prompt and every answer counts at its longest: a plan is for the worst batch.
"""

from dataclasses import dataclass, replace

from minillm import UserError
from minillm.config.data import PlainPrompts, Prompts
from minillm.config.root import StageConfig
from minillm.rollout.local.static_loop import static_room


@dataclass(frozen=True)
class Decoding:
    """Answers sampled side by side."""

    models: tuple[str, ...]  # student, teacher
    batch: int
    prompt: int  # tokens
    answer: int  # tokens
    total: int  # answers of a buffer, on one rank
    cuda_graphs: bool = False

    @property
    def room(self) -> int:
        """Tokens that the caches hold for each answer; the last one is never fed."""
        return static_room(self.prompt, self.answer) if self.cuda_graphs else self.prompt + self.answer - 1

    @property
    def reads_heads(self) -> bool:
        """Whether the LM heads take part."""
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

    @property
    def reads_heads(self) -> bool:
        """Whether the LM heads take part; without them it is the teacher of a supervised step."""
        return self.statistics


@dataclass(frozen=True)
class Term:
    """A summand of the loss of one micro-batch."""

    name: str
    batch: int
    length: int
    rows: int
    teacher: bool  # reads the teacher's logits
    from_buffer: bool  # its teacher's hidden states come from the rollout buffer, which lies on the CPU


@dataclass(frozen=True)
class Work:
    """One step on one rank, with its share of the collection before it."""

    decoding: Decoding | None
    scoring: Forward | None
    terms: tuple[Term, ...]
    micro_batches: int
    steps_per_collection: int
    buffered: int  # answers kept with the teacher's hidden states, of all ranks
    evaluation: tuple[Decoding | Forward, ...] = ()  # between steps: what is held is of one at a time

    @property
    def moment(self) -> "Work":
        """The same but for how many times it is repeated: what memory on a device depends on."""
        return replace(
            self,
            decoding=None if self.decoding is None else replace(self.decoding, total=0),
            scoring=None if self.scoring is None else replace(self.scoring, total=0),
            micro_batches=min(self.micro_batches, 2),
            steps_per_collection=1,
            buffered=0,
        )

    @property
    def judged_in_the_step(self) -> tuple[Term, ...]:
        """Terms beside a buffer's whose teacher runs anew in every step, which `scoring` does not count."""
        return tuple(term for term in self.terms if self.buffered and term.teacher and not term.from_buffer)

    def waiting_rows(self, *, from_buffer: bool) -> int:
        """Rows of the teacher's hidden states that all micro-batches of a step hold before it begins."""
        terms = [term for term in self.terms if term.teacher and term.from_buffer == from_buffer]
        return self.micro_batches * sum(term.rows for term in terms)


def work_of(config: StageConfig, world_size: int) -> Work:
    """The sizes of a stage. Raises UserError where there are no prompts, or no whole number of steps in a buffer."""
    method, train, rollout, prompts = config.method, config.train, config.rollout, config.data.prompts
    if prompts is None:
        raise UserError("data.prompts is missing, so no length is known")
    prompt = _prompt_length(prompts)
    micro, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    name = method.name
    sampled = name in ("minillm", "seqkd") or name == "gkd" and method.on_policy > 0
    answer = max(
        rollout.max_new_tokens if sampled else 0,
        prompts.max_response_length if name in ("sft", "kd") or name == "gkd" and method.on_policy < 1 else 0,
    )
    length, rows = prompt + answer - 1, answer
    decoding = scoring = None
    buffered = 0
    steps = 1
    if name == "minillm":
        if rollout.buffer_size % (micro * accumulation * world_size):
            raise UserError(
                f"rollout.buffer_size {rollout.buffer_size} does not divide into steps of {micro} x {accumulation} on "
                f"{world_size} ranks"
            )
        buffered = rollout.buffer_size
        mine = buffered // world_size
        batch = min(rollout.batch_size, mine)
        who = ("student", "teacher") if method.alpha > 0 else ("student",)
        who = ("teacher",) if method.alpha == 1 else who
        decoding = Decoding(who, batch, prompt, rollout.max_new_tokens, mine, rollout.cuda_graphs)
        scoring = Forward(("teacher", "student"), batch, length, batch * rows, True, mine)
        steps = mine * method.ppo_epochs // (micro * accumulation)
    elif sampled:
        step = micro * accumulation
        # seqkd: every prompt once, before the first step
        who, mine = ("teacher", 0) if name == "seqkd" else ("student", step)
        batch = min(rollout.batch_size, mine or rollout.batch_size)
        decoding = Decoding((who,), batch, prompt, rollout.max_new_tokens, mine, rollout.cuda_graphs)
    share = {"kd": lambda: 1 - method.ce_ratio, "seqkd": lambda: method.kd_ratio, "gkd": lambda: 1.0}
    teacher = name == "minillm" or share.get(name, lambda: 0.0)() > 0
    if teacher and name != "minillm":
        scoring = Forward(("teacher",), micro, length, micro * rows, False, micro * accumulation)
    terms = [
        Term("policy" if name == "minillm" else "distillation", micro, length, micro * rows, teacher, name == "minillm")
    ]
    if name == "minillm" and method.lm_coef > 0 and config.data.corpus is not None:
        fed = config.data.corpus.block_size - 1
        terms.append(Term("pretraining", micro, fed, micro * fed, method.pt_kd_ratio > 0, False))
    return Work(decoding, scoring, tuple(terms), accumulation, steps, buffered, _evaluation(config))


def _evaluation(config: StageConfig) -> tuple[Decoding | Forward, ...]:
    """The student answers, the teacher answers, and both are run over answers and references."""
    keys, sets = config.eval, config.eval.sets.values()
    if not sets:
        return ()
    prompt = max(_prompt_length(prompts) for prompts in sets)
    batch = min(keys.batch_size, max(prompts.limit or keys.batch_size for prompts in sets))
    judged = config.teacher is not None and keys.teacher
    longest = max(keys.max_new_tokens, *(prompts.max_response_length for prompts in sets))
    answering = [
        Decoding((name,), batch, prompt, keys.max_new_tokens, 0, config.rollout.cuda_graphs)
        for name in ("student", "teacher")[: 1 + judged]
    ]
    models = ("teacher", "student") if judged else ("student",)
    return (*answering, Forward(models, batch, prompt + longest - 1, batch * longest, True, 0))


def _prompt_length(prompts: Prompts) -> int:
    return prompts.prompt_length if isinstance(prompts, PlainPrompts) else prompts.max_prompt_length

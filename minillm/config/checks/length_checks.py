"""Checks of lengths: prompts and answers fit into the models' contexts, as far as a local config.json has these."""

from collections.abc import Iterator

from minillm.config.checks.facts import Facts, Found, architecture_of, context_of, keys_at
from minillm.config.data import DataConfig, Pairs, PlainPrompts, Prompts
from minillm.config.evaluation import EvalConfig
from minillm.config.few_shot import FewShot
from minillm.config.methods import Method
from minillm.config.models import teachers_of
from minillm.config.needs import Needs, Rows
from minillm.config.rollout import RolloutConfig
from minillm.config.shape import KeyPath

GIVEN: dict[Rows, str] = {
    "references": "prompts",
    "forget": "forget",
    "pairs": "pairs",
}  # rows -> the key of `data` that gives them


def answers_fit(facts: Facts, data: DataConfig, rollout: RolloutConfig, method: Method) -> Iterator[Found]:
    """A prompt and its answer, sampled or given, fit together."""
    needs = method.needs()
    if needs.few_shot is not None:  # the teacher alone reads it
        readers = [reader for reader in _readers(facts, teacher=True) if reader[0] == "teacher"]
        where, answer = ("method", "few_shot"), ("rollout", "max_new_tokens")
        yield from _prompt_and_answer(needs.few_shot, where, rollout.max_new_tokens, answer, readers)
    elif needs.samples and data.prompts is not None:
        readers = _readers(facts, teacher=needs.teacher_answers or _teacher_reads(needs, "answers"))
        yield from _prompt_and_answer(
            data.prompts, ("data", "prompts"), rollout.max_new_tokens, ("rollout", "max_new_tokens"), readers
        )
    for rows, name in GIVEN.items():
        source = getattr(data, name)
        if source is not None and any(rows in term.rows for term in needs.terms):
            where, readers = ("data", name), _readers(facts, teacher=_teacher_reads(needs, rows))
            yield from _prompt_and_answer(
                source, where, source.max_response_length, (*where, "max_response_length"), readers
            )


def corpus_fits(facts: Facts, data: DataConfig, method: Method) -> Iterator[Found]:
    """Blocks of plain text fit."""
    needs = method.needs()
    if data.corpus is None or not needs.corpus:
        return
    # a stage that takes no step has its teacher read what it is about
    teacher = _teacher_reads(needs, "corpus") or needs.teacher and not needs.takes_steps
    readers = [(who, f"{who}.path", model, context) for who, model, context in _readers(facts, teacher=teacher)]
    if needs.reference is not None:  # in the student's place
        context = context_of(keys_at(facts, needs.reference))
        readers = [reader for reader in readers if reader[0] != "student"]
        readers += [] if context is None else [("reference", "method.reference", needs.reference, context)]
    for who, key, model, context in readers:
        if data.corpus.block_size > context:
            message = f"{data.corpus.block_size} tokens are more than the {context} that the {who} {model} can read"
            yield Found("data.corpus.block_size", message, (key,))


def evaluation_fits(facts: Facts, eval: EvalConfig) -> Iterator[Found]:
    """Held-out prompts fit, with sampled answers and with references."""
    readers, students = (_readers(facts, teacher=teacher) for teacher in (eval.teacher, False))
    for name, prompts in eval.sets.items():
        where = ("eval", "sets", name)
        yield from _prompt_and_answer(prompts, where, eval.max_new_tokens, ("eval", "max_new_tokens"), readers)
        yield from _prompt_and_answer(
            prompts, where, prompts.max_response_length, (*where, "max_response_length"), students
        )
        if eval.exposure_bias is not None:
            yield from _prompt_and_answer(
                prompts, where, max(eval.exposure_bias.lengths), ("eval", "exposure_bias", "lengths"), readers
            )
    for name, pairs in eval.held_out_pairs.items():
        where = ("eval", "preference", "pairs", name)
        scored_by = students if eval.preference.reference_free else readers
        yield from _prompt_and_answer(
            pairs, where, pairs.max_response_length, (*where, "max_response_length"), scored_by
        )


def _prompt_and_answer(
    prompts: Prompts | Pairs | FewShot,
    where: KeyPath,
    answer: int,
    answer_key: KeyPath,
    readers: list[tuple[str, str, int]],
) -> Iterator[Found]:
    shared = "prompt_length" if isinstance(prompts, PlainPrompts) else "max_prompt_length"
    told = getattr(prompts, "teacher_context", None) is not None and prompts.max_teacher_prompt_length is not None
    of_teachers = "max_teacher_prompt_length" if told else shared
    keys = {who: shared if who == "student" else of_teachers for who, _, _ in readers}
    for who, model, context in sorted(readers, key=lambda reader: reader[2] - getattr(prompts, keys[reader[0]]))[:1]:
        key = keys[who]
        prompt = getattr(prompts, key)
        if prompt + answer > context:
            written = ".".join(map(str, (*where, key)))
            message = (
                f"{answer} tokens of answer after up to {prompt} of prompt ({written}) are {prompt + answer}, "
                f"more than the {context} that the {who} {model} can read; lower one of them"
            )
            yield Found(answer_key, message, ((*where, key), f"{who}.path"))


def _readers(facts: Facts, *, teacher: bool) -> list[tuple[str, str, int]]:
    """(key, path, tokens that it can read) of the models whose context is known, the student first."""
    readers = []
    context = architecture_of(facts, "student").context
    if context is not None:
        readers.append(("student", facts.groups["student"].path or "of these keys", context))
    for who, model in teachers_of(facts.groups.get("teacher") if teacher else None).items():
        name = getattr(model, "path", None) or getattr(model, "model", None) or ""
        context = context_of(keys_at(facts, name))
        if context is not None:
            readers.append((who, name, context))
    return readers


def _teacher_reads(needs: Needs, rows: Rows) -> bool:
    return any(term.teacher and rows in term.rows for term in needs.terms)

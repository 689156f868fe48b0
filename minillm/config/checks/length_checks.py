"""Whether prompts and answers fit into the models' contexts, where a local config.json tells how long these are."""

from collections.abc import Iterator

from minillm.config.checks.facts import Facts, Found, architecture_of
from minillm.config.data import DataConfig, PlainPrompts, Prompts
from minillm.config.evaluation import EvalConfig
from minillm.config.method import Method
from minillm.config.rollout import RolloutConfig
from minillm.config.shape import KeyPath

DATA = ("data", "prompts")


def answers_fit(facts: Facts, data: DataConfig, rollout: RolloutConfig, method: Method) -> Iterator[Found]:
    """Prompt and answer together, be it a reference or sampled."""
    if data.prompts is None:
        return
    name = method.name
    teacher_reads = name in ("minillm", "gkd", "kd") or name == "seqkd" and method.kd_ratio > 0
    if name in ("minillm", "seqkd") or name == "gkd" and method.on_policy > 0:
        # the teacher of seqkd writes the answers
        readers = _readers(facts, teacher=teacher_reads or name == "seqkd")
        yield from _pair(data.prompts, DATA, rollout.max_new_tokens, ("rollout", "max_new_tokens"), readers)
    if name in ("sft", "kd") or name == "gkd" and method.on_policy < 1:
        readers = _readers(facts, teacher=teacher_reads)
        yield from _pair(data.prompts, DATA, data.prompts.max_response_length, (*DATA, "max_response_length"), readers)


def corpus_fits(facts: Facts, data: DataConfig, method: Method) -> Iterator[Found]:
    """Blocks of plain text."""
    if data.corpus is None or method.name != "minillm" or method.lm_coef == 0:
        return
    for who, model, context in _readers(facts, teacher=method.pt_kd_ratio > 0):
        if data.corpus.block_size > context:
            message = f"{data.corpus.block_size} tokens are more than the {context} that the {who} {model} can read"
            yield Found("data.corpus.block_size", message, (f"{who}.path",))


def evaluation_fits(facts: Facts, eval: EvalConfig) -> Iterator[Found]:
    """Held-out prompts with sampled answers and with references."""
    readers, students = (_readers(facts, teacher=teacher) for teacher in (eval.teacher, False))
    for name, prompts in eval.sets.items():
        where = ("eval", "sets", name)
        yield from _pair(prompts, where, eval.max_new_tokens, ("eval", "max_new_tokens"), readers)
        yield from _pair(prompts, where, prompts.max_response_length, (*where, "max_response_length"), students)
        if eval.exposure_bias is not None:
            yield from _pair(
                prompts, where, max(eval.exposure_bias.lengths), ("eval", "exposure_bias", "lengths"), readers
            )


def _pair(
    prompts: Prompts, where: KeyPath, answer: int, answer_key: KeyPath, readers: list[tuple[str, str, int]]
) -> Iterator[Found]:
    key = "prompt_length" if isinstance(prompts, PlainPrompts) else "max_prompt_length"
    prompt = getattr(prompts, key)
    for who, model, context in sorted(readers, key=lambda reader: reader[2])[:1]:
        if prompt + answer > context:
            written = ".".join(map(str, (*where, key)))
            message = (
                f"{answer} tokens of answer after up to {prompt} of prompt ({written}) are {prompt + answer}, "
                f"more than the {context} that the {who} {model} can read; lower one of them"
            )
            yield Found(answer_key, message, ((*where, key), f"{who}.path"))


def _readers(facts: Facts, *, teacher: bool) -> list[tuple[str, str, int]]:
    """(who, path, tokens it can read) of the models whose context is known; the student first."""
    readers = []
    for who in ("student", "teacher") if teacher else ("student",):
        context = architecture_of(facts, who).context
        if context is not None:
            readers.append((who, facts.groups[who].path or "of these keys", context))
    return readers

"""`minillm generate`: prompts from the command line or typed in, and the student's answers beside the teacher's."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from minillm import UserError
from minillm.cli.controlled import add_delta
from minillm.config.data import InstructionKeys, Prompts
from minillm.config.loader.document import read_file
from minillm.config.loader.stages import stage_trees
from minillm.config.models import TEACHER_DEVICE, TeacherConfig
from minillm.config.shape import walk
from minillm.data.images import find_pictures
from minillm.data.prompt_reader import PromptReader
from minillm.data.records import Conversation
from minillm.models.delta import DeltaPrompt
from minillm.models.device import pick_device
from minillm.models.families import text_config
from minillm.models.open import model_path, run_folder
from minillm.models.processors import unshared_pictures
from minillm.models.tokenizers import load_tokenizer
from minillm.reporting.console import Console
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Sampling
from minillm.teachers.open import open_named
from minillm.teachers.pair import Models


def run(arguments: argparse.Namespace) -> int:
    """Answer the prompts that the arguments name, or those that are typed in."""
    options = {name: value for name, value in vars(arguments).items() if name != "verb"}
    with Console() as console:
        generate(console=console, **options)
    return 0


class Answerer:
    """Both models' answers to one prompt after another."""

    def __init__(
        self,
        models: Models,
        keys: InstructionKeys,
        sampling: Sampling,
        *,
        seed: int,
        images: Sequence[str] = (),
        delta_keys: InstructionKeys | None = None,
    ):
        """Args:
        models: student, and teacher where there is one.
        keys: the template and the system message of the prompts.
        sampling: the settings for both models.
        seed: the seed of the sampling.
        images: files of the pictures that every prompt shows.
        delta_keys: the template of the prompts for models.delta, where it has another tokenizer.
        """
        self.models, self.sampling, self.seed = models, sampling, seed
        self.reader = PromptReader(keys, models.tokenizer)
        self.delta_reader = None if delta_keys is None else PromptReader(delta_keys, models.delta.tokenizer)
        self.pictures = find_pictures("--image", Path("."), {"images": list(images)})
        self.rollouts, self._asked = LocalRollouts(models), 0

    def ask(self, question: str) -> dict[str, str]:
        """{"student": answer} and, where there is one, {"teacher": answer}; the same question again is drawn anew.

        Raises UserError where the question leaves no room for an answer, DataError for a template that is not there.
        """
        tokenizer = self.models.tokenizer
        if not _is_text(question):
            raise UserError(f"the prompt is not text in UTF-8: {question[:40]!r}")
        said = Conversation([{"role": "user", "content": question}])
        prompt = self.reader.read(said, self.pictures)
        if self.delta_reader is not None:
            special = self.delta_reader.config.template != "chat"
            read = self.delta_reader.read(said)
            self.models.delta.translation.read(prompt.ids, DeltaPrompt(read.text, read.ids, special))
        self.models.require_shared("the prompt", [prompt.ids])
        draw, self._asked = self._asked, self._asked + 1
        answers = {}
        for who in ("student", "teacher") if self.models.teacher is not None else ("student",):
            sampling = replace(self.sampling, max_new_tokens=self._room(who, len(prompt.ids)))
            (answer,) = self.rollouts.sample(
                [prompt.ids],
                sampling,
                keys=[0],
                extras=[prompt.extras],
                seed=self.seed,
                draw=draw,
                who=who,
                batch_size=1,
            )
            answers[who] = tokenizer.decode(answer.response, skip_special_tokens=True)
        return answers

    def _room(self, who: str, prompt: int) -> int:
        context = getattr(text_config(self.models.model(who).config), "max_position_embeddings", None)
        if context is None:
            return self.sampling.max_new_tokens
        if prompt >= context:
            raise UserError(f"the prompt has {prompt} tokens and the {who} reads at most {context}; shorten it")
        return min(self.sampling.max_new_tokens, context - prompt)


def _is_text(question: str) -> bool:
    """True for text that can be encoded; bytes of another encoding on the command line cannot."""
    try:
        question.encode()
    except UnicodeEncodeError:
        return False
    return True


def generate(
    model: str,
    *,
    console: Console,
    teacher: str | None = None,
    delta: str | None = None,
    alpha: float | None = None,
    prompts: Sequence[str] = (),
    images: Sequence[str] = (),
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    no_repeat_ngram_size: int = 0,
    seed: int = 0,
    template: str = "auto",
    system: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    teacher_device: str | None = None,
) -> None:
    """Load the models, and answer the prompts or a conversation.

    Raises UserError for options that do not go together, and whatever loading raises.
    """
    if temperature == 0 and (top_k != 0 or top_p != 1):
        raise UserError("--top-k and --top-p have no effect at --temperature 0, where every token is the likeliest one")
    sampling = Sampling(
        max_new_tokens, temperature, top_k=top_k, top_p=top_p, no_repeat_ngram_size=no_repeat_ngram_size
    )
    path = model_path(model)
    pick_device(device, "--device")
    if teacher_device is not None and teacher is None:
        raise UserError("--teacher-device: there is no --teacher that could be there")
    if teacher_device is not None and not re.fullmatch(TEACHER_DEVICE, teacher_device):
        raise UserError(f"--teacher-device is {teacher_device!r}; it must be cpu, cuda or cuda:N")
    if teacher_device is not None:
        pick_device(teacher_device, "--teacher-device")
    beside = None if teacher is None else TeacherConfig(path=model_path(teacher), dtype=dtype, device=teacher_device)
    models, _ = open_named(path, beside, device=device, dtype=dtype, tokenizer=tokenizer)
    if images and beside is not None:
        unshared = unshared_pictures(models.tokenizer, load_tokenizer(beside, Path(".")))
        if unshared is not None:
            raise UserError(f"--image: these are pictures, and {unshared}")
    models = add_delta(models, delta, alpha, console, dtype=dtype)
    options: dict = {"template": template, "system": system}
    delta_keys = None
    if models.delta is None:
        keys = prompt_keys(path, models.tokenizer, **options)
    elif models.delta.translation is None:  # both read the same ids: those that the delta was trained on
        keys = prompt_keys(model_path(delta), models.tokenizer, **options)
    else:  # each its own words for the same question
        keys = prompt_keys(path, models.tokenizer, **options)
        delta_keys = prompt_keys(model_path(delta), models.delta.tokenizer)
    ask = Answerer(models, keys, sampling, seed=seed, images=images, delta_keys=delta_keys).ask
    converse(ask, console, prompts=prompts, read=lambda: input("> " if sys.stdin.isatty() else ""))


def converse(
    ask: Callable[[str], dict[str, str]], console: Console, *, prompts: Sequence[str] = (), read: Callable[[], str]
) -> None:
    """Answer the prompts, or where there are none what `read` returns, until it raises EOFError."""
    for prompt in prompts:
        console.answers(prompt if len(prompts) > 1 else "", ask(prompt))
    while not prompts:
        try:
            question = read()
        except EOFError:
            return
        if question.strip():
            console.answers("" if sys.stdin.isatty() else question, ask(question))


def prompt_keys(
    model: str, tokenizer: PreTrainedTokenizerBase, *, template: str = "auto", system: str | None = None
) -> InstructionKeys:
    """The keys by which prompts are put to a model: its run's, else the tokenizer's chat template, else no template.

    Args:
        model: the path that it was loaded from; config.yaml of its run lies one or two folders above.
        template: auto, or one of the configuration's.
        system: the system message of a chat.

    Raises UserError for a system message without a chat.
    """
    trained = _trained_with(Path(model))
    if template == "auto" and trained is not None and (system is None or trained.template == "chat"):
        return InstructionKeys(
            template=trained.template,
            system=trained.system if system is None else system,
            template_kwargs=trained.template_kwargs,
            special_tokens=trained.special_tokens,
        )
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "none"
    if system is not None and template != "chat":
        raise UserError(f"--system is for chats, and the template is {template}; put it into the prompt instead")
    return InstructionKeys(template=template, system=system)


def _trained_with(model: Path) -> Prompts | None:
    """data.prompts of the stage that the model comes from, None where it comes from no run."""
    run, model = run_folder(model), model.absolute()
    if run is None:
        return None
    document = read_file(run / "config.yaml", [])
    stages = {} if document is None else stage_trees(document, [])
    name = model.name if model.parent.name == "stages" else next(reversed(stages), "")
    _, prompts = walk(None, stages[name].plain() if name in stages else {}, ("data", "prompts"))
    try:
        return TypeAdapter(Prompts).validate_python(prompts)
    except ValidationError:  # no prompts, or those of another version
        return None

"""What a person does with a model, step by step, on a tiny one: and whether each step held, was refused or failed."""

import contextlib
import io
import json
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from transformers import PreTrainedModel
from transformers import logging as transformers_logging

from minillm import UserError
from minillm.cli.main import main
from minillm.config.models import StudentConfig, TeacherConfig
from minillm.kernels.reference import logits as head_logits
from minillm.models.access import lm_head, row_hidden
from minillm.models.batch import TokenSequence, collate
from minillm.models.families import banned_id
from minillm.models.loading import load_student, load_teacher
from minillm.models.saving import save_model
from minillm.models.tokenizers import byte_tokenizer
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Sampling
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models
from minillm.teachers.preflight import preflight
from tests.sweep.tiny_models import LAYERS, tiny_architecture, tiny_model

CPU = torch.device("cpu")
STEPS = ("build", "open", "rows", "decoding", "prune", "train", "reload", "eval", "generate", "plan")
HELD, REFUSED, FAILED, SKIPPED = "held", "refused", "failed", "-"
TOLERANCE = 2e-3  # nats, in float32
PROMPTS = ["the cat sat", "no", "birds sing at dawn"]
NEW_TOKENS = 6


class Outcome(NamedTuple):
    """How a step ended, and what was said."""

    result: str  # HELD, REFUSED, FAILED or SKIPPED
    said: str = ""


class Different(Exception):
    """Two numbers that must agree and do not."""


class Journey:
    """One architecture's steps, each by the files that the one before has left in `folder`."""

    def __init__(self, model_type: str, folder: Path):
        self.model_type, self.folder = model_type, folder
        self.tokenizer = byte_tokenizer()
        self.model: PreTrainedModel | None = None
        self.models: Models | None = None

    def outcomes(self, report: Callable[[str, Outcome], None] = lambda step, outcome: None) -> dict[str, Outcome]:
        """Take every step. What needs a step that did not hold is skipped."""
        found: dict[str, Outcome] = {}
        needed = {"open": "build", "rows": "open", "decoding": "open", "reload": "train"}
        for step in STEPS:
            before = needed.get(step)
            missing = step != "build" and found["build"].result != HELD
            if missing or before is not None and found[before].result != HELD:
                found[step] = Outcome(SKIPPED)
            else:
                found[step] = outcome_of(getattr(self, step))
            report(step, found[step])
        return found

    def build(self) -> None:
        self.model = tiny_model(tiny_architecture(self.model_type))
        save_model(self.model, self.tokenizer, self.folder / "model")
        lines = [json.dumps({"prompt": text, "completion": "so it goes"}) for text in PROMPTS]
        (self.folder / "data.jsonl").write_text("\n".join(lines) + "\n")

    def open(self) -> None:
        """The folder as a teacher, with what preflight looks at."""
        config = TeacherConfig(path=str(self.folder / "model"))
        model = load_teacher(config, output_dir=self.folder, device=CPU)
        for (name, ours), (_, theirs) in zip(self.model.state_dict().items(), model.state_dict().items(), strict=True):
            if not torch.equal(ours, theirs):
                raise Different(f"{name} is not what was saved")
        self.models, _ = preflight(model, LocalTeacher(model), self.tokenizer, self.tokenizer, CPU)

    @torch.no_grad()
    def rows(self) -> None:
        """The rows of a batch of unequal lengths, by the head, against the model's own logits of each text alone."""
        model, sequences = self.models.student, self._sequences()
        head = lm_head(model)
        batch = collate(sequences, self.models.pad_id)
        ours = head_logits(
            row_hidden(model, batch), head.weight, head.bias, logit_scale=head.logit_scale, softcap=head.softcap
        )
        theirs = torch.cat([self._full_pass(one.prompt, one.response) for one in sequences])
        _agree("the rows of a batch", ours.log_softmax(-1), theirs)

    @torch.no_grad()
    def decoding(self) -> None:
        """Log-probabilities as answers are sampled, prompts padded at the left, against full passes over each alone."""
        prompts = [self.tokenizer.encode(text, add_special_tokens=False) for text in PROMPTS]
        # a sixth of all tokens ends an answer, so that rows leave the batch at different steps
        ends = tuple({*self.models.eos_ids, *range(0, self.models.vocab_size, 6)})
        rollouts = LocalRollouts(replace(self.models, eos_ids=ends))
        options = {"keys": range(len(prompts)), "seed": 1, "batch_size": len(prompts)}
        for answer in rollouts.sample(prompts, Sampling(NEW_TOKENS), **options):
            full = self._full_pass(answer.prompt, answer.response)[:, : self.models.vocab_size].log_softmax(-1)
            of_tokens = full.gather(-1, torch.tensor(answer.response)[:, None])[:, 0]
            _agree(f"an answer to {len(answer.prompt)} tokens", answer.logprobs, of_tokens)

    def prune(self) -> None:
        """Half of the layers, saved, and read again: the same weights and the same function."""
        config = StudentConfig(path=str(self.folder / "model"), init="prune", layers=LAYERS // 2)
        pruned = load_student(config, output_dir=self.folder, device=CPU, seed=0).eval()
        save_model(pruned, self.tokenizer, self.folder / "pruned")
        self._same_after_reading(pruned, self.folder / "pruned")

    def train(self) -> None:
        """A step on answers that the student samples, from the pruned folder, or the whole model where it has none."""
        start = "pruned" if (self.folder / "pruned").is_dir() else "model"
        path = str(self.folder / "model")
        student = {"path": path, "init": "prune", "layers": LAYERS // 2} if start == "pruned" else {"path": path}
        prompts = {"type": "jsonl", "path": str(self.folder / "data.jsonl"), "template": "none",
                   "max_prompt_length": 32, "max_response_length": 16}  # fmt: skip
        document = {
            "output_dir": str(self.folder / "run"),
            "student": student,
            "teacher": {"path": path},
            "data": {"prompts": prompts},
            "rollout": {"batch_size": 4, "max_new_tokens": NEW_TOKENS},
            "method": {"name": "gkd"},
            "train": {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
            "log": {"report_to": []},
        }
        (self.folder / "run.yaml").write_text(yaml.safe_dump(document))
        _command("train", self.folder / "run.yaml")

    def reload(self) -> None:
        """The trained model as a student of another run."""
        final = self.folder / "run" / "final"
        config = StudentConfig(path=str(final))
        model = load_student(config, output_dir=self.folder, device=CPU, seed=0).eval()
        self._same_after_reading(model, final)

    def eval(self) -> None:
        _command("eval", self._best(), self.folder / "data.jsonl", f"eval.max_new_tokens={NEW_TOKENS}")

    def generate(self) -> None:
        _command("generate", self._best(), "--prompt", "the dog", "--max-new-tokens", NEW_TOKENS)

    def plan(self) -> None:
        _command("plan", self.folder / "run.yaml")

    def _best(self) -> Path:
        final = self.folder / "run" / "final"
        return final if final.is_dir() else self.folder / "model"

    def _sequences(self) -> list[TokenSequence]:
        answers = ["so it goes", "well", "yes it did"]
        encode = self.tokenizer.encode
        return [
            TokenSequence(encode(prompt, add_special_tokens=False), encode(answer, add_special_tokens=False))
            for prompt, answer in zip(PROMPTS, answers, strict=True)
        ]

    def _full_pass(self, prompt: list[int], response: list[int]) -> torch.Tensor:  # (T, V) log-probabilities
        """One text by itself: no padding, no cache, and the model's own head."""
        model = self.models.student
        ids = torch.tensor([prompt + response[:-1]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()
        banned = banned_id(model)
        if banned is not None:
            logits[:, banned] = -torch.inf
        return logits[len(prompt) - 1 :].log_softmax(-1)

    @torch.no_grad()
    def _same_after_reading(self, model: PreTrainedModel, folder: Path) -> None:
        config = StudentConfig(path=str(folder))
        again = load_student(config, output_dir=self.folder, device=CPU, seed=0).eval()
        ours, theirs = model.state_dict(), again.state_dict()
        if ours.keys() != theirs.keys():
            raise Different(f"{sorted(ours.keys() ^ theirs.keys())[:3]} in one of the two alone")
        ids = torch.tensor([self.tokenizer.encode(PROMPTS[-1], add_special_tokens=False)])
        logits = [one(input_ids=ids, use_cache=False).logits for one in (model, again)]
        _agree("the model read again", *logits)


def outcome_of(work: Callable[[], None]) -> Outcome:
    """Run a step in silence."""
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                work()
    except UserError as error:
        return Outcome(REFUSED, str(error))
    except Exception as error:  # whatever a library raises is what is looked for
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"
        return Outcome(FAILED, f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:300]}")
    return Outcome(HELD)


def _command(*words: object) -> None:
    """A command of the program. Raises UserError with what it refuses by, AssertionError for a traceback."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main([str(word) for word in words])
    text = said.getvalue().strip()
    if status and "Traceback" in text:
        raise AssertionError(f"{words[0]}: {' '.join(text.splitlines()[-3:])}")
    if status:
        raise UserError(" ".join(text.split()))


def _agree(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    apart = (ours.float() - theirs.float()).nan_to_num(nan=torch.inf).abs()
    apart = apart.masked_fill(ours == theirs, 0.0)  # -inf in both
    if not apart.max() < TOLERANCE:
        raise Different(f"{what}: apart by {apart.max():.3g}")

"""`student` and `teacher`: the places that models come from, and the form in which they are loaded."""

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from minillm.config.keys import CachePath, ModelPath, Strict, TokenizerPath, default_type
from minillm.config.lora import LoraConfig
from minillm.config.needs import ABILITIES, Ability
from minillm.config.upcycle import UpcycleConfig

AttnImplementation = Literal[
    "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"
]
MODEL_PATH = (
    "A Hugging Face folder, a hub name, a .gguf file, package:NAME/FILE (a file that an installed Python package "
    "carries), or stage:NAME (the model that an earlier stage left)"
)
OF_INIT = {
    "layers": "prune",
    "config": "random",
    "upcycle": "upcycle",
}  # key -> the only `init` with which it means something
TEACHER_DEVICE = r"^(cpu|cuda(:\d+)?)$"
Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["int8", "nf4"]
Part = Literal["projector", "language", "feed_forward", "vision"]


class ModelConfig(Strict):
    """The keys that both models have."""

    path: ModelPath | None = Field(None, description=MODEL_PATH)
    revision: str | None = Field(None, description="The branch, tag or commit of a hub name")
    tokenizer: TokenizerPath | None = Field(
        None, description="A folder or hub name of the tokenizer; default: the model's own"
    )
    dtype: Dtype = Field("float32", description="The dtype of the weights in memory")
    attn_implementation: AttnImplementation = Field(
        "sdpa",
        description="The attention kernel that transformers uses; an architecture without sdpa gets eager in its place",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model")


class TeacherConfig(ModelConfig):
    """The model that judges, in this process or sharded over those of the run. Its weights are never trained."""

    called: ClassVar[str] = "this one"  # in messages
    # Keys that say where the weights are, and nothing of what they say: a resumed run may have others.
    of_the_place: ClassVar[frozenset[str]] = frozenset({"device"})
    # left out where keys are written down: files of before there was another source have none
    type: Literal["local"] = Field("local", exclude=True)
    path: ModelPath = Field(description=MODEL_PATH)
    quantization: Quantization | None = Field(
        None,
        description="Keep the linear layers below the head in 8 bits (LLM.int8) or in 4 (NormalFloat, its scales quantised "
        "too) through bitsandbytes; such a teacher is replicated on every rank",
    )
    device: Annotated[str, Field(pattern=TEACHER_DEVICE)] | None = Field(
        None,
        description="The device of its weights, for engine.type: torch: cpu, cuda or cuda:N; default: the student's. On another "
        "one it runs there, and its hidden states are moved to the student, where a copy of its head is",
    )

    @property
    def abilities(self) -> frozenset[Ability]:
        """The abilities of this source beyond giving rows to the losses: all, since its weights are here, but
        quantised ones are not trained."""
        return frozenset(ABILITIES) - ({"train"} if self.quantization is not None else set())


class CachedTeacherConfig(Strict):
    """A teacher whose rows of given texts are read from disk; none of its weights but the head is loaded."""

    called: ClassVar[str] = "a cached one"
    type: Literal["cached"]
    path: CachePath = Field(
        description="A folder that `minillm cache` or a stage of method cache wrote, the folder of a run that did nothing else, "
        "or stage:NAME"
    )

    @property
    def abilities(self) -> frozenset[Ability]:
        """The most that such a source can do beyond giving rows; the cache itself says what of it it can."""
        return frozenset({"answer", "logprobs", "single"})


class ServedTeacherConfig(Strict):
    """A teacher that servers have in other processes; none of its weights but, with hidden states, the head is loaded here.

    `rows` and `k` that are not given become those of the protocol.
    """

    # Keys that say where it is and how it is asked, and nothing of what it says: a resumed run may have others.
    of_the_place: ClassVar[frozenset[str]] = frozenset({"url", "token_env", "timeout_seconds", "patience_seconds"})
    type: Literal["served"]
    url: str | list[str] = Field(
        description="http://HOST:PORT or https://HOST:PORT of a server, or a list of several that serve the same model"
    )
    protocol: Literal["minillm", "openai"] = Field(
        "minillm",
        description="minillm: of `minillm serve`; openai: of vLLM's server, which gives log-probabilities of a prompt's "
        "tokens (prompt_logprobs)",
    )
    token_env: str | None = Field(
        None, description="The environment variable that holds the servers' bearer token; default: none is sent"
    )
    model: str | None = Field(
        None,
        description="The model that must be served there, as the server was given it; default: any that fits. A plan "
        "takes its sizes from it where no server answers",
    )
    tokenizer: TokenizerPath | None = Field(
        None,
        description="For protocol: openai, whose servers send none: a folder or hub name of the model's tokenizer; "
        "default: `model`",
    )
    rows: Literal["hidden", "top_k"] | None = Field(
        None,
        description="hidden: its last hidden states, exact, the default; top_k: its k likeliest ids, fewer bytes, and all that "
        "protocol: openai has",
    )
    k: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Ids a token, for rows: top_k; default: 64, and 20 for protocol: openai, the most that vLLM gives without "
        "--max-logprobs",
    )
    timeout_seconds: Annotated[float, Field(gt=0)] = Field(600.0, description="The longest wait for one answer")
    patience_seconds: Annotated[float, Field(ge=0)] = Field(
        600.0,
        description="How long a request is repeated while no server answers; then the run stops, with a checkpoint",
    )

    @property
    def called(self) -> str:
        """This source in messages."""
        return "a served one" if self.protocol != "openai" else "one served by protocol openai"

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers' addresses, without a slash at the end, and without the /v1 that clients of OpenAI write."""
        given = [self.url] if isinstance(self.url, str) else self.url
        bare = (one.rstrip("/") for one in given)
        return tuple(one if self.protocol != "openai" else one.removesuffix("/v1").rstrip("/") for one in bare)

    @property
    def abilities(self) -> frozenset[Ability]:
        """The abilities of this source beyond giving rows to the losses: what needs neither its weights here nor a
        decision of its at every token of the student's. Servers of protocol openai draw answers by a noise of their own,
        which no resumed run could repeat."""
        if self.protocol == "openai":
            return frozenset({"read", "single"})
        return frozenset(
            {"read", "sample", "answer", "single"} | ({"logprobs", "hidden"} if self.rows == "hidden" else set())
        )

    @model_validator(mode="after")
    def _with_defaults_of_the_protocol(self) -> "ServedTeacherConfig":
        ours = self.protocol != "openai"
        if self.rows is None:
            object.__setattr__(self, "rows", "hidden" if ours else "top_k")
        if self.k is None:
            object.__setattr__(self, "k", 64 if ours else 20)
        return self


AnyTeacherConfig = TeacherConfig | CachedTeacherConfig | ServedTeacherConfig
Teacher = Annotated[AnyTeacherConfig, Field(discriminator="type"), default_type("local")]


class TeachersByConfig(Strict):
    """The way in which several teachers divide the records: each has one of them, or all have all, with weights."""

    field: str | None = Field(
        None, description="The field of every record, of data.prompts and of eval.sets, that names its teacher"
    )
    weights: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None,
        description="Teacher -> its weight in the loss on every record, divided by the sum of all",
    )
    in_memory: Literal["all", "one"] = Field(
        "all",
        description="The local teachers whose weights are in memory at the same time. one: each reads its part of a buffer, of "
        "a set that is measured, or of `turn_steps` steps, and gives way to the next; heads stay",
    )
    turn_steps: Annotated[int, Field(ge=1)] = Field(
        16,
        description="in_memory: one: the steps whose texts each teacher reads in its turn, as far as they are known beforehand; "
        "what it says of them is kept in the host's memory",
    )
    # What says where weights are and nothing of what they say: a resumed run may have others.
    of_the_place: ClassVar[frozenset[str]] = frozenset({"in_memory", "turn_steps"})


class SeveralTeachersConfig(Strict):
    """Teachers that judge one student: `teachers` and `teachers_by` of a file, read together."""

    called: ClassVar[str] = "several together"
    type: Literal["several"] = "several"
    teachers: dict[str, AnyTeacherConfig]
    by: TeachersByConfig

    @property
    def abilities(self) -> frozenset[Ability]:
        """The abilities that all of them have and that are still one where there are several: they speak of texts."""
        shared = frozenset.intersection(*(one.abilities for one in self.teachers.values()))
        return shared & {"read", "logprobs"}

    @property
    def weights(self) -> dict[str, float] | None:
        """The weights of a mixture, which sum to 1; None where every record has a teacher of its own."""
        if self.by.weights is None:
            return None
        total = math.fsum(self.by.weights.values())
        return {name: self.by.weights[name] / total for name in self.teachers}


TeacherSide = AnyTeacherConfig | SeveralTeachersConfig


def teachers_of(config: TeacherSide | None) -> dict[str, AnyTeacherConfig]:
    """The teachers of a configuration by the dotted key of each."""
    if isinstance(config, SeveralTeachersConfig):
        return {f"teachers.{name}": one for name, one in config.teachers.items()}
    return {} if config is None else {"teacher": config}


def named_teacher(config: TeacherSide) -> str:
    """The words for a teacher in reports: its path, or the model and the servers that have it; of several each one's."""
    if isinstance(config, SeveralTeachersConfig):
        return "; ".join(f"{name}: {named_teacher(one)}" for name, one in config.teachers.items())
    if not isinstance(config, ServedTeacherConfig):
        return config.path
    return f"{config.model or 'a model'} served by {', '.join(config.urls)}"


class StudentConfig(ModelConfig):
    """The model that is trained. Keys of another `init`, which a stage may inherit, become None."""

    init: Literal["pretrained", "prune", "upcycle", "random"] = Field(
        "pretrained",
        description="pretrained: the weights at `path`; prune: `path` with only some of its layers; "
        "upcycle: `path` with its feed-forward layers copied into experts; random: fresh weights of the architecture in `config`",
    )
    layers: Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        description="prune: the layers that are kept, as a list, or their number, evenly spaced with the first and the last",
    )
    upcycle: UpcycleConfig | None = Field(
        None, description="upcycle: how many experts there are, and where; default: four, two for each token"
    )
    config: dict[str, Any] | None = Field(
        None,
        description="random: the architecture, as keys of the transformers configuration (model_type, hidden_size, "
        "...); with a `path` they override that model's",
    )
    lora: LoraConfig | None = Field(
        None, description="Train low-rank adapters alone; the models that the run saves have them merged in"
    )

    train: Annotated[list[Part], Field(min_length=1)] | None = Field(
        None,
        description="The parts that are trained, others stay as they are: of a model of images and text projector, language (the "
        "language model with its head), vision; of any model feed_forward (the language model's feed-forward layers, experts "
        "and routers too); default: all",
    )
    vision_from_layer: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Of the vision tower train its layers from this one on alone, counted from 0"
    )

    def saved_in(self, folder: Path) -> "StudentConfig":
        """The keys for this student as a run has saved it, its tokenizer too, wherever both came from."""
        own = {
            "path": str(folder),
            "revision": None,
            "tokenizer": None,
            "init": "pretrained",
            "layers": None,
            "config": None,
        }
        return self.model_copy(update=own)

    @property
    def trained_parts(self) -> tuple[Part, ...] | None:
        """The parts that are trained, None where all weights are."""
        if self.train is None and self.vision_from_layer is not None:
            return ("projector", "language", "vision")
        return None if self.train is None else tuple(self.train)

    @property
    def trained_by_text(self) -> bool:
        """True where plain text passes through what is trained."""
        return self.trained_parts is None or not {"language", "feed_forward"}.isdisjoint(self.trained_parts)

    @model_validator(mode="after")
    def _without_those_of_another_init(self) -> "StudentConfig":
        for key, init in OF_INIT.items():
            if self.init != init:
                object.__setattr__(self, key, None)
        if self.init == "upcycle" and self.upcycle is None:
            object.__setattr__(self, "upcycle", UpcycleConfig())
        return self

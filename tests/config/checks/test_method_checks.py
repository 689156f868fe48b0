"""What a method declares that it needs is there, whatever the method is called."""

from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

from minillm.config.method import MethodConfig
from minillm.config.models import ServedTeacherConfig, TeacherConfig
from minillm.config.needs import Needs, TermNeeds
from minillm.config.root import method_classes
from tests.config.shortest import EVALUATED, shortest_method

NEEDS = {name: method(**shortest_method(name)).needs() for name, method in method_classes().items()}


@pytest.mark.parametrize("name", [name for name, needs in NEEDS.items() if needs.teacher])
def test_methods_that_need_a_teacher(recipe, name):
    assert recipe.problems(teacher=..., method=shortest_method(name), eval=EVALUATED) == {
        "teacher": f"missing: method {name} needs one"
    }
    assert recipe.problems(teacher=None, method={"name": "sft"}) == {}


@pytest.mark.parametrize("name", [name for name, needs in NEEDS.items() if needs.prompts])
def test_methods_that_need_prompts(recipe, name):
    found = recipe.problems(method=shortest_method(name), data={"corpus": {"path": "data/*.txt"}}, eval=EVALUATED)
    assert found == {"data.prompts": f"missing: method {name} trains on prompts"}


def test_the_pretraining_loss_needs_a_corpus(recipe):
    assert "lm_coef is 1" in recipe.problems(data__corpus=...)["data.corpus"]
    assert recipe.problems(data__corpus=..., method={"name": "minillm", "lm_coef": 0}) == {}
    assert recipe.problems(data__corpus=..., method={"name": "kd"}) == {}


def test_parameters_of_a_divergence_that_has_them(recipe):
    found = recipe.problems(method={"name": "kd", "divergence": "tvd", "beta": 0.2, "skew": 0.3})
    assert set(found) == {"method.beta", "method.skew"}
    assert recipe.problems(method={"name": "kd", "divergence": "jsd", "beta": 0.2}) == {}
    assert recipe.problems(method={"name": "kd", "divergence": "skew_reverse_kl", "skew": 0.2}) == {}


def test_keys_that_another_key_of_the_method_leaves_without_effect(recipe):
    for method, key in (
        ({"lm_coef": 0, "pt_kd_ratio": 0.5}, "pt_kd_ratio"),
        ({"single_step": False, "single_step_weighted": False}, "single_step_weighted"),
        ({"cliprange": None, "importance_weight_in_clip": False}, "importance_weight_in_clip"),
        ({"alpha": 0, "importance_weight": "sequence"}, "importance_weight"),
    ):
        found = recipe.problems(method={"name": "minillm", **method})
        assert set(found) == {f"method.{key}"} and "has no effect" in found[f"method.{key}"]
    assert (
        "cross-entropy alone"
        in recipe.problems("method.ce_ratio=1", "method.divergence=jsd", method={"name": "kd"})["method.divergence"]
    )


class Preference(MethodConfig):
    """A method of another package, with needs that none of minillm's methods has."""

    name: Literal["preference"]
    weight: Annotated[float, Field(ge=0.0, le=1.0)] = Field(0.5, description="Of the corpus")
    margin: float = Field(0.0, description="Only with a weight")
    summary: ClassVar[str] = "preferences"

    def needs(self) -> Needs:
        return Needs(
            (TermNeeds("preference", ("pairs",), teacher=True),),
            prompts=False,
            pairs=self.weight < 0.9,
            images=self.weight == 0.1,
            corpus=self.weight > 0,
            samples=("teacher",),
            buffered=True,
            neutral_sampling=True,
            teacher=self.weight < 1,
            teacher_abilities=frozenset({"layers"}),
            because={"corpus": "weight", "teacher": "weight"},
        )

    def findings(self):
        if self.margin < 0:
            yield "margin", "must not be negative", ("weight",)

    def idle_keys(self):
        if self.weight == 0:
            yield "margin", "has no effect: weight is 0", "weight"


@pytest.fixture
def preference(recipe, registered):
    registered(Preference)

    def problems(*overrides, weight=0.95, **changes):
        method = {"name": "preference", "weight": weight, **changes.pop("method", {})}
        return recipe.problems(*overrides, method=method, **changes)

    return problems


def test_a_registered_method_is_checked_by_its_needs_alone(preference):
    assert preference() == {}
    assert preference(data={"corpus": {"path": "data/*.txt"}}) == {}  # it needs no prompts
    assert preference(data__corpus=...)["data.corpus"] == (
        "missing: method preference reads plain text while method.weight is 0.95; give it here, or set method.weight to 0"
    )
    assert preference(teacher=...)["teacher"] == (
        "missing: method preference needs one while method.weight is 0.95; give it here, or set method.weight to 1"
    )
    assert "for method preference" in preference(rollout={"top_k": 3})["rollout.top_k"]
    assert "do not divide" in preference(rollout={"buffer_size": 3})["rollout.buffer_size"]
    assert preference(method={"margin": -1.0})["method.margin"] == "must not be negative"
    assert preference(weight=0.0, method={"margin": 1.0})["method.margin"] == "has no effect: weight is 0"


def test_data_for_which_there_is_no_key_is_said_at_the_name_of_the_method(preference, monkeypatch):
    from minillm.config.data import DataConfig

    without = {name: field for name, field in DataConfig.model_fields.items() if name != "pairs"}
    monkeypatch.setattr(DataConfig, "__pydantic_fields__", without)
    assert preference(weight=0.5)["method.name"] == (
        "method preference trains on pairs of a chosen and a rejected answer, which no key of `data` gives"
    )


def test_pairs_of_the_data_are_for_a_method_that_trains_on_them(recipe):
    (recipe.folder / "data" / "pairs.jsonl").write_text("")
    pairs, method = {"path": "data/pairs.jsonl"}, {"name": "dpkd", "pairs": "data", "lm_coef": 0.0}
    assert recipe.problems(method=method, data={"pairs": pairs}) == {}
    assert recipe.problems(method=method, data={"pairs": pairs}, teacher=...) == {
        "teacher": "missing: method dpkd needs one while method.reference_free is false; give it here, or set "
        "method.reference_free to true"
    }
    assert recipe.problems(method={**method, "reference_free": True}, data={"pairs": pairs}, teacher=...) == {}
    assert recipe.problems(method=method) == {
        "data.pairs": "missing: method dpkd trains on pairs of a chosen and a rejected answer while method.pairs is data; "
        "give it here, or set method.pairs to sequence"
    }
    found = recipe.problems("data.pairs.chosen=rejected", method=method, data={"pairs": pairs})
    assert set(found) == {"data.pairs.rejected"}
    found = recipe.problems("data.pairs.path=data/pairs.jsonl", method={"name": "sft"})
    assert "trains on no pairs" in found["data.pairs.path"]
    recipe.model("models/small", max_position_embeddings=300)
    found = recipe.problems(method=method, data={"pairs": pairs}, teacher__path="models/small")
    assert "more than the 300 that the teacher" in found["data.pairs.max_response_length"]


def test_images_come_with_prompts_that_may_show_some(preference):
    assert "data.prompts.type" not in preference(weight=0.1)
    for prompts in ({"type": "pydoc"}, {"type": "text", "path": "data/book.txt"}):
        found = preference(weight=0.1, data={"prompts": prompts, "corpus": {"path": "data/*.txt"}})
        assert found["data.prompts.type"] == (
            f"{prompts['type']} prompts show no images, which method preference trains on"
        )


def test_tasks_are_made_of_records_with_fields(recipe):
    text = {"type": "text", "path": "data/book.txt"}
    found = recipe.problems(method={"name": "step_by_step"}, teacher=None, data__prompts=text)
    assert found["data.prompts.type"].startswith("text prompts have no fields")
    assert "data.prompts.type" not in recipe.problems(
        method={"name": "step_by_step"}, data__prompts={"type": "arithmetic"}
    )


@pytest.mark.parametrize(
    "tasks, key",
    [
        ({"a": {"prefix": "x"}}, "a.answer"),
        ({"a": {"answer": "{x"}}, "a.answer"),
        ({"a": {"answer": "x", "weight": 0.0}}, "a.weight"),
        ({"a/b": {"answer": "x"}}, ""),
        ({}, ""),
    ],
)
def test_a_task_says_its_answer_and_a_positive_weight(recipe, tasks, key):
    found = recipe.problems(method={"name": "step_by_step", "tasks": tasks})
    assert any(path.startswith(f"method.tasks.{key}".rstrip(".")) for path in found), found


def test_a_teacher_that_writes_rationales_is_there_and_asked_by_a_prompt(recipe):
    asks = {"prompt": "{question}", "parser": "gsm8k", "max_prompt_length": 200}
    writes = {"name": "step_by_step", "rationales": "teacher", "few_shot": asks}
    data = {"prompts": {"path": "data/train.jsonl", "parser": "gsm8k"}}

    def problems(*overrides, **changes):
        return recipe.problems(*overrides, **{"method": writes, "data": data, "rollout": {}, **changes})

    assert problems() == {}
    assert problems(method={**writes, "labels": "teacher"}, data={"prompts": {"path": "data/train.jsonl"}}) == {}
    assert problems(teacher=...) == {
        "teacher": "missing: method step_by_step needs one while method.rationales is teacher; give it here, or set "
        "method.rationales to data"
    }
    found = problems(method={"name": "step_by_step", "labels": "teacher"})
    assert found == {
        "method.few_shot": "missing: while method.labels is teacher, it is the prompt that the teacher answers"
    }
    found = problems(method={**writes, "tasks": {"label": {"answer": "{label}"}}})
    assert found["method.rationales"].startswith("is teacher, and no task has {rationale} in its answer")
    found = problems("method.few_shot.parser=cqa", method={**writes, "rationales": "data"})
    assert found == {"method.few_shot.parser": "has no effect: nothing is written by the teacher"}
    assert "method.few_shot.temperature" in problems("rollout.temperature=0.5")["rollout.temperature"]
    assert "for chat" in problems("method.few_shot.system=x")["method.few_shot.system"]
    found = problems("data.prompts.parser=cqa", method={**writes, "labels": "teacher"})
    assert "read by method.few_shot.parser" in found["data.prompts.parser"]
    assert set(problems(method={**writes, "few_shot": {"prompt": "{question}"}})) == {"method.few_shot.parser"}


def test_a_teacher_that_cannot_do_what_the_method_asks_is_named(preference, monkeypatch):
    monkeypatch.setattr(TeacherConfig, "abilities", frozenset({"read", "sample", "single"}))
    assert preference()["teacher"] == (
        "method preference needs a teacher that can give hidden states of inner layers, which this one cannot"
    )


def test_the_teacher_reads_what_it_answers(preference, recipe):
    recipe.model("models/small", max_position_embeddings=300)
    found = preference(teacher__path="models/small", rollout={"max_new_tokens": 100})
    assert "the 300 that the teacher models/small can read" in found["rollout.max_new_tokens"]


def test_adapters_are_for_a_student_that_is_trained(recipe, registered):
    pytest.importorskip("peft")

    class Selection(MethodConfig):
        """A stage without steps, which chooses documents."""

        name: Literal["selection"]
        summary: ClassVar[str] = "selection"

        def needs(self) -> Needs:
            return Needs((), prompts=False, corpus=True, teacher=True, trains=())

    registered(Selection)
    selection = {"name": "selection"}
    assert recipe.problems(method=selection, train={}) == {}  # nothing is trained, so that nothing says when it ends
    found = recipe.problems("student.lora={r: 8, alpha: 32}", method=selection)
    assert set(found) == {"student.lora.r", "student.lora.alpha"}
    assert "400 tokens are more than the 300" in recipe_with_long_blocks(recipe, selection)["data.corpus.block_size"]

    # the data that it leaves is for later stages, and no model
    stages = {"choose": {"method": selection}, "train": {"data": {"corpus": {"path": "stage:choose"}}}}
    assert recipe.problems(stages=stages) == {}
    stages["train"]["student"] = {"path": "stage:choose"}
    assert "leaves data and no model" in recipe.problems(stages=stages)["stages.train.student.path"]
    stages = {"train": {}, "again": {"data": {"corpus": {"path": "stage:train"}}}}
    assert "leaves a model and no data" in recipe.problems(stages=stages)["stages.again.data.corpus.path"]


def recipe_with_long_blocks(recipe, method):
    recipe.model("models/small", max_position_embeddings=300)
    return recipe.problems(method=method, teacher__path="models/small", data__corpus__block_size=400)


def test_a_method_that_adapts_to_evaluations_needs_them(recipe):
    method = {"name": "distillm", "steps": 9}
    for key in ("sets", "steps"):
        found = recipe.problems(method=method, eval={other: EVALUATED[other] for other in EVALUATED if other != key})
        assert found[f"eval.{key}"].startswith("missing: method distillm adapts to its evaluations in training while")
        assert found[f"eval.{key}"].endswith("or set method.threshold_step to 0")
    assert recipe.problems(method=method, eval=EVALUATED) == {}
    assert recipe.problems(method={**method, "threshold_step": 0, "threshold_start": 0.5}) == {}


@pytest.fixture
def cached_in(recipe):
    """The keys of a cached teacher whose folder is there."""
    (recipe.folder / "caches" / "one").mkdir(parents=True)
    (recipe.folder / "caches" / "one" / "cache.json").write_text("{}")
    return {"type": "cached", "path": "caches/one"}


@pytest.mark.parametrize(
    "method",
    [
        {"name": "sft"},
        {"name": "kd"},
        {"name": "taid", "steps": 4},
        {"name": "lm", "kd_ratio": 0.5},
        {"name": "seqkd"},
        {"name": "distillm", "steps": 4, "threshold_step": 0.0},
        {"name": "gkd", "on_policy": 0.0},
        {"name": "dpkd", "pairs": "token_argmax"},
        {"name": "step_by_step"},
    ],
)
def test_a_cached_teacher_is_enough_for_texts_that_are_known(recipe, cached_in, method):
    rollout = {"rollout": {"max_new_tokens": 8}} if method["name"] == "seqkd" else {}
    assert recipe.problems(method=method, teacher=cached_in, **rollout) == {}


@pytest.mark.parametrize(
    ("method", "lacking"),
    [
        (
            {"name": "minillm"},
            "be mixed with the student token by token and read texts that are made while the stage runs",
        ),
        ({"name": "minillm", "alpha": 1.0}, "read texts that are made while the stage runs and answer prompts"),
        ({"name": "minillm", "alpha": 0.0}, "read texts that are made while the stage runs"),
        ({"name": "gkd"}, "read texts that are made while the stage runs"),
        ({"name": "opd"}, "read texts that are made while the stage runs"),
        ({"name": "distillm", "steps": 4, "threshold_start": 0.1, "threshold_step": 0.0}, "read texts that are made"),
        ({"name": "distillm2"}, "read texts that are made while the stage runs and answer prompts"),
        ({"name": "dpkd"}, "read texts that are made while the stage runs and answer prompts"),
        ({"name": "okd"}, "give its last hidden states and be trained"),
        ({"name": "miniplm", "reference": "models/big"}, "read texts that are made while the stage runs"),
        ({"name": "cache"}, "give its last hidden states and read texts"),
        ({"name": "uld"}, "read texts that are made while the stage runs"),
        ({"name": "gold", "on_policy": 0.0}, "read texts that are made while the stage runs"),
    ],
)
def test_a_method_that_needs_a_teacher_at_hand_refuses_a_cached_one(recipe, cached_in, method, lacking):
    said = recipe.problems(method=method, teacher=cached_in)["teacher"]
    assert said.startswith(f"method {method['name']} needs a teacher that can {lacking}"), said
    assert said.endswith("which a cached one cannot")


def test_what_a_cached_teacher_cannot_measure_is_refused(recipe, cached_in):
    sets = {"held_out": {"path": "data/train.jsonl"}}
    kd = {"name": "kd"}
    found = recipe.problems(method=kd, teacher=cached_in, eval={"sets": sets, "metric": "reverse_kl_nats"})
    assert found["eval.metric"] == (
        "reverse_kl_nats is a distance to the teacher, and a cached one cannot read the answers of the student"
    )
    found = recipe.problems(method=kd, teacher=cached_in, engine={"type": "deepspeed", "replicate_teacher": True})
    assert "of a cached teacher every rank has the head alone" in found.get("engine.replicate_teacher", str(found))
    assert "dtype" in str(recipe.problems(method=kd, teacher={**cached_in, "dtype": "bfloat16"}))


SERVED = {"type": "served", "url": ["http://one:8311", "https://two:8311"]}
TOP_K = SERVED | {"rows": "top_k"}


OPENAI = SERVED | {"protocol": "openai", "tokenizer": "byte"}


@pytest.mark.parametrize("method", ["kd", "taid", "gkd", "opd", "distillm", "lm", "step_by_step"])
def test_a_teacher_of_protocol_openai_reads_what_is_made_while_the_stage_runs(recipe, method):
    assert recipe.problems(method={"name": method}, teacher=OPENAI).get("teacher") is None


@pytest.mark.parametrize("teacher", [SERVED, TOP_K])
@pytest.mark.parametrize(
    "method",
    [
        {"name": "kd"},
        {"name": "gkd"},
        {"name": "opd"},
        {"name": "minillm", "alpha": 0.0},
        {"name": "minillm", "alpha": 1.0},
        {"name": "seqkd"},
        {"name": "distillm2"},
        {"name": "step_by_step"},
        {"name": "miniplm", "reference": "models/big"},
    ],
)
def test_a_served_teacher_reads_and_answers_what_is_made_while_the_stage_runs(recipe, teacher, method):
    assert recipe.problems(method=method, teacher=teacher) == {}


@pytest.mark.parametrize(
    ("method", "teacher", "lacking"),
    [
        ({"name": "minillm"}, SERVED, "be mixed with the student token by token"),
        ({"name": "okd"}, SERVED, "be trained"),
        ({"name": "cache"}, SERVED, "be run in this process"),
        ({"name": "cmc"}, SERVED, "be run in this process"),
        ({"name": "dpkd", "pairs": "token_argmax"}, TOP_K, "give the log-probability of any id"),
        ({"name": "cmc"}, TOP_K, "give its last hidden states and be run in this process"),
        ({"name": "minillm", "alpha": 1.0}, OPENAI, "answer prompts"),
        ({"name": "seqkd"}, OPENAI, "give its answers to the prompts, written once"),
        ({"name": "distillm2"}, OPENAI, "answer prompts"),
        ({"name": "uld"}, OPENAI, "give the log-probability of any id"),
        ({"name": "gold"}, TOP_K, "give the log-probability of any id"),
    ],
)
def test_a_method_that_needs_the_teachers_weights_refuses_a_served_one(recipe, method, teacher, lacking):
    said = recipe.problems(method=method, teacher=teacher)["teacher"]
    called = "one served by protocol openai" if teacher is OPENAI else "a served one"
    assert said == f"method {method['name']} needs a teacher that can {lacking}, which {called} cannot"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("localhost:8311", "'localhost:8311' is no address of a server; expected http://HOST:PORT"),
        ("ftp://one:1", "is no address of a server"),
        ("http://one:99999", "is no address (Port out of range"),
        ("http://one:0", "names port 0"),
        ("http://me:secret@one:1", "holds a password"),
        ("http://one:1/rows", "has more than a host and a port"),
        ([], "must not be empty"),
        (["http://one:1", "http://one:1/"], "names http://one:1 more than once"),
    ],
)
def test_the_address_of_a_server_is_one(recipe, url, problem):
    found = recipe.problems(method={"name": "kd"}, teacher={"type": "served", "url": url})
    assert problem in found["teacher.url"]


def test_the_keys_of_a_teacher_of_protocol_openai_go_together(recipe):
    def problems(**keys):
        return recipe.problems(method={"name": "kd"}, teacher={**OPENAI, **keys})

    assert problems(url=["http://one:8000/v1", "https://two/gateway"]) == {} == problems(rows="top_k", k=7)
    assert "send no hidden states" in problems(rows="hidden")["teacher.rows"]
    assert "send no tokenizer" in problems(tokenizer=None)["teacher.tokenizer"]
    assert problems(tokenizer=None, model="models/big") == {}
    assert "send theirs" in problems(protocol="minillm")["teacher.tokenizer"]
    assert "more than once" in problems(url=["http://one:1", "http://one:1/v1/"])["teacher.url"]


def test_rows_and_ids_that_are_not_given_are_those_of_the_protocol():
    def made(**keys):
        config = ServedTeacherConfig(**{"type": "served", "url": "http://one:1/v1", **keys})
        return config.rows, config.k, config.urls

    assert made() == ("hidden", 64, ("http://one:1/v1",)) and made(rows="top_k", k=3)[:2] == ("top_k", 3)
    assert made(protocol="openai") == ("top_k", 20, ("http://one:1",)) and made(protocol="openai", k=3)[1] == 3


def test_the_keys_of_a_served_teacher_go_together(recipe):
    kd = {"name": "kd"}
    assert "it is for top_k" in recipe.problems(method=kd, teacher=SERVED | {"rows": "hidden", "k": 7})["teacher.k"]
    assert recipe.problems(method=kd, teacher=TOP_K | {"k": 7}) == {}
    found = recipe.problems(method=kd, teacher=SERVED, engine={"type": "deepspeed", "replicate_teacher": True})
    assert "of a served teacher every rank has the head alone" in found.get("engine.replicate_teacher", str(found))
    sets = {"held_out": {"path": "data/train.jsonl"}}
    assert recipe.problems(method=kd, teacher=SERVED, eval={"sets": sets, "metric": "reverse_kl_nats"}) == {}


def test_a_cached_teacher_is_where_its_path_says(recipe, cached_in):
    kd = {"name": "kd"}
    found = recipe.problems(method=kd, teacher={"type": "cached", "path": "caches/onee"})
    assert found["teacher.path"] == "no such folder: caches/onee (did you mean caches/one?)"
    found = recipe.problems(method=kd, teacher={"type": "cached", "path": "models/big"})
    assert "is no cache: expected a folder with a cache.json" in found["teacher.path"]
    local = {"path": "models/big", "dtype": "bfloat16"}
    stages = {
        "write": {"method": {"name": "cache"}},
        "learn": {"method": kd, "teacher": {"type": "cached", "path": "stage:write"}},
    }
    assert recipe.problems(stages=stages, teacher=local, method=...) == {}  # nothing of the local one is inherited
    stages["write"]["method"] = kd
    found = recipe.problems(stages=stages, teacher=local, method=...)
    assert found["stages.learn.teacher.path"] == "stage 'write' (kd) leaves a model and no cached teacher"
    stages["write"]["method"], stages["learn"]["student"] = {"name": "cache"}, {"path": "stage:write"}
    found = recipe.problems(stages=stages, teacher=local, method=...)
    assert found["stages.learn.student.path"] == "stage 'write' (cache) leaves a cached teacher and no model"


def test_the_keys_of_a_cache_go_together(recipe):
    assert recipe.problems(method={"name": "cache", "texts": ["corpus"]}) == {}
    found = recipe.problems(method={"name": "cache", "rows": "top_k", "dtype": "int8"})
    assert "log-probabilities need float16" in found["method.dtype"]
    found = recipe.problems(method={"name": "cache", "texts": ["corpus", "corpus"]})
    assert "more than once" in found["method.texts"]
    assert "it is for top_k" in recipe.problems(method={"name": "cache", "k": 7, "rows": "hidden"})["method.k"]

"""What each `init` needs, layers that exist, and packages that must be installed."""

from importlib import metadata

import pytest


@pytest.fixture
def installed(monkeypatch):
    """Only the distributions of this set are installed."""
    names = set()

    def version(name):
        if name not in names:
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    return names


@pytest.mark.parametrize(
    ("student", "wrong"),
    [
        ({}, {"student.path": "init: pretrained takes"}),
        ({"init": "prune", "layers": 2}, {"student.path": "init: prune takes"}),
        ({"path": "models/big", "init": "prune"}, {"student.layers": "missing"}),
        ({"path": "models/big", "layers": [0, 1]}, {"student.layers": "no effect without init: prune"}),
        ({"path": "models/big", "config": {}}, {"student.config": "no effect without init: random"}),
        (
            {"path": "models/big", "init": "pretrained", "layers": 2},
            {"student.layers": "no effect without init: prune"},
        ),
        (
            {"path": "models/big", "init": "prune", "layers": 2, "config": {}},
            {"student.config": "without init: random"},
        ),
        ({"init": "random"}, {"student.config": "missing", "student.tokenizer": "or say byte"}),
        ({"init": "random", "config": {}, "tokenizer": "byte"}, {"student.config": "model_type"}),
        ({"init": "random", "config": {"model_type": "llama"}, "tokenizer": "byte"}, {}),
        ({"init": "random", "path": "models/big"}, {}),
        ({"path": "models/big", "init": "prune", "layers": [0, 4]}, {}),
        ({"path": "models/big", "init": "prune", "layers": 5}, {}),
        ({"path": "models/big", "init": "prune", "layers": 6}, {"student.layers": "has only 5 layers"}),
        ({"path": "models/big", "init": "prune", "layers": [0, 5, 7]}, {"student.layers": "layers 0 to 4, no 5, 7"}),
        ({"path": "models/big", "init": "prune", "layers": [1, 2, 1]}, {"student.layers": "names 1 more than once"}),
        ({"path": "models/big", "init": "prune", "layers": []}, {"student.layers": "must not be empty"}),
        ({"path": "org/name", "init": "prune", "layers": [0, 99]}, {}),
        ({"init": "upcycle"}, {"student.path": "init: upcycle takes"}),
        ({"path": "models/big", "init": "upcycle"}, {}),
        ({"path": "models/big", "upcycle": {}}, {"student.upcycle": "no effect without init: upcycle"}),
        (
            {"path": "models/big", "init": "upcycle", "upcycle": {"num_experts": 2, "num_experts_per_tok": 3}},
            {"student.upcycle.num_experts_per_tok": "of 2 experts no token can be sent to 3"},
        ),
        (
            {"path": "models/big", "init": "upcycle", "upcycle": {"every": 2}},
            {"student.upcycle.every": "of a mixtral has"},
        ),
        ({"path": "org/name", "init": "upcycle", "upcycle": {"every": 2}}, {}),
    ],
)
def test_forms_of_a_student(recipe, student, wrong):
    found = recipe.problems(student=student)
    assert set(found) == set(wrong)
    for path, words in wrong.items():
        assert words in found[path]


@pytest.mark.parametrize(
    ("student", "method", "wrong"),
    [
        ({"train": ["projector"]}, "kd", {}),
        ({"vision_from_layer": 6}, "kd", {}),
        ({"train": ["projector"], "vision_from_layer": 6}, "kd", {"student.vision_from_layer": "leaves out vision"}),
        ({"train": ["vision"], "lora": {"r": 8, "alpha": 8}}, "kd", {"student.train": "leave one of the two out"}),
        ({"vision_from_layer": 1, "lora": {"r": 8, "alpha": 8}}, "kd", {"student.vision_from_layer": "leave one"}),
        ({"train": ["vision"]}, "lm", {"student.train": "nothing is trained by plain text, which method lm"}),
        ({"train": ["tower"]}, "kd", {"student.train[0]": "not one of projector, language, feed_forward, vision"}),
        ({"train": ["feed_forward"]}, "lm", {}),
        ({"train": ["feed_forward", "language"]}, "kd", {"student.train": "feed_forward is a part of language"}),
    ],
)
def test_the_parts_that_are_trained(recipe, student, method, wrong):
    corpus = {"type": "text", "path": "data/corpus.txt", "block_size": 8}
    found = recipe.problems(student={"path": "org/name", **student}, method={"name": method}, data__corpus=corpus)
    found = {path: words for path, words in found.items() if path.startswith("student")}
    assert set(found) == set(wrong), found
    for path, words in wrong.items():
        assert words in found[path]


def test_a_stage_may_inherit_layers_and_go_on_from_the_pruned_model(recipe):
    student = {"path": "models/big", "init": "prune", "layers": [0, 4]}
    own = {"student": {"path": "stage:one", "init": "pretrained"}}
    assert recipe.problems(student=student, stages={"one": {}, "two": own}) == {}
    again = {"student": {"path": "stage:one"}}  # inherits init: prune, of a model with two layers
    found = recipe.problems(student=student, stages={"one": {}, "two": again})
    assert "stage:one has the layers 0 to 1, no 4" in found["student.layers"]
    assert found["student.layers"].startswith("in stage two: ")


@pytest.mark.parametrize(
    ("implementation", "distribution", "words"),
    [
        ("flash_attention_2", "flash-attn", "pip install flash-attn --no-build-isolation"),
        ("flash_attention_3", "flash-attn-3", "hopper"),
        ("flash_attention_4", "flash-attn-4", "pip install flash-attn-4"),
    ],
)
def test_flash_attention_says_how_to_install_it(recipe, installed, implementation, distribution, words):
    found = recipe.problems(student__attn_implementation=implementation)
    assert words in found["student.attn_implementation"]
    installed.add(distribution)
    assert recipe.problems(student__attn_implementation=implementation) == {}
    assert recipe.problems(student__attn_implementation="sdpa") == {}


def test_gguf_files_need_their_extra(recipe, installed):
    (recipe.folder / "model.gguf").write_text("")
    message = recipe.problems(teacher__path="model.gguf")["teacher.path"]
    assert "gguf and accelerate" in message and ".[gguf]" in message
    installed.add("gguf")
    assert "needs accelerate:" in recipe.problems(teacher__path="model.gguf")["teacher.path"]
    installed.add("accelerate")
    assert recipe.problems(teacher__path="model.gguf") == {}


def test_a_sentencepiece_tokenizer_needs_its_package(recipe, installed):
    folder = recipe.folder / "models" / "big"
    (folder / "tokenizer.model").write_text("")
    found = recipe.problems()
    assert set(found) == {"student.path", "teacher.path"}
    assert found["student.path"] == (
        "models/big/tokenizer.model needs sentencepiece, which is not installed: pip install sentencepiece"
    )
    assert set(recipe.problems(student__tokenizer="byte", teacher__tokenizer="models/big")) == {"teacher.tokenizer"}
    (folder / "tokenizer.json").write_text("")  # which is read without
    assert recipe.problems() == {}
    (folder / "tokenizer.json").unlink()
    installed.add("sentencepiece")
    assert recipe.problems() == {}


def test_a_revision_is_for_hub_names(recipe):
    assert "it is for hub names" in recipe.problems(student__revision="main")["student.revision"]
    assert recipe.problems(student={"path": "org/model", "revision": "main"}) == {}


def test_quantisation_needs_its_extra_and_a_folder(recipe, installed):
    assert recipe.problems(teacher__quantization="nf4") == {
        "teacher.quantization": "needs bitsandbytes and accelerate, not installed: pip install -e '.[quantization]' in minillm's folder"
    }
    installed |= {"bitsandbytes", "accelerate", "gguf"}
    assert recipe.problems(teacher__quantization="nf4") == {}
    assert "not one of int8, nf4" in recipe.problems(teacher__quantization="fp4")["teacher.quantization"]
    assert "unknown key" in recipe.problems(student__quantization="nf4")["student.quantization"]
    (recipe.folder / "model.gguf").write_text("")
    message = recipe.problems(teacher={"path": "model.gguf", "quantization": "nf4"})["teacher.quantization"]
    assert "a .gguf file is read into plain weights" in message


def test_adapters_need_their_extra(recipe, installed):
    message = recipe.problems(student__lora={"r": 8, "alpha": 32})["student.lora"]
    assert "needs peft, which is not installed: pip install -e '.[lora]'" in message
    installed.add("peft")
    assert recipe.problems(student__lora={"r": 8, "alpha": 32}) == {}
    assert recipe.problems(student__lora={"r": 8, "alpha": 32, "target_modules": ["q_proj", "mlp.c_proj"]}) == {}


def test_adapters_of_a_method_are_looked_at_as_the_students_are(recipe, installed):
    method = {"name": "okd", "lora": {"r": 8, "alpha": 32, "target_modules": ["q_proj", "lm_head"]}}
    message = recipe.problems(method=method, teacher={"path": "models/big"})
    assert "needs peft, which is not installed" in message["method.lora"]
    installed.add("peft")
    ((path, message),) = recipe.problems(method=method, teacher={"path": "models/big"}).items()
    assert path == "method.lora.target_modules[1]" and "lm_head is the LM head" in message


@pytest.mark.parametrize(
    ("lora", "path", "words"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "student.lora.target_modules[1]", "lm_head is the LM head"),
        ({"target_modules": ["gpt_neox.embed_in"]}, "student.lora.target_modules[0]", "is a table of embeddings"),
        ({"target_modules": []}, "student.lora.target_modules", "must not be empty"),
        ({"target_modules": "q_proj"}, "student.lora.target_modules", "a list of names"),
        ({"target_modules": 7}, "student.lora.target_modules", "expected text or a list, not 7"),
        ({"r": 0}, "student.lora.r", "at least 1"),
        ({"r": None}, "student.lora.r", "expected a whole number"),
        ({"lora_alpha": 16}, "student.lora.lora_alpha", "did you mean alpha?"),
        ({"dropout": 0.1}, "student.lora.dropout", "unknown key"),
    ],
)
def test_adapters_that_no_loss_would_see_or_that_mean_nothing(recipe, installed, lora, path, words):
    installed.add("peft")
    found = recipe.problems(student__lora={"r": 8, "alpha": 32, **lora})
    assert list(found) == [path] and words in found[path]


def test_rank_and_scale_must_be_said(recipe, installed):
    installed.add("peft")
    assert recipe.problems(student__lora={}) == {
        "student.lora.r": "missing: the rank of the adapters",
        "student.lora.alpha": "missing: the adapters' product is scaled by alpha / r",
    }


def test_a_stage_trains_all_weights_where_it_takes_the_adapters_back(recipe, installed):
    installed.add("peft")
    stages = {"teacher": {"student": {"lora": None}}, "distil": {}}
    plan = recipe.load(student__lora={"r": 8, "alpha": 32}, stages=stages)
    assert [stage.config.student.lora is None for stage in plan.stages] == [True, False]


@pytest.mark.parametrize("key, value, init", [("layers", "2", "prune"), ("config", "{hidden_size: 32}", "random")])
def test_keys_of_another_init_on_the_command_line(recipe, key, value, init):
    """Written in the file, a stage may inherit them; a word of the command line is expected to do something."""
    assert recipe.problems(f"student.{key}={value}", student__init="pretrained")[f"student.{key}" + (".hidden_size" if key == "config" else "")] == f"has no effect without init: {init}"  # fmt: skip
    stages = {"first": {"student": {"init": "prune", "layers": [0]}}, "second": {"student": {"init": "pretrained"}}}
    assert recipe.problems(stages=stages) == {}


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:3", None])
def test_a_teacher_may_be_on_a_device_of_its_own(recipe, device):
    assert recipe.load(teacher__device=device).stages[0].config.teacher.device == device


@pytest.mark.parametrize("device", ["auto", "cuda:x", "mps", 1])
def test_other_devices_are_refused(recipe, device):
    assert set(recipe.problems(teacher__device=device)) == {"teacher.device"}


@pytest.mark.parametrize("kind", ["cached", "served"])
def test_a_teacher_whose_weights_are_elsewhere_has_no_device(recipe, kind):
    where = {"path": "cache"} if kind == "cached" else {"url": "http://host"}
    found = recipe.problems(teacher={"type": kind, "device": "cuda:1", **where}, method={"name": "kd"})
    assert found["teacher.device"] == f"unknown key for type {kind} (local has device)"

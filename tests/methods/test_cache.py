"""cache: losses from what a teacher has said beforehand are those of the teacher itself, with no teacher there; and what may
stop a writing or change the data does no harm."""

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers.normalizers import Replace

from minillm import UserError
from minillm.cli.main import main
from minillm.config.loader.run_plan import load_run
from minillm.config.root import StageConfig
from minillm.data.corpus import load_corpus
from minillm.data.instructions import load_prompts
from minillm.data.stream import Stream
from minillm.engine.module import TermLoss
from minillm.methods import build_method
from minillm.methods import cache as module
from minillm.methods.protocol import TrainingData
from minillm.models.saving import save_model
from minillm.models.tokenizers import byte_tokenizer
from minillm.planning.architectures import Architectures
from minillm.planning.cached_teacher import cache_size
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.storage.manifest import sign
from minillm.teachers import open as opening
from minillm.teachers.cached import CachedTeacher
from minillm.teachers.pair import Models
from minillm.train.caching import write_caches
from tests.conftest import tiny_llama
from tests.distributed.conftest import finish, start  # noqa: F401  fixtures
from tests.methods.conftest import steps_of
from tests.runs import TRAIN, Silent, die_after, every_record, in_a_child, train

KIB = 2**10
METHODS = {
    "kd": {"ce_ratio": 0.3},
    "kd reverse": {"name": "kd", "divergence": "reverse_kl", "ce_ratio": 0.0},
    "taid": {"steps": 4},
    "distillm": {"steps": 4, "threshold_step": 0.0, "lm_coef": 0.5},
    "lm": {"kd_ratio": 0.5},
    "dpkd": {"pairs": "token_argmax", "lm_coef": 0.5, "pt_kd_ratio": 0.5},
}


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    """Shards of KiB in the place of MiB, so that a few texts are work for several kills and ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIB", KIB)
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_run) -> Path:
    """A stage that caches what a teacher says of prompts and a corpus, and a student that learns from that."""
    folder = tmp_path_factory.mktemp("cache")
    document = small_run(folder, layers=1)
    tokenizer = byte_tokenizer()
    teacher = tiny_llama(vocab_size=len(tokenizer), hidden_size=48, seed=1, tie=True)
    save_model(teacher, tokenizer, folder / "teacher")
    document["eval"] = {}
    document["train"] |= {"max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    document["save"] = {"keep": 1}
    document["stages"] = {
        "cache": {
            "teacher": {"path": str(folder / "teacher")},
            "method": {"name": "cache", "texts": ["references", "corpus"], "dtype": "float32", "shard_mib": 8},
        },
        "student": {
            "teacher": {"type": "cached", "path": "stage:cache"},
            "method": {"name": "kd", "ce_ratio": 0.3},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def config_of(recipe: Path, **method) -> StageConfig:
    document = yaml.safe_load(recipe.read_text())
    keys = {key: document[key] for key in ("output_dir", "seed", "data", "rollout")}
    teacher = method.pop("teacher", {"path": str(recipe.parent / "teacher")})
    train = {"max_steps": 1, "per_device_train_batch_size": 1}
    return StageConfig(**keys, student={"path": "s"}, teacher=teacher, method=method, train=train)


def material(config: StageConfig, models: Models, folder: Path) -> TrainingData:
    return TrainingData(
        prompts=Stream(load_prompts(config.data.prompts, models.tokenizer).examples, seed=0),
        corpus=Stream(load_corpus(config.data.corpus, models.tokenizer).blocks, seed=0),
        rollouts=LocalRollouts(models),
        folder=folder,
        tokenizer=models.tokenizer,
    )


@pytest.fixture(scope="module")
def models(make_models) -> Models:
    return make_models()


@pytest.fixture(scope="module")
def cached(recipe, models, tmp_path_factory):
    """A function that has the models' teacher cached with such keys, and returns the pair with that in its place."""
    made = {}

    def make(**keys) -> Models:
        name = json.dumps(keys)
        if name not in made:
            made[name] = write(recipe, models, tmp_path_factory.mktemp("written"), **keys)
        return replace(models, teacher=CachedTeacher(made[name], torch.device("cpu")))

    return make


def write(recipe, models, folder, **keys) -> Path:
    config = config_of(recipe, name="cache", **{"texts": ["references", "corpus"], "shard_mib": 8} | keys)
    (folder / "result").mkdir(exist_ok=True)
    pair = replace(models, student=models.teacher.model)
    build_method(config).prepare(material(config, pair, folder), pair, folder / "result")
    sign(folder / "result")
    return folder / "result"


def losses(recipe, pair, tmp_path, **method) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(loss, gradient of the head) of every term of the first step, each item by itself."""
    config = config_of(recipe, **method)
    data = material(config, pair, tmp_path)
    built, found = build_method(config), {}
    loss_of = TermLoss(pair.student, vocab_size=pair.vocab_size, backend="torch")
    for term in built.terms(built.collect(data, pair, 0), data, pair):
        pair.student.zero_grad()
        loss, _ = loss_of(term)
        loss.backward()
        found[term.name] = loss.detach(), pair.student.lm_head.weight.grad.clone()
    return found


@pytest.mark.parametrize("name", METHODS)
def test_losses_and_gradients_are_those_of_the_teacher_bit_for_bit(recipe, models, cached, tmp_path, name, one_thread):
    keys = {"name": name, **METHODS[name]}
    live = losses(recipe, models, tmp_path, **keys)
    ours = losses(recipe, cached(dtype="float32"), tmp_path, **keys)
    assert live.keys() == ours.keys()
    for term, (loss, gradient) in live.items():
        assert torch.equal(loss, ours[term][0]) and torch.equal(gradient, ours[term][1]), term
        assert loss > 0 and gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["kd", "seqkd"])
def test_a_teacher_that_was_told_more_is_cached_with_that(recipe, models, tmp_path, name, one_thread):
    told = {"teacher_context": "say it was {completion}", "max_teacher_prompt_length": 60}
    document = yaml.safe_load(recipe.read_text())
    document["data"]["prompts"] |= told
    path = tmp_path / "told.yaml"
    path.write_text(yaml.safe_dump(document))
    folder = write(path, models, tmp_path, dtype="float32", texts=["references", "answers"])
    pair = replace(models, teacher=CachedTeacher(folder, torch.device("cpu")))
    keys = {"kd": {"ce_ratio": 0.3}, "seqkd": {"kd_ratio": 0.5}}[name] | {"name": name}
    live = losses(path, models, tmp_path / "live", teacher={"path": str(recipe.parent / "teacher")}, **keys)
    ours = losses(path, pair, tmp_path / "ours", teacher={"type": "cached", "path": str(folder)}, **keys)
    assert torch.equal(live["distillation"][0], ours["distillation"][0])
    untold = losses(recipe, models, tmp_path / "untold", teacher={"path": str(recipe.parent / "teacher")}, **keys)
    assert abs(untold["distillation"][0] - ours["distillation"][0]) > 1e-4
    examples = material(config_of(path, name="kd"), models, tmp_path).prompts.items
    assert all(pair.teacher.holds(one.sequence) for one in examples)
    assert not any(pair.teacher.holds(replace(one, teacher_prompt_ids=None).sequence) for one in examples)


@pytest.mark.parametrize("dtype, most", [("bfloat16", 2e-2), ("float16", 2e-3), ("int8", 3e-2)])
def test_other_forms_are_as_far_as_they_say(recipe, models, cached, tmp_path, dtype, most):
    keys = {"name": "kd", "ce_ratio": 0.0}
    pair = cached(dtype=dtype)
    (live, _), (ours, _) = (losses(recipe, one, tmp_path, **keys)["distillation"] for one in (models, pair))
    assert 0 < abs(ours - live) / live < most
    said = pair.teacher.cache.described["error"]
    assert 0 < said["forward_kl_nats_mean"] < said["forward_kl_nats_most"] < most and said["relative_rms"] < 0.02


def test_a_teacher_in_bfloat16_is_cached_to_the_bit(recipe, make_models, tmp_path):
    models = make_models()
    models.teacher.model.bfloat16()
    folder = write(recipe, models, tmp_path, dtype="bfloat16")
    pair = replace(models, teacher=CachedTeacher(folder, torch.device("cpu")))
    assert pair.teacher.cache.described["error"]["relative_rms"] == 0
    live, ours = (losses(recipe, one, tmp_path, name="kd", ce_ratio=0.0)["distillation"] for one in (models, pair))
    assert torch.equal(live[0], ours[0]) and live[0] > 0


def test_likeliest_ids_are_the_divergence_over_them_and_the_rest(recipe, models, cached, tmp_path):
    keys = {"name": "kd", "ce_ratio": 0.0}
    full, _ = losses(recipe, models, tmp_path, **keys)["distillation"]
    found = {k: losses(recipe, cached(rows="top_k", dtype="float32", k=k), tmp_path, **keys) for k in (4, 64, 257)}
    four, many, all_ids = (found[k]["distillation"][0] for k in (4, 64, 257))
    assert 0 < four < many < full and all_ids == pytest.approx(full.item(), rel=1e-5)
    teacher = cached(rows="top_k", dtype="float32", k=4).teacher
    assert teacher.largest_id < 257 and teacher.abilities == {"single"}
    with pytest.raises(UserError, match="holds likeliest ids, and no hidden states"), teacher.head():
        pass


@pytest.fixture(scope="module")
def written(recipe) -> Path:
    """The folder of a run of which the cache is written, and nothing else."""
    folder = recipe.parent / "written"
    write_caches(load_run([recipe], [f"output_dir={folder}"]), console=Silent())
    return folder


def test_a_run_takes_the_steps_of_one_with_the_teacher_and_loads_none(recipe, monkeypatch, one_thread):
    folder, live = recipe.parent / "cached", recipe.parent / "live"
    write_caches(load_run([recipe], [f"output_dir={folder}"]), console=Silent())
    loaded = []
    load = opening.load_teacher
    monkeypatch.setattr(opening, "load_teacher", lambda *words, **keys: loaded.append(1) or load(*words, **keys))
    train(recipe, f"output_dir={folder}", resume=True)  # the cache is there
    assert not loaded
    document = yaml.safe_load(recipe.read_text())
    document["stages"] = {
        "student": {**document["stages"]["student"], "teacher": {"path": str(recipe.parent / "teacher")}}
    }
    (recipe.parent / "live.yaml").write_text(yaml.safe_dump(document))
    train(recipe.parent / "live.yaml", f"output_dir={live}")
    assert loaded
    ours, theirs = steps_of(folder, "student"), steps_of(live, "student")
    assert len(ours) == 3 and ours == theirs
    assert "with what is cached in" in (folder / "final" / "README.md").read_text()


def test_a_writing_that_is_killed_goes_on_to_the_same_cache(recipe, tmp_path, one_thread):
    def write_to(folder: Path, events: int | None = None) -> None:
        if events is not None:
            die_after(events)
        write_caches(load_run([recipe], [f"output_dir={folder}", "stages.cache.method.shard_mib=4"]), console=Silent())

    whole, killed, seen = tmp_path / "whole", tmp_path / "killed", []
    assert in_a_child(lambda: write_to(whole)) == 0
    while os.WIFSIGNALED(status := in_a_child(lambda: write_to(killed, 6 + 12 * len(seen)))):
        shards = len(list(killed.glob("written/cache/rows/rows-*.safetensors")))
        seen.append((shards, (killed / "stages" / "cache").is_dir()))
        assert len(seen) < 12, "it never ends"
    assert status == 0 and any(shards and not there for shards, there in seen), seen
    for path in (whole / "stages" / "cache").glob("*.safetensors"):
        assert path.read_bytes() == (killed / "stages" / "cache" / path.name).read_bytes(), path.name
    assert len(list((whole / "stages" / "cache").glob("rows-*"))) > 8


def test_ranks_write_what_one_process_does(recipe, models, in_ranks, tmp_path, one_thread):
    alone = write(recipe, models, tmp_path)
    folder = tmp_path / "ranks"
    folder.mkdir()
    config = config_of(recipe, name="cache", texts=["references", "corpus"], shard_mib=8)
    wrote = []
    pair = replace(models, student=models.teacher.model)

    def work(rank: int) -> None:
        method = build_method(config)
        rows = method._rows
        method._rows = lambda *words: wrote.append(rank) or rows(*words)
        method.prepare(material(config, pair, folder / "work"), pair, folder)

    in_ranks(2, work)
    assert {0, 1} == set(wrote)
    for path in (*alone.glob("*.safetensors"), alone / "cache.json"):
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    "keys",
    [
        {"dtype": "float32"},
        {"dtype": "int8"},
        {"rows": "top_k", "dtype": "bfloat16", "k": 16},
        {"texts": ["answers"], "dtype": "float16"},
    ],
)
def test_a_plan_says_the_size_beforehand(recipe, models, cached, keys):
    overrides = [f"stages.cache.method.{name}={json.dumps(value)}" for name, value in keys.items()]
    plan = load_run([recipe], overrides)
    stage = plan.stages[0]
    size = cache_size(stage, Architectures(plan), plan.output_dir)
    teacher = cached(**keys).teacher
    files = sum(path.stat().st_size for path in teacher.cache.folder.glob("*.safetensors"))
    said = teacher.cache.described
    assert size.bytes_per_row == said["bytes_per_row"] and size.texts == said["texts_total"]
    if "texts" in keys:  # an answer is as long as it will be
        assert size.at_most and size.rows == 8 * 4 >= said["rows_total"] and size.total >= files - 2000
    else:
        headers = 500 * len(list(teacher.cache.folder.glob("*.safetensors")))  # of shards of 8 KiB
        assert size.rows == said["rows_total"] and not size.at_most
        assert files - headers <= size.total <= files and size.total == pytest.approx(files - headers, rel=0.05)


@pytest.mark.parametrize(("rows", "held"), [("hidden", 257 * 48 * 4), ("top_k", 0)])
def test_a_plan_says_that_the_head_alone_is_loaded(recipe, capsys, rows, held):
    words = [str(recipe), f"stages.cache.method.rows={rows}", "--gpu", "cpu"]
    assert main(["plan", *words, "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    learns, writes = stages["student"], stages["cache"]
    assert learns["cached_teacher"] == "stage:cache" and learns["parameters"]["teacher"] == held // 4
    update = learns["memory_bytes"]["update"]["device"]
    assert update.get("teacher weights", 0) == held
    # two micro-batches of an answer of eight tokens wait: hidden states in fp32, or 64 ids with their log-probabilities
    assert update["teacher hidden states"] == 2 * 8 * (48 * 4 if rows == "hidden" else 64 * 12)
    assert "scoring" not in learns["memory_bytes"] and "cached_teacher" not in writes
    assert writes["cache"]["rows"] == 286 and writes["cache"]["bytes"] > 286 * writes["cache"]["bytes_per_row"]
    assert set(writes["memory_bytes"]) == {"scoring"} and writes["parameters"]["teacher"] > 50_000
    assert main(["plan", *words]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    head = ", of them the head alone" if held else ""
    assert f"the teacher is cached in stage:cache: its weights are not loaded{head}" in printed
    assert held or "the head alone" not in printed
    assert "MiB on disk (286 rows of 40 texts," in printed


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_zero_3_learn_from_a_cache(recipe, start, finish):  # noqa: F811
    folder = recipe.parent / "two"
    keys = (
        "engine.type=deepspeed",
        "engine.stage=3",
        "train.gradient_accumulation_steps=1",
        "stages.cache.method.shard_mib=1",
    )
    finish(start(2, *TRAIN, str(recipe), f"output_dir={folder}", *keys))
    one = recipe.parent / "cached"
    if not one.is_dir():
        train(recipe, f"output_dir={one}")
    for ours, theirs in zip(steps_of(folder, "student"), steps_of(one, "student"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_answers_that_the_teacher_wrote_are_learned_from_without_it(recipe, models, cached, tmp_path):
    pair = cached(dtype="float32", texts=["answers"])
    assert pair.teacher.abilities == {"answer", "logprobs", "single"}
    keys = {"name": "seqkd", "kd_ratio": 0.5}
    live = losses(recipe, models, tmp_path / "live", **keys)
    keys["teacher"] = {"type": "cached", "path": str(pair.teacher.cache.folder)}
    ours = losses(recipe, pair, tmp_path / "cached", **keys)
    assert ours["distillation"][0] == pytest.approx(live["distillation"][0].item(), rel=1e-5)
    with pytest.raises(UserError, match="answers.jsonl: its answers have another sampling: .*'temperature': 1.0"):
        losses(recipe, pair, tmp_path, **keys, temperature=0.5)
    config = config_of(recipe, name="seqkd", teacher=keys["teacher"])
    shorter = config.model_copy(update={"data": config.data.model_copy(update={
        "prompts": config.data.prompts.model_copy(update={"prefix": "y"})})})  # fmt: skip
    with pytest.raises(UserError, match="has no answers to 8 of 8 prompts .the first is number 1."):
        build_method(shorter).collect(material(shorter, pair, tmp_path), pair, 0)


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["data.prompts.template=alpaca", "data.prompts.max_prompt_length=200", "student.config.max_position_embeddings=400"],
         'data.prompts.max_prompt_length was 16, and is 200; data.prompts.template was "none", and is "alpaca"'),
        (["data.prompts.max_response_length=5"], "8 of 8 prompts with their references .the first is number 1.: "
         "data.prompts.max_response_length was 8, and is 5"),
        (["data.prompts.prefix=x"], 'data.prompts.prefix was "", and is "x"'),
        (["data.prompts.path=NEW"], "1 of 9 prompts with their references .the first is number 9.: the records have changed"),
        (["method.name=lm", "method.kd_ratio=0.5", "data.corpus.block_size=9"], "28 of 28 blocks of data.corpus .*: data.corpus.block_size was 8, and is 9"),
        (["student.tokenizer=OTHER"], "its tokenizer is another one than the student's"),
    ],
)  # fmt: skip
def test_a_cache_of_other_texts_is_refused_by_what_differs(recipe, written, tmp_path, overrides, says):
    folder = written
    lines = (recipe.parent / "prompts.jsonl").read_text()
    (tmp_path / "new.jsonl").write_text(lines + json.dumps({"prompt": "new?", "completion": "yes"}) + "\n")
    other = byte_tokenizer()
    other.backend_tokenizer.normalizer = Replace("?", "!")  # the same ids, of other texts
    other.save_pretrained(tmp_path / "other")
    words = [
        word.replace("NEW", str(tmp_path / "new.jsonl")).replace("OTHER", str(tmp_path / "other")) for word in overrides
    ]
    document = yaml.safe_load(recipe.read_text())
    document["stages"] = {"student": {**document["stages"]["student"],
                                      "teacher": {"type": "cached", "path": str(folder / "stages" / "cache")}}}  # fmt: skip
    if words[0].startswith("method.name"):
        del document["stages"]["student"]["method"]
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(UserError, match=says):
        train(tmp_path / "alone.yaml", f"output_dir={tmp_path / 'run'}", *words)


def test_what_is_measured_without_a_teacher_is_and_the_rest_is_named(recipe, written, tmp_path):
    folder = written
    prompts = yaml.safe_load(recipe.read_text())["data"]["prompts"]
    overrides = [
        f"stages.student.eval.sets={json.dumps({'held_out': {**prompts, 'limit': 2}})}",
        "stages.student.eval.max_new_tokens=4",
        "train.max_steps=1",
    ]
    run = tmp_path / "run"
    run.mkdir()
    for name in ("stages", "written"):
        (run / name).symlink_to(folder / name)
    _, console = train(recipe, f"output_dir={run}", *overrides, resume=True)
    (note,) = [note for note in console.notes if "reads no answers of the student" in note]
    assert "leave out reverse_kl_nats, sequence_reverse_kl_nats and forward_kl_nats" in note
    mean = [one["mean"] for one in every_record(run) if one["kind"] == "eval"][-1]
    assert {"rouge_l", "loss_nats", "entropy_nats"} <= mean.keys() and not any("_kl_" in name for name in mean)


def test_the_verb_writes_a_cache_of_any_configuration_and_adds_to_it(recipe, tmp_path, capsys):
    document = yaml.safe_load(recipe.read_text())
    del document["stages"]
    document |= {"teacher": {"path": str(recipe.parent / "teacher")}, "method": {"name": "kd", "ce_ratio": 0.1}}
    lines = (recipe.parent / "prompts.jsonl").read_text()
    document["data"] = {"prompts": {**document["data"]["prompts"], "path": str(tmp_path / "prompts.jsonl")}}
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump(document))
    out = tmp_path / "out"
    for count in (3, 8):
        (tmp_path / "prompts.jsonl").write_text("\n".join(lines.splitlines()[:count]) + "\n")
        assert main(["cache", str(tmp_path / "kd.yaml"), "method.dtype=int8", f"output_dir={out}"]) == 0
        said = json.loads((out / "stages" / "main" / "cache.json").read_text())
        assert said["texts_total"] == count and said["storage"]["dtype"] == "int8"
        printed = capsys.readouterr()
        assert "teacher: {type: cached, path:" in printed.out + printed.err
    assert len(said["shards"]) == 2
    assert main(["cache", str(recipe), "method.name=kd", f"output_dir={tmp_path / 'none'}"]) == 2

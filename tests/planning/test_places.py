"""The plan of a teacher on another device than the student: each device is counted, and held against its memory, by itself."""

import json

import pytest
import torch

from minillm import UserError
from minillm.cli.main import main
from minillm.config.loader.run_plan import load_run
from minillm.config.models import ServedTeacherConfig, TeacherConfig
from minillm.config.training import DeepSpeedEngine, TorchEngine
from minillm.planning.ledger import PARTS, Ledger
from minillm.planning.places import HOME, HOST, kind_of, place_of
from minillm.planning.planner import planned_peak_gib
from tests.planning.small import LAYER, PARAMETERS, planned

TEACHER = (PARAMETERS + 2 * LAYER + 2 * 128 * 64) * 2  # two layers and 128 ids more, in bfloat16
HEAD = 640 * 64 * 2
H100 = {"gpu": "H100-80GB"}
KD = {"name": "kd"}


@pytest.mark.parametrize(
    "teacher, engine, kind, place",
    [
        (None, "auto", "cuda", HOME),
        ("cuda", "auto", "cuda", HOME),
        ("cuda:0", "cuda", "cuda", HOME),
        ("cuda:1", "auto", "cuda", "cuda:1"),
        ("cuda:1", "cuda:1", "cuda", HOME),
        ("cuda", "cuda:1", "cuda", "cuda:0"),
        ("cpu", "auto", "cuda", HOST),
        ("cpu", "auto", "cpu", HOME),
        ("cuda", "cpu", "cpu", "cuda:0"),
    ],
)
def test_a_place_is_a_device_that_is_not_the_students(teacher, engine, kind, place):
    assert place_of(TeacherConfig(path="unused", device=teacher), TorchEngine(device=engine), kind) == place


def test_others_have_none():
    assert place_of(None, TorchEngine(), "cuda") == HOME
    assert place_of(ServedTeacherConfig(type="served", url="http://host"), TorchEngine(), "cuda") == HOME
    assert place_of(TeacherConfig(path="unused"), DeepSpeedEngine(type="deepspeed"), "cuda") == HOME
    assert kind_of("cuda:1", torch.device("cpu")) == torch.device("cuda")
    assert kind_of(HOME, torch.device("cpu")) == torch.device("cpu")


def test_a_ledger_counts_every_device_by_itself():
    with Ledger() as ledger:
        here = torch.empty(10)
        with ledger.at("cuda:1"), ledger.part("teacher weights"):
            there = torch.empty(100)
            assert ledger.total == 400
            with ledger.at(HOME):
                copy = torch.empty(7)
        assert ledger.total == 68
        ledger.relabel([there], "activations")
        del there
        timeline = ledger.take()
    assert sum(timeline.peak({}, {}).values()) == 68 and timeline.peak({}, {})["teacher weights"] == copy.nbytes
    assert sum(timeline.peak_beside("cuda:1").values()) == 400
    assert sum(timeline.peak_beside("cuda:2").values()) == 0 and here.nbytes == 40


@pytest.mark.parametrize("method", [{"name": "minillm", "lm_coef": 0.0}, KD], ids=["minillm", "kd"])
def test_two_gpus_hold_what_one_does_and_a_copy_of_the_head(method, recipe):
    path = recipe(method=method)
    one, two = (planned(path, *keys, **H100) for keys in ((), ("teacher.device=cuda:1",)))
    assert one.simulation.places == () and two.simulation.places == ("cuda:1",)
    for before, after in zip(one.memory, two.memory, strict=True):
        there = after.beside["cuda:1"]
        assert before.device["teacher weights"] == pytest.approx(TEACHER, abs=512)
        assert there["teacher weights"] == before.device["teacher weights"]
        assert after.device["teacher weights"] == HEAD
        for part in ("student weights", "optimizer states", "loss buffers"):
            assert after.device[part] == before.device[part] and not there[part]
        assert after.device["teacher KV cache"] == 0 == there["student KV cache"]
        assert after.host == before.host and after.most_bytes == max(after.device_bytes, sum(there.values()))
    if method != KD:  # it samples from the mixture
        whole, parts = (stage.simulation.phases["rollout"] for stage in (one, two))
        caches = parts.beside["cuda:1"][:, PARTS.index("teacher KV cache")]
        assert caches.max() == whole.most("teacher KV cache") > 0


def test_a_teacher_on_the_host_is_in_its_memory(recipe):
    one, two = (planned(recipe(), *keys, **H100) for keys in ((), ("teacher.device=cpu",)))
    before, after = (next(one for one in stage.memory if one.phase == "scoring") for stage in (one, two))
    assert after.beside == {} and after.device["teacher weights"] == HEAD
    assert after.host["teacher weights"] == before.device["teacher weights"] and before.host["teacher weights"] == 0
    assert one.speed.seconds is not None and two.speed.seconds is None


def test_a_teacher_that_is_alone_is_counted_where_it_is(recipe, capsys):
    prompts = {"type": "pydoc", "max_prompt_length": 200, "limit": 4}
    path = recipe(method={"name": "cache", "texts": ["references", "answers"]}, data={"prompts": prompts})
    here, there, on_cpu, host = (
        planned(path, *keys, gpu=gpu)
        for keys, gpu in (
            ((), "H100-80GB"),
            (["teacher.device=cuda:1"], "H100-80GB"),
            ((), "cpu"),
            (["teacher.device=cpu"], "H100-80GB"),
        )
    )
    assert here.simulation.places == on_cpu.simulation.places == ()
    for one, other in ((here, there), (on_cpu, host)):
        for before, after in zip(one.memory, other.memory, strict=True):
            assert before.device["student weights"] == pytest.approx(TEACHER, abs=512) and before.beside == {}
            assert after.device_bytes == 0 and after.most_bytes == (before.most_bytes if other is there else 0)
            assert (after.beside["cuda:1"] if other is there else after.host) == before.device
    for device, words in (("cuda:1", ["student weights on cuda:1"]), ("cpu", ["memory is the host's", "host memory"])):
        # nothing of it is on the device that would be the student's
        assert main(["plan", str(path), f"teacher.device={device}"]) == 0
        shown = capsys.readouterr().out
        assert all(text in shown for text in words) and "│ the student's device" not in shown


def test_adapters_in_a_teacher_are_trained_where_it_is(recipe):
    okd = {"name": "okd", "lora": {"r": 2, "alpha": 4}}
    one, two = (planned(recipe(method=okd), *keys, **H100).memory[-1] for keys in ((), ("teacher.device=cuda:1",)))
    there = two.beside["cuda:1"]
    assert there["optimizer states"] > 0 and there["gradients"] > 0
    for part in ("optimizer states", "gradients"):
        assert two.device[part] <= one.device[part] - there[part] + 512
    assert there["student weights"] == 512 * 64 * 4, (
        "a copy of the student's head, which is trained, for the adapters' loss"
    )


def test_several_teachers_are_each_where_they_say(recipe, tmp_path):
    teacher = {"path": str(tmp_path / "teacher"), "dtype": "bfloat16"}
    groups = {"teacher": None, "teachers_by": {"weights": {"a": 1, "b": 1, "c": 1}}, "method": KD}
    named = {"a": teacher, "b": {**teacher, "device": "cuda:1"}, "c": {**teacher, "device": "cuda:2"}}
    update = planned(recipe(**groups, teachers=named), **H100).memory[-1]
    assert update.device["teacher weights"] == pytest.approx(TEACHER + 2 * HEAD, abs=512)
    assert update.peaks.keys() == {HOME, "cuda:1", "cuda:2"}
    turns = {**groups, "teachers_by": {**groups["teachers_by"], "in_memory": "one"}}
    update = planned(recipe(**turns, teachers=named), **H100).memory[-1]
    for place in ("cuda:1", "cuda:2"):
        assert sum(update.beside[place].values()) == pytest.approx(TEACHER, rel=0.5)


def test_the_command_says_what_is_where_and_what_does_not_fit(recipe, capsys, monkeypatch):
    path = str(recipe(teacher={"path": str(recipe().parent / "teacher"), "device": "cuda:1"}))
    assert main(["plan", path, "--gpu", "4090"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "teacher weights on cuda:1",
        "the student's device",
        "GiB on the student's device, 0.00 GiB of 24 GiB on",
    ):
        assert text in shown, text
    assert main(["plan", path, "--gpu", "4090", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    (phases,) = (stage["memory_bytes"] for stage in data["stages"].values())
    assert data["peak_bytes_beside"]["cuda:1"] == max(sum(one["cuda:1"].values()) for one in phases.values())
    assert data["peak_bytes"] >= max(sum(one["device"].values()) for one in phases.values())


def test_a_gpu_of_no_known_kind_is_asked_for(recipe):
    with pytest.raises(UserError, match="--gpu cpu: teacher.device is cuda:1; name its kind with --gpu"):
        planned(recipe(), "teacher.device=cuda:1")
    plan = load_run([recipe()], ["teacher.device=cuda:1"])
    assert planned_peak_gib(plan, plan.stages[0], torch.device("cpu"), world_size=1) > 0

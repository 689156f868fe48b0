"""Where an engine's models go, and which backends its device can run."""

import pytest
import torch

from minillm import UserError
from minillm.config.root import StageConfig
from minillm.config.training import DeepSpeedEngine, TorchEngine
from minillm.engine import placement
from minillm.engine.placement import check_backend, check_devices, engine_device, loading_device

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def test_one_process_goes_where_the_configuration_says():
    assert engine_device(TorchEngine(device="cpu")) == CPU


def test_a_rank_has_the_gpu_of_its_number_on_its_host(monkeypatch):
    monkeypatch.setattr(placement, "launched_local_rank", lambda: 3)
    monkeypatch.setattr(placement, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engine_device(DeepSpeedEngine(type="deepspeed")) == torch.device("cuda:3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engine_device(DeepSpeedEngine(type="deepspeed")) == CPU


@pytest.mark.parametrize(
    "backend, device, interpreted, fits",
    [
        ("triton", CPU, False, False),
        ("triton", CPU, True, True),
        ("triton", GPU, False, True),
        ("torch", CPU, False, True),
        ("auto", CPU, False, True),
    ],
)
def test_triton_needs_a_gpu_or_its_interpreter(backend, device, interpreted, fits, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    engine = TorchEngine(device="cpu", backend=backend)
    if fits:
        check_backend(engine, device)
    else:
        with pytest.raises(
            UserError, match="engine.backend is triton, which needs a GPU, and the models are on the cpu"
        ):
            check_backend(engine, device)


def test_what_will_be_sharded_is_read_to_the_host(monkeypatch):
    monkeypatch.setattr(placement, "engine_device", lambda engine: GPU)
    assert loading_device(TorchEngine(), sharded=True) == CPU
    assert loading_device(TorchEngine(), sharded=False) == GPU


@pytest.mark.parametrize(
    "groups, key",
    [
        ({"teacher": {"path": "unused", "device": "cuda:1"}}, "teacher.device"),
        (
            {
                "teachers": {"a": {"path": "unused"}, "b": {"path": "unused", "device": "cuda:1"}},
                "teachers_by": {"weights": {"a": 1, "b": 1}},
            },
            "teachers.b.device",
        ),
        ({"teacher": {"path": "unused"}, "engine": {"device": "cuda:1"}}, "engine.device"),
    ],
)
def test_a_device_that_is_not_there_is_said_of_its_key(groups, key, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = StageConfig(output_dir="unused", student={"path": "unused"}, train={"max_steps": 1},
                         method={"name": "kd"}, **groups)  # fmt: skip
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=f"{key} is 'cuda:1', but torch sees 1 GPUs here"):
        check_devices(config)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices(config)

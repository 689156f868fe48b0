"""Numbers read back from the folders of an experiment."""

import pytest

from minillm import UserError
from minillm.experiment.jobs import folder_of
from minillm.experiment.measuring import EVALUATION
from minillm.experiment.results import FAILURE, read_results


def read(folders, seeds=(1, 2)):
    return read_results(folders.experiment, folders.output, list(seeds))


def test_evaluations_of_arms_stand_with_the_costs_of_their_training(folders):
    folders.measured("sft", 1, loss_nats=2.0, rouge_l=10.0)
    folders.trained("sft", 1, seconds=30.0, evaluations={0: 3.0, 200: 2.5})
    folders.trained("warmup", 1, seconds=9.0)
    found = read(folders)
    result = found.arms["sft"][1]
    assert result.value("loss_nats") == result.value("loss_nats@held_out") == 2.0
    assert (result.value("train_seconds"), result.value("student_tokens"), result.value("steps")) == (30.0, 200, 2)
    assert result.value("tokens_per_second") == pytest.approx(200 / 30)
    assert result.value("rouge_l@elsewhere") is None and result.value("reverse_kl_nats") is None
    assert [record["mean"]["loss_nats"] for record in result.evaluations] == [3.0, 2.5]
    assert list(found.arms) == ["sft"] and found.shared["warmup"][1].value("train_seconds") == 9.0


def test_a_run_that_is_not_finished_has_no_costs(folders):
    folders.measured("sft", 1, loss_nats=2.0)
    folders.trained("sft", 1, seconds=30.0)
    (folder_of(folders.output, 1, "sft") / "final").rmdir()
    assert read(folders).arms["sft"][1].value("train_seconds") is None


def test_arms_and_their_teachers_are_paired_by_seed(folders):
    for seed, (student, teacher) in {1: (2.0, 1.0), 2: (3.0, 1.5)}.items():
        folders.measured("kd", seed, teacher=f"t{seed}", loss_nats=student)
        folders.teacher(f"t{seed}", loss_nats=teacher)
    folders.measured("sft", 2, loss_nats=2.5)
    found = read(folders)
    assert found.pairs("kd", "teacher", "loss_nats") == {1: (2.0, 1.0), 2: (3.0, 1.5)}
    assert found.pairs("kd", "sft", "loss_nats") == {2: (3.0, 2.5)}
    assert found.pairs("sft", "teacher", "loss_nats") == {}  # it has none


def test_failures_are_read_and_seeds_that_were_not_asked_for_are_not(folders):
    folders.measured("sft", 2, loss_nats=2.0)
    folder = folder_of(folders.output, 1, "kd")
    folder.mkdir(parents=True)
    (folder / FAILURE).write_text("the loss is nan\n")
    found = read(folders, seeds=[1])
    assert found.failures == {("kd", 1): "the loss is nan"} and found.arms == {}


def test_a_damaged_evaluation_is_named(folders):
    folders.measured("sft", 1, loss_nats=2.0)
    path = folder_of(folders.output, 1, "sft") / EVALUATION
    path.write_text(path.read_text()[:-5])
    with pytest.raises(UserError, match=f"{path} cannot be read.*delete it to have the arm measured again"):
        read(folders)

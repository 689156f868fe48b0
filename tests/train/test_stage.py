"""What a stage reads and opens, before and beside the training itself."""

from types import SimpleNamespace

import pytest

from minillm import UserError
from minillm.config.loader.run_plan import Stage
from minillm.config.models import StudentConfig, TeacherConfig
from minillm.config.root import StageConfig
from minillm.data.instructions import Example, PromptSet
from minillm.data.stream import RankSlice
from minillm.rollout.rollouts import Rollouts
from minillm.train.stage import (
    StageBuilder,
    _asked,
    _same_weights,
)
from minillm.train.stage_data import StageData

PICTURE = {"pixel_values": None}
EXAMPLES = [Example(4, [1], [2], "", ()), Example(6, [1], [], "", (), PICTURE), Example(9, [1], [], "", ())]


class Sampler(Rollouts):
    mixtures = True

    def __init__(self):
        pass


def stage(name: str = "distil", method: str = "sft", **groups) -> Stage:
    config = StageConfig(
        output_dir="unused", seed=3, student={"path": "unused"}, teacher={"path": "unused"}, method={"name": method},
        train={"max_steps": 1}, **groups,
    )  # fmt: skip
    return Stage(name, config)


def read() -> StageData:
    examples = [Example(index, [index], [1], "", ()) for index in range(30)]
    corpus = SimpleNamespace(blocks=[[index] for index in range(30)], documents=1)
    return StageData(None, None, PromptSet(examples, 0, "here"), corpus, [])


def order(tmp_path, one: Stage) -> tuple[list[int], list[int]]:
    builder = StageBuilder(SimpleNamespace(working=print), tmp_path, None)
    data = builder.training_data(one, read(), Sampler())
    return [example.index for example in data.prompts.take(30)], [block[0] for block in data.corpus.take(30)]


def test_each_stage_goes_through_its_data_in_an_order_of_its_own(tmp_path):
    one, again, other = order(tmp_path, stage()), order(tmp_path, stage()), order(tmp_path, stage("warmup"))
    assert one == again and sorted(one[0]) == sorted(one[1]) == list(range(30))
    assert one[0] != other[0] and one[1] != other[1]
    seeded = Stage("distil", stage().config.model_copy(update={"seed": 4}))
    assert order(tmp_path, seeded) != one


def test_the_material_lies_in_the_folder_of_the_stage(tmp_path):
    told = []
    console = SimpleNamespace(working=lambda *news: told.append(news))
    rollouts = Sampler()
    data = StageBuilder(console, tmp_path, None).training_data(stage(), read(), rollouts)
    assert data.folder == tmp_path / "written" / "distil" and data.rollouts is rollouts
    data.report_progress("writing", 1, 2)
    assert told == [("writing", 1, 2)]


def test_rollouts_without_mixtures_are_refused_to_a_method_that_mixes(tmp_path):
    rollouts = Sampler()
    rollouts.mixtures = False
    with pytest.raises(UserError, match="stage 'distil' samples from a mixture"):
        StageBuilder(SimpleNamespace(working=print), tmp_path, None).training_data(
            stage(method="minillm"), read(), rollouts
        )


def test_each_rank_takes_its_own_part_of_the_corpus_and_all_the_same_prompts(tmp_path, in_ranks):
    def taken(rank: int):
        builder = StageBuilder(SimpleNamespace(working=print), tmp_path, None)
        data = builder.training_data(stage(), read(), Sampler())
        assert isinstance(data.corpus, RankSlice)
        return [one.index for one in data.prompts.take(30)], [block[0] for block in data.corpus.take(15)]

    (first, one), (second, other) = in_ranks(2, taken)
    assert first == second and sorted([*one, *other]) == list(range(30))


@pytest.mark.parametrize(
    "student, teacher, same",
    [
        ({}, {}, True),
        ({"path": "org/other"}, {}, False),
        ({"revision": "v1"}, {}, False),
        ({"revision": "v1"}, {"revision": "v1"}, True),
        ({}, {"dtype": "bfloat16"}, False),
        ({}, {"quantization": "int8"}, False),  # its weights are rounded
    ],
)
def test_a_student_is_copied_from_a_teacher_of_the_same_weights_alone(student, teacher, same):
    student = StudentConfig(**{"path": "org/one", "dtype": "float32", **student})
    teacher = TeacherConfig(**{"path": "org/one", "dtype": "float32", **teacher})
    assert _same_weights(student, teacher) is same


@pytest.mark.parametrize(
    "samples, asked",
    [((), set()), (("student",), {"student"}), (("teacher",), {"teacher"}), (("mixture",), {"student", "teacher"})],
)
def test_the_models_that_answer_are_looked_at_before_the_first_step(samples, asked):
    assert _asked(samples) == asked

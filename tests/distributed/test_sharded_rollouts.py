"""Sampling and scoring with sharded models on two ranks: the answers of one process, and no rank waits forever.

Run as a program it is one of the ranks: HOW FOLDER.
"""

import importlib.util
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.distributed import collectives, group
from minillm.distributed.launcher import end
from minillm.rollout.buffer import RolloutBuffer
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Sampling
from minillm.rollout.scoring import score
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models

PROMPTS = [[3 + place % 7] * (1 + place % 5) for place in range(13)]  # not a multiple of ranks times a batch
MANY = [[3 + place % 7] * (1 + place % 3) for place in range(100)]
SAMPLING = Sampling(max_new_tokens=10, alpha=0.4)


def collect(
    models: Models, prompts: list[list[int]], sampling: Sampling, size: int = 4, *, coins: bool = False
) -> dict[str, torch.Tensor]:
    """Samples and their scores, made in batches of `size`, as flat tensors."""
    keys, rollouts = list(range(len(prompts))), LocalRollouts(models, shared_coins=coins)
    answers = rollouts.sample(prompts, sampling, keys=keys, seed=3, who="mixture", batch_size=size)
    return score(models, answers, keys=keys, batch_size=size).state()


def tiny_models(tie: bool) -> Models:
    """A student and a teacher of different widths, made alike in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = []
    for seed, width in enumerate((32, 48)):
        torch.manual_seed(seed)
        shape = {"vocab_size": 64, "hidden_size": width, "intermediate_size": 40, "num_hidden_layers": 3,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}  # fmt: skip
        made.append(LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=tie and width == 32)).eval())
    return Models(
        made[0], LocalTeacher(made[1].requires_grad_(False)), None, 64, tuple(range(1, 9)), 0, torch.device("cpu")
    )


def file_name(how: str, tie: bool, coins: bool, rank: int) -> str:
    return f"{how}-tied-{tie}-coins-{coins}-{rank}.safetensors"


def rank(how: str, folder: Path) -> None:
    from minillm.config.training import DeepSpeedEngine as DeepSpeedConfig
    from minillm.config.training import TrainConfig
    from minillm.engine.deepspeed import DeepSpeedEngine

    torch.set_num_threads(1)
    group.join(folder)
    for tie in (False, True):
        models = replace(tiny_models(tie), by_layers=how == "layers")
        DeepSpeedEngine(models, TrainConfig(max_steps=1), DeepSpeedConfig(type="deepspeed", gather=how), total_steps=1)
        for coins in (False, True):
            found = collect(models, PROMPTS, SAMPLING, coins=coins)
            save_file(found, folder / file_name(how, tie, coins, collectives.rank()))
    # one rank's answers end at once, the other's never
    models = replace(models, eos_ids=tuple(range(64)) if collectives.rank() == 0 else ())
    for coins in (False, True):
        found = collect(models, MANY, Sampling(max_new_tokens=8, alpha=0.4), 25, coins=coins)
        assert found["response_lengths"].tolist() == [1, 8] * 50
    group.leave()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("how", ["whole", "layers"])
def test_two_ranks_sample_and_score_as_one_process(how, tmp_path, start, finish):
    finish(start(2, __file__, how, str(tmp_path)), timeout=300)
    for tie, coins in itertools.product((False, True), repeat=2):
        theirs = collect(tiny_models(tie), PROMPTS, SAMPLING, coins=coins)
        assert len(set(theirs["response_lengths"].tolist())) > 3  # they do end at different moments
        expected = RolloutBuffer.from_state(theirs)
        for rank in range(2):
            ours = load_file(tmp_path / file_name(how, tie, coins, rank))
            assert ours.keys() == theirs.keys()
            for name in ours.keys() - {"teacher_hidden", "scored"}:
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)
            for index, (mine, whole) in enumerate(zip(RolloutBuffer.from_state(ours), expected, strict=True)):
                assert bool(mine.teacher) == (index % 2 == rank)  # of what this rank scored
                if index % 2 == rank:
                    torch.testing.assert_close(mine.teacher, whole.teacher, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    rank(sys.argv[1], Path(sys.argv[2]))
    end(0)

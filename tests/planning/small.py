"""A configuration small enough for its plan to be computed by hand."""

import json
from pathlib import Path

from minillm.config.loader.run_plan import load_run
from minillm.planning.planner import StagePlan, plan_run

SHAPE = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": False}  # fmt: skip
MATRICES = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128  # of a layer
LAYER = MATRICES + 2 * 64
PARAMETERS = 2 * LAYER + 2 * 512 * 64 + 64
PROMPT, ANSWER = 10, 6
BOTH = "rollout.shared_coins=false"  # both models sample and score
SHARDED = ("engine.type=deepspeed", "train.bf16=true")
EVALUATION = {"sets": {"a": {"type": "pydoc", "max_prompt_length": 30, "max_response_length": 9}},
              "batch_size": 6, "max_new_tokens": 50}  # fmt: skip


def document(folder: Path, **groups) -> dict:
    """MiniLLM from a teacher of four layers in bfloat16, with some groups replaced."""
    teacher = folder / "teacher"
    teacher.mkdir(exist_ok=True)
    (teacher / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": 4, "vocab_size": 640}))
    return {
        "output_dir": str(folder / "run"),
        "student": {"init": "random", "tokenizer": "byte", "config": SHAPE},
        "teacher": {"path": str(teacher), "dtype": "bfloat16"},
        "data": {"prompts": {"type": "pydoc", "max_prompt_length": PROMPT, "max_response_length": ANSWER}},
        "rollout": {"buffer_size": 8, "batch_size": 4, "max_new_tokens": ANSWER},
        "method": {"name": "minillm", "lm_coef": 0.0},
        "train": {"max_steps": 2, "per_device_train_batch_size": 4},
        **groups,
    }


def planned(path: Path, *overrides: str, **options) -> StagePlan:
    return plan_run(load_run([path], overrides), **{"gpu": "cpu", **options}).stages[0]

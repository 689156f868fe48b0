"""One trainer in a process of its own: seconds of each MiniLLM update, and peak memory over what was imported.

Run as `python -m minillm.benchmarks.step_providers JOB.json`; prints one JSON line.
"""

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minillm.benchmarks.measure import ResidentPeak, release

LEARNING_RATE = 1e-5


class Unavailable(Exception):
    """The reason for which a provider cannot run here."""


class Silent:
    """A console that says nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **keywords: None


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    prepare = PROVIDERS[job["provider"]]
    try:
        train = prepare(job)
    except Unavailable as reason:
        print(json.dumps({"skipped": str(reason)}), flush=True)
        return
    release(torch.device("cpu"))
    with ResidentPeak() as peak:
        seconds = train()
    print(json.dumps({"seconds": seconds, "peak_bytes": peak.bytes}), flush=True)


def minillm(job: dict) -> Callable[[], list[float]]:
    """The whole run of `minillm train`, without evaluation and saving in between."""
    from minillm.config.loader.run_plan import load_run
    from minillm.train.run import run

    folder = Path(job["folder"])
    output = folder / f"run-{time.time_ns()}"
    prompts = {"type": "jsonl", "path": str(folder / "prompts.jsonl"), "template": "none"}
    recipe = {
        "output_dir": str(output),
        "student": {"path": str(folder / "student")},
        "teacher": {"path": str(folder / "teacher")},
        "data": {"prompts": {**prompts, "max_prompt_length": job["prompt_tokens"]}},
        "rollout": {
            "buffer_size": job["answers"],
            "batch_size": job["answers"],
            "max_new_tokens": job["tokens"],
            "shared_coins": job["shared_coins"],
        },
        "method": {
            "name": "minillm",
            "alpha": job["alpha"],
            "ppo_epochs": job["inner_epochs"],
            "lm_coef": 0.0,
        },
        "train": {
            "max_steps": job["updates"] * job["inner_epochs"],
            "per_device_train_batch_size": job["answers"],
            "learning_rate": LEARNING_RATE,
        },
        "log": {"report_to": []},
    }
    path = folder / f"{output.name}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    plan = load_run([path], [])

    def train() -> list[float]:
        run(plan, resume=False, console=Silent())
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        clock = [record["seconds"] for record in map(json.loads, lines) if record["kind"] == "train"]
        ends = clock[job["inner_epochs"] - 1 :: job["inner_epochs"]]
        return [end - start for start, end in zip([0.0, *ends], ends, strict=False)]

    return train


def trl(job: dict) -> Callable[[], list[float]]:
    """MiniLLMTrainer of TRL 1.14, the last release that had it: one generation an update, no reward but the teacher's."""
    try:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
        from trl.experimental.minillm import MiniLLMConfig, MiniLLMTrainer
    except ImportError as error:
        raise Unavailable(f"no trl with experimental.minillm (1.14.2 has it): {error}") from None

    folder = Path(job["folder"])
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments, **keywords):
            if not ends:
                ends.append(time.perf_counter())

        def on_step_end(self, *arguments, **keywords):
            ends.append(time.perf_counter())

    def train() -> list[float]:
        lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        settings = MiniLLMConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=job["answers"],
            num_generations=1,
            num_iterations=job["inner_epochs"],
            max_completion_length=job["tokens"],
            max_steps=job["updates"] * job["inner_epochs"],
            learning_rate=LEARNING_RATE,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            gamma=1.0,
            rkl_advantage=True,
            single_step_decomposition=True,
            length_normalization=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            shuffle_dataset=False,
            dataloader_pin_memory=False,
        )
        trainer = MiniLLMTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32),
            teacher_model=AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32),
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": json.loads(line)["prompt"]} for line in lines]),
            processing_class=AutoTokenizer.from_pretrained(folder / "student", padding_side="left"),
            callbacks=[Clock()],
        )
        trainer.train()
        kept = ends[:: job["inner_epochs"]]
        return [end - start for start, end in zip(kept, kept[1:], strict=False)]

    return train


def versions() -> dict[str, str]:
    """Of the packages that the two trainers share or are."""
    found = {}
    for name in ("transformers", "trl", "accelerate"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


PROVIDERS = {"minillm": minillm, "trl": trl}

if __name__ == "__main__":
    main(sys.argv[1])

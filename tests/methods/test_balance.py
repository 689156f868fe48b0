"""Mixtures of experts as students and teachers of every method, whose balance loss each of them adds once."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minillm.config.root import StageConfig, method_classes
from minillm.config.training import TorchEngine as TorchEngineConfig
from minillm.data.instructions import Example
from minillm.data.other_reading import OtherReading
from minillm.data.stream import Stream
from minillm.engine.torch import TorchEngine
from minillm.methods import build_method
from minillm.methods.balance import add_balance
from minillm.methods.protocol import TrainingData
from minillm.models.batch import TokenSequence
from minillm.models.routers import load_metrics, routers_of
from minillm.models.tokenizer_pair import TokenizerPair
from minillm.models.tokenizers import byte_tokenizer
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rank_items import rank_items
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models

COEFFICIENT, SIZE, LAYERS, EXPERTS = 0.3, 4, 2, 4
KINDS = ("mixtral", "qwen3_moe", "olmoe")
OF_METHODS = {"taid": {"steps": 4}, "distillm": {"steps": 4}, "okd": {"lora": {"r": 2, "alpha": 4}},
              "miniplm": {"reference": "x"}}  # fmt: skip
METHODS = sorted(
    name
    for name, keys in method_classes().items()
    if keys.__module__.startswith("minillm.")
    and keys.model_validate({"name": name, **OF_METHODS.get(name, {})}).needs().takes_steps
)


def build(kind: str, *, width: int, seed: int):
    shape = {"hidden_size": width, "intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": LAYERS,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3,
             "vocab_size": 257, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256, "num_experts_per_tok": 2,
             "num_local_experts" if kind == "mixtral" else "num_experts": EXPERTS}  # fmt: skip
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).eval()


@pytest.mark.parametrize(("place", "name"), enumerate(METHODS))
def test_every_method_trains_a_mixture_and_balances_it_once(place, name, tmp_path):
    if name == "okd":
        pytest.importorskip("peft")
    student = build(KINDS[place % 3], width=16, seed=0)
    teacher = build(KINDS[(place + 1) % 3], width=24, seed=1).requires_grad_(False)
    tokenizer = byte_tokenizer()
    pair = TokenizerPair(tokenizer, tokenizer)
    models = Models(
        student, LocalTeacher(teacher), tokenizer, 257, (256,), 256, torch.device("cpu"), tokenizers=pair
    )  # fmt: skip
    config = StageConfig(
        output_dir="unused", seed=3, student={"path": "unused"}, teacher={"path": "unused"},
        method={"name": name, **OF_METHODS.get(name, {})},
        rollout={"buffer_size": SIZE, "batch_size": SIZE, "max_new_tokens": 5},
        train={"max_steps": 1, "per_device_train_batch_size": SIZE, "learning_rate": 1e-2},
    )  # fmt: skip
    tasks = {task: TokenSequence([70, 71], [80, 256], 0) for task in ("label", "rationale")}
    others = [OtherReading([60 + i, 70], [90 + i, 91, 256], "", True, 256) for i in range(SIZE)]
    examples = [
        Example(i, other.ids, other.answer_ids, "", (), tasks=tasks, other=other) for i, other in enumerate(others)
    ]
    corpus = Stream([[100 + i, *range(100, 108)] for i in range(SIZE)], seed=1)
    data = TrainingData(Stream(examples, seed=1), corpus, LocalRollouts(models), tmp_path)
    method = build_method(config)
    engine = TorchEngine(
        models, config.train, TorchEngineConfig(), total_steps=1, modules=method.modules(models),
        learning_rates=method.learning_rates(),
    )  # fmt: skip
    items = rank_items(method.collect(data, models, draw=0), range(SIZE))
    plain = method.terms(items, data, models)
    assert add_balance(plain, 0.0, method.needs) == plain
    terms = add_balance(plain, COEFFICIENT, method.needs)
    weights = {term.name: term.auxiliary * term.weight for term in terms if term.trains == "student"}
    assert sum(weights.values()) == pytest.approx(COEFFICIENT), "of every step, however many terms it has"
    assert not any(term.auxiliary for term in terms if term.trains != "student")
    before = [router.weight.detach().clone() for router, _ in routers_of(student)]
    found = engine.step([terms])
    without = found.metrics["loss"] - COEFFICIENT * found.metrics["auxiliary_loss"]
    assert 1.5 < found.metrics["auxiliary_loss"] < 4 and without == without
    assert all(
        not torch.equal(one, router.weight) for one, (router, _) in zip(before, routers_of(student), strict=True)
    )
    tokens = torch.tensor(found.expert_tokens)
    read = sum(int(term.batch.attention_mask.sum()) for term in terms if term.trains == "student")
    assert tokens.shape == (LAYERS, EXPERTS) and tokens.sum(1).tolist() == [2 * read] * LAYERS
    assert engine.module.take_expert_tokens().sum() == 0, "every step is counted by itself"


def test_load_is_shares_and_their_entropy():
    found = load_metrics([[30, 10, 0, 0], [10, 10, 10, 10]])
    assert found["expert_load"] == [[0.75, 0.25, 0.0, 0.0], [0.25] * 4]
    assert found["expert_load_entropy_nats"] == pytest.approx((0.5623351446 + 1.3862943611) / 2)
    assert (found["expert_load_least"], found["expert_load_most"]) == (0.0, 0.75)

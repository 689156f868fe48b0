"""distillation_loss beside full logits in float64: heads of several architectures, packed rows, and what is refused."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.integrations import distillation_loss, next_token_labels
from tests.conftest import tiny_llama
from tests.integrations.conftest import reverse_kl

VOCAB = 300
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
    "tie_word_embeddings": True,
}  # fmt: skip


def model(kind: str, **changed):
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SHAPE | changed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def batch(length: int = 9, rows: int = 3) -> dict[str, torch.Tensor]:
    """Rows of unequal prompts, whose labels are -100, and padding at the end of the last one."""
    ids = torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[-1, -3:] = 0
    for row in range(rows):
        labels[row, : 1 + 2 * row] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


def eager(student, teacher, inputs, value=reverse_kl):
    """The mean of value over counted tokens, on full logits."""
    given = {name: one for name, one in inputs.items() if name != "labels"}
    log_q = student(**given).logits[:, :-1].log_softmax(-1)
    log_p = teacher(**given).logits[:, :-1].log_softmax(-1).detach()
    labels = inputs["labels"][:, 1:]
    kept = labels != -100
    return value(log_q[kept], log_p[kept], labels[kept]).mean()


def require_equal(student, teacher, inputs, **options):
    """Loss and gradients by name are those of float64 copies."""
    exact_student, exact_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    loss = distillation_loss(student, teacher, inputs, **options)
    expected = eager(exact_student, exact_teacher, inputs)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    trained = 0
    for (name, mine), exact in zip(student.named_parameters(), exact_student.parameters(), strict=True):
        if exact.grad is not None:
            error = torch.linalg.vector_norm(mine.grad.double() - exact.grad) / torch.linalg.vector_norm(exact.grad)
            assert error < 2e-5, (name, error)
            trained += 1
        assert (mine.grad is None) == (exact.grad is None), name
    assert trained


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}),  # a softcap that bends these logits
        ("granite", {"logits_scaling": 4.0}),  # a divisor
        ("cohere", {"logit_scale": 0.3, "tie_word_embeddings": False}),  # a scale, and a head of its own
        ("phi", {}),  # a bias
    ],
)
def test_it_is_the_loss_of_full_logits_whatever_an_architecture_does_to_them(kind, changed):
    require_equal(model(kind, **changed), model("granite", hidden_size=48, logits_scaling=0.5), batch())


def test_it_trains_adapters_of_peft_the_heads_own_among_them():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_llama(vocab_size=VOCAB), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    for name, one in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one, std=0.1)  # zeros would leave A without a gradient
    require_equal(adapted, tiny_llama(vocab_size=VOCAB, seed=1), batch())


def test_no_tensor_of_tokens_by_vocabulary_exists():
    class Largest(TorchDispatchMode):
        """The largest number of elements that an operation returns."""

        elements = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **keywords or {})
            for one in result if isinstance(result, tuple | list) else [result]:
                self.elements = max(self.elements, one.numel() if isinstance(one, torch.Tensor) else 0)
            return result

    student, teacher, inputs = tiny_llama(vocab_size=VOCAB), tiny_llama(vocab_size=VOCAB, seed=1), batch(length=80)
    tokens = int((inputs["labels"] != -100).sum())
    with Largest() as fused:
        distillation_loss(student, teacher, inputs, chunk_bytes=8 * 4 * VOCAB).backward()
    with Largest() as full:
        eager(student, teacher, inputs).backward()
    assert fused.elements < tokens * VOCAB // 2 and full.elements >= tokens * VOCAB


def test_an_objective_is_divided_by_the_count_or_by_what_is_given():
    student, teacher, inputs = tiny_llama(vocab_size=VOCAB), tiny_llama(vocab_size=VOCAB, seed=1), batch()
    counted = int((next_token_labels(inputs["labels"]) != -100).sum())

    def loss(**options):
        return distillation_loss(
            student, teacher, inputs, objective=lambda stats: stats.forward_kl, fields=("forward_kl",), **options
        )

    expected = eager(student, teacher, inputs, lambda log_q, log_p, labels: (log_p.exp() * (log_p - log_q)).sum(-1))
    torch.testing.assert_close(loss(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss(num_items=2 * counted), expected / 2, rtol=1e-5, atol=0)


def test_labels_are_those_of_the_next_token_of_the_same_document():
    labels = torch.tensor([[5, 6, 7, 8, 9]])
    assert next_token_labels(labels).tolist() == [[6, 7, 8, 9, -100]]
    assert next_token_labels(labels, torch.tensor([[0, 1, 0, 1, 2]])).tolist() == [[6, -100, 8, 9, -100]]


def test_labels_that_are_shifted_already_are_taken_as_they_are():
    student, teacher, inputs = tiny_llama(vocab_size=VOCAB), tiny_llama(vocab_size=VOCAB, seed=1), batch()
    expected = distillation_loss(student, teacher, inputs)
    shifted = inputs | {"shift_labels": next_token_labels(inputs["labels"])}
    assert distillation_loss(student, teacher, shifted).item() == expected.item()


def test_the_head_is_as_before_also_after_an_error():
    student, teacher, inputs = tiny_llama(vocab_size=VOCAB), tiny_llama(vocab_size=VOCAB, seed=1), batch()
    before = student(inputs["input_ids"]).logits
    distillation_loss(student, teacher, inputs)
    with pytest.raises(ValueError, match="divergence must be one of"):
        distillation_loss(student, teacher, inputs, divergence="kl")
    assert student(inputs["input_ids"]).logits.equal(before)


def test_what_cannot_be_is_refused_by_name():
    student, teacher, inputs = tiny_llama(vocab_size=VOCAB), tiny_llama(vocab_size=VOCAB, seed=1), batch()
    with pytest.raises(ValueError, match="teacher is in training mode.*teacher.eval()"):
        distillation_loss(student, copy.deepcopy(teacher).train(), inputs)
    with pytest.raises(ValueError, match="the batch has no labels"):
        distillation_loss(student, teacher, {"input_ids": inputs["input_ids"]})
    with pytest.raises(ValueError, match="Linear has no get_output_embeddings"):
        distillation_loss(torch.nn.Linear(2, 2), teacher, inputs)
    with pytest.raises(ValueError, match="LlamaModel has no LM head"):
        distillation_loss(student.model, teacher, inputs)
    student.forward = lambda **inputs: None
    with pytest.raises(ValueError, match="LlamaForCausalLM calls its head 0 times"):
        distillation_loss(student, teacher, inputs)

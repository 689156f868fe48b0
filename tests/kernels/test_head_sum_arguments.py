"""Errors of LMHead.sum_of and of what goes with it: each names the head and says what to do."""

import pytest
import torch

from minillm.losses import LMHead, linear_cross_entropy, linear_divergence

ROWS, VOCAB = 13, 113


def two_models(kit):
    """Hidden states and weights of sizes 8 and 11."""
    hidden = tuple(torch.ones(ROWS, size, device=kit.device) for size in (8, 11))
    return hidden, [torch.ones(VOCAB, size, device=kit.device) for size in (8, 11)]


class Adapter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer = torch.nn.Linear(8, VOCAB)


WRONG = {
    "one tensor": (lambda h, w: (h[0], LMHead.sum_of(*w)), "hidden must be a tuple of 2 hidden states.*got a Tensor"),
    "too many": (lambda h, w: ((*h, h[0]), LMHead.sum_of(*w)), "hidden must be a tuple of 2 hidden states.*got 3"),
    "one head": (lambda h, w: (h, w[0]), "hidden is a tuple, but head is one head; pass LMHead.sum_of"),
    "sizes": (lambda h, w: (h[::-1], LMHead.sum_of(*w)), r"hidden\[0\] has hidden size 11, but head.heads\[0\].weight"),
    "rows": (lambda h, w: ((h[0], h[1][:3]), LMHead.sum_of(*w)), r"hidden\[1\] has leading dimensions \(3,\), hidden\[0\]"),
    "device": (lambda h, w: ((h[0], h[1].to("meta")), LMHead.sum_of(w[0], w[1].to("meta"))), r"hidden\[1\] is on meta"),
    "vocabularies": (lambda h, w: (h, LMHead.sum_of(w[0], w[1][:90])), r"head.heads\[1\] has 90 rows.*vocab_size=90"),
    "softcap": (lambda h, w: (h, LMHead.sum_of(w[0], LMHead(w[1], softcap=-1))), r"head.heads\[1\].softcap must be a pos"),
    "scale": (lambda h, w: (h, LMHead.sum_of(LMHead(w[0], logit_scale=0), w[1])), r"head.heads\[0\].logit_scale must be"),
    "dtype": (lambda h, w: (h, LMHead.sum_of(w[0], w[1].double())), r"head.heads\[1\].weight is torch.float64"),
    "LoRA": (lambda h, w: (h, LMHead.sum_of(Adapter(), w[1])), r"head.heads\[0\] is wrapped by an adapter"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what, kit):
    change, message = WRONG[what]
    hidden, head = change(*two_models(kit))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        linear_cross_entropy(hidden, head, torch.zeros(ROWS, dtype=torch.int64, device=kit.device))


def test_wrong_weight_grad_and_no_head(kit):
    hidden, weights = two_models(kit)
    head, labels = LMHead.sum_of(*weights), torch.zeros(ROWS, dtype=torch.int64, device=kit.device)
    with pytest.raises(ValueError, match="weight_grad is a tensor, but the student's head is a sum of 2: pass a tuple"):
        linear_cross_entropy(hidden, head, labels, weight_grad=torch.zeros(VOCAB, 8, device=kit.device))
    with pytest.raises(ValueError, match="weight_grad has 1 entries, but the student's head is a sum of 2"):
        linear_cross_entropy(hidden, head, labels, weight_grad=("fp32",))
    with pytest.raises(ValueError, match="weight_grad has 2 entries, but the student's head is one"):
        linear_cross_entropy(hidden[0], weights[0], labels, weight_grad=("fp32", "fp32"))
    with pytest.raises(ValueError, match="at least one head"):
        LMHead.sum_of()


def test_tiled_refuses_it(kit):
    pytest.importorskip("triton")
    hidden, weights = two_models(kit)
    head, labels = LMHead.sum_of(*weights), torch.zeros(ROWS, dtype=torch.int64, device=kit.device)
    with pytest.raises(ValueError, match="backend='tiled' does not offer LMHead.sum_of"):
        linear_cross_entropy(hidden, head, labels, backend="tiled")
    with pytest.raises(ValueError, match="backend='tiled' does not offer LMHead.sum_of"):
        linear_divergence(hidden[0], weights[0], hidden, head, backend="tiled")

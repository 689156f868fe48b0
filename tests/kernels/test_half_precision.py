"""fp16: factors of a loss that come after its gradient, and softcaps that let next to nothing through."""

import pytest
import torch
import torch.nn.functional as F

from minillm.losses import LMHead, linear_cross_entropy, linear_divergence, linear_objective, linear_token_stats


def close_models(noise, device):
    """fp16 hidden states, 32 x 64, and heads as they are initialised, whose logits differ by a little."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 64, generator=generator) for rows in (32, 1000))
    weight *= 0.02
    teacher = weight + 0.02 * noise * torch.randn(1000, 64, generator=generator)
    return (one.half().to(device) for one in (hidden, weight, teacher))


def losses(hidden, weight, teacher, backend):
    """The mean reverse KL by every way to a gradient."""
    pair = (hidden, weight, hidden.detach(), teacher)
    stats = lambda: linear_token_stats(*pair, None, fields=("reverse_kl",), backend=backend)  # noqa: E731
    found = {"statistics": lambda: stats().reverse_kl.mean(), "none": lambda: linear_divergence(*pair, reduction="none", backend=backend).mean()}  # fmt: skip
    found["mean"] = lambda: linear_divergence(*pair, backend=backend)
    if backend != "tiled":
        for name, coupled in (("objective", False), ("coupled", True)):
            found[name] = lambda coupled=coupled: (
                linear_objective(
                    *pair, None, lambda s: s.reverse_kl, fields=("reverse_kl",), backend=backend, coupled=coupled
                )[0]
                / 32
            )
    return found


@pytest.mark.parametrize("noise", [0.05, 0.01])  # a reverse KL of 3e-5, of 1e-6
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_a_scaled_loss_keeps_the_small_parts_of_its_gradient(scale, noise, engine, kit):
    """As with a gradient scaler. Rows that were rounded to fp16 before the scale were off by 3e-3 and 2e-2."""
    hidden, weight, teacher = close_models(noise, kit.device)
    exact_hidden = hidden.double().requires_grad_()
    exact_weight = weight.double().requires_grad_()
    log_q = F.linear(exact_hidden, exact_weight).log_softmax(-1)
    log_p = F.linear(hidden.double(), teacher.double()).log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    wanted = torch.autograd.grad(scale * kl, (exact_hidden, exact_weight))
    assert 1e-7 < kl.item() < 1e-4
    hidden.requires_grad_()
    weight.requires_grad_()
    floor = [kit.relative_error(one.half(), one) for one in wanted]  # the one rounding
    for name, loss in losses(hidden, weight, teacher, engine).items():
        found = torch.autograd.grad(scale * loss(), (hidden, weight))
        for gradient, one, least in zip(found, wanted, floor, strict=True):
            assert kit.relative_error(gradient, one) < 1.2 * least, name


@pytest.mark.parametrize("summed", [False, True])
def test_the_slope_of_a_softcap_that_saturates_nearly_every_id(summed, backend, kit):
    """Raw logits of many times the cap: 1 - tanh^2 is what cancellation leaves of it, unless it is computed directly."""
    generator = torch.Generator().manual_seed(0)
    hidden = (30 * torch.randn(16, 8, generator=generator)).to(kit.device).requires_grad_()
    weight = torch.randn(200, 8, generator=generator).to(kit.device).requires_grad_()
    labels = torch.arange(16, device=kit.device)
    head = LMHead(weight, softcap=15.0, logit_scale=1.2)
    if summed:
        zero = torch.zeros(200, 1, device=kit.device)
        states, head = (hidden, torch.ones(16, 1, device=kit.device)), LMHead.sum_of(head, zero)
    else:
        states = hidden
    loss = linear_cross_entropy(states, head, labels, backend=backend)
    found = torch.autograd.grad(loss, (hidden, weight))

    def exact(dtype):
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in (hidden, weight)]
        z = 15 * torch.tanh(F.linear(*leaves) * 1.2 / 15)
        return torch.autograd.grad(F.cross_entropy(z, labels), leaves)

    for gradient, wanted, eager in zip(found, exact(torch.float64), exact(torch.float32), strict=True):
        assert kit.relative_error(gradient, wanted) < 1e-5
        assert kit.relative_error(gradient, wanted) < 1.5 * kit.relative_error(eager, wanted)

"""AdamW and its schedule as the configuration says them."""

import pytest
import torch
from torch import nn

from minillm.config.training import TrainConfig
from minillm.engine.optimizer import make_optimizer


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))


def test_every_key_of_the_configuration_reaches_adamw():
    train = TrainConfig(
        max_steps=4, learning_rate=0.5, weight_decay=0.25, adam_beta1=0.7, adam_beta2=0.8, adam_epsilon=1e-3
    )
    optimizer, _ = make_optimizer({"student": module()}, train, total_steps=4)
    matrices, vectors = optimizer.param_groups
    for group in (matrices, vectors):
        assert group["betas"] == (0.7, 0.8) and group["eps"] == 1e-3 and group["initial_lr"] == 0.5
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.25, 0.0)
    assert [one.dim() for one in matrices["params"]] == [2]
    assert [one.dim() for one in vectors["params"]] == [1, 1, 1]  # a bias, and scale and shift of the norm


def test_a_module_beside_the_student_may_have_a_rate_of_its_own():
    train = TrainConfig(max_steps=4, learning_rate=0.5)
    modules = {"student": module(), "projector": nn.Linear(2, 2, bias=False)}
    optimizer, _ = make_optimizer(modules, train, total_steps=4, learning_rates={"projector": 0.125})
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.5, 0.5, 0.125]


def test_frozen_weights_are_left_out_and_so_are_groups_without_weights():
    frozen = module()
    frozen[0].weight.requires_grad_(False)
    optimizer, _ = make_optimizer({"student": frozen}, TrainConfig(max_steps=4), total_steps=4)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 3 and all(one.requires_grad for one in group["params"])


@pytest.mark.parametrize(
    "schedule, options, rates",
    [
        # rises over the two warm-up steps, then falls to 0 at step 6 of 6
        ("linear", {}, [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ("constant_with_warmup", {}, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine_with_min_lr", {"min_lr_rate": 0.5}, [0.0, 0.5, 1.0, None, 0.75, None, 0.5]),
    ],
)
def test_the_schedule_is_the_named_one_over_warmup_and_all_steps(schedule, options, rates):
    train = TrainConfig(
        max_steps=6, learning_rate=1.0, warmup_steps=2, lr_scheduler_type=schedule, lr_scheduler_kwargs=options
    )
    weights = module()
    optimizer, scheduler = make_optimizer({"student": weights}, train, total_steps=6)
    seen = []
    for _ in rates:
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert [one for one, want in zip(seen, rates, strict=True) if want is not None] == pytest.approx(
        [want for want in rates if want is not None]
    )


def test_a_step_is_adamws():
    """The first step moves a weight by lr * sign(gradient), after the decay by lr * weight_decay."""
    weights = nn.Linear(2, 1, bias=False)
    before = weights.weight.detach().clone()
    train = TrainConfig(max_steps=1, learning_rate=0.1, weight_decay=0.5, lr_scheduler_type="constant")
    optimizer, _ = make_optimizer({"student": weights}, train, total_steps=1)
    weights.weight.grad = torch.tensor([[3.0, -0.25]])
    optimizer.step()
    torch.testing.assert_close(weights.weight.detach(), before * 0.95 - torch.tensor([[0.1, -0.1]]))

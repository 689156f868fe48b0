"""Sums over shares of the vocabulary, and the statistics that they add up to.

Both kernels of the no-logits engine leave, for every row and share, sums under e = exp(x), x = z - m, with m the
largest logit of the share:

    S = sum e        X = sum e x        D = sum e d,  d = x_s - x_t        Y = z_y where the label is in the share

They are put together in float64 and give

    lse = m + log S,  entropy = log S - X / S,  c = log S_s - log S_t
    reverse_kl = D_s / S_s - c,  forward_kl = c - D_t / S_t

Ids that the model whose e it is bans are left out of its D; those that the other model alone bans make D infinite or
NaN, which, where both S are sound, means that the divergence is infinite. Notation and conventions are those of
`minillm.kernels.divergences`. What needs normalised probabilities, the divergences from a mixture, is not among them,
nor is the interpolated target, which would take a third maximum and sums of its own.
"""

import torch
from torch import Tensor

from minillm.kernels.divergences import RowSpec

SLOTS = ("m_s", "s_s", "x_s", "d_s", "y_s", "m_t", "s_t", "x_t", "d_t", "y_t")
NEVER = 2**31 - 1  # the argmax of a share that has none
NEEDS = {
    "student_entropy": "x_s",
    "teacher_entropy": "x_t",
    "student_logprob": "y_s",
    "teacher_logprob": "y_t",
    "reverse_kl": "d_s",
    "forward_kl": "d_t",
}
SHARED_FIELDS = frozenset((*NEEDS, "student_argmax", "teacher_argmax"))


class ShareSums:
    """The memory that the kernels write to: fp32 sums (slots, shares, K), and argmaxes where a field is one."""

    def __init__(self, spec: RowSpec, *, teacher: bool, shares: int, rows: int, device: torch.device):
        wanted = {"m_s", "s_s"} | ({"m_t", "s_t"} if teacher else set())
        wanted |= {slot for field, slot in NEEDS.items() if field in spec.fields}
        names = [name for name in SLOTS if name in wanted]
        self.spec = spec
        self.slots = {name: slot for slot, name in enumerate(names)}
        self.sums = torch.empty(len(names), shares, rows, dtype=torch.float32, device=device)
        self.argmaxes = None
        if "student_argmax" in spec.fields or "teacher_argmax" in spec.fields:
            self.argmaxes = torch.empty(2, shares, rows, dtype=torch.int32, device=device)

    @property
    def constants(self) -> dict[str, int | bool]:
        """The part of it that the kernels know when they are compiled."""
        return {
            **{name.upper(): self.slots.get(name, -1) for name in SLOTS},
            "STUDENT_ARGMAX": "student_argmax" in self.spec.fields,
            "TEACHER_ARGMAX": "teacher_argmax" in self.spec.fields,
        }

    def statistics(self) -> dict[str, Tensor]:
        """The statistics that `rows_torch.row_statistics` returns for these rows, (K,) each, fp32 (argmaxes int64)."""

        def sums(name: str) -> Tensor:  # (shares, K), one at a time: all of them in float64 would take most memory
            return self.sums[self.slots[name]].double()

        result, fields = {}, set(self.spec.fields)
        models = [(who, x) for who, x in (("student", "s"), ("teacher", "t")) if f"m_{x}" in self.slots]
        top = {x: sums(f"m_{x}").amax(0) for _, x in models}
        down = {x: sums(f"m_{x}") - top[x] for _, x in models}  # from a share's maximum to the row's
        weight = {x: down[x].exp() for _, x in models}
        total = {x: (sums(f"s_{x}") * weight[x]).sum(0) for _, x in models}
        log_total = {x: total[x].log().masked_fill(total[x] == 0, torch.nan) for _, x in models}  # no id at all: NaN
        for index, (who, x) in enumerate(models):
            result |= {f"{who}_max": top[x], f"{who}_log_sum": log_total[x]}
            if f"{who}_logprob" in fields:
                result[f"{who}_logprob"] = (sums(f"y_{x}").sum(0) - top[x]) - log_total[x]
            if f"{who}_entropy" in fields:
                sum_x = ((sums(f"x_{x}") + sums(f"s_{x}") * down[x]) * weight[x]).sum(0)
                result[f"{who}_entropy"] = log_total[x] - sum_x / total[x]
            if f"{who}_argmax" in fields:
                best = torch.where(down[x] == 0, self.argmaxes[index].long(), NEVER).amin(0)
                result[f"{who}_argmax"] = best.masked_fill(best == NEVER, 0)
        for name, x, sign in (("reverse_kl", "s", 1), ("forward_kl", "t", -1)):
            if name in fields:
                d = sums(f"d_{x}")
                # a share without weight may have overflowed; what a ban has made infinite has the other sign
                d.masked_fill_((weight[x] == 0) & (d == -sign * torch.inf), 0.0)
                sum_d = ((d + sums(f"s_{x}") * (down["s"] - down["t"])) * weight[x]).sum(0)
                infinite = ~sum_d.isfinite() & log_total["s"].isfinite() & log_total["t"].isfinite()
                value = sign * (sum_d / total[x] - (log_total["s"] - log_total["t"]))
                result[name] = torch.where(infinite, torch.inf, value)
        return {name: value if name.endswith("argmax") else value.float() for name, value in result.items()}

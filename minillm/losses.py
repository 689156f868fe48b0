"""The public door to the fused losses: from hidden states and LM-head weights to losses and gradients.

No full [tokens, vocabulary] tensor ever exists. Importing this loads torch and nothing else of minillm's dependencies.
"""

from minillm.kernels import entry_point, traced
from minillm.kernels.head import LMHead
from minillm.kernels.linear_losses import linear_cross_entropy, linear_divergence, linear_logprobs
from minillm.kernels.objective import linear_objective
from minillm.kernels.sparse_teacher import TopK
from minillm.kernels.token_stats import TokenStats, linear_token_stats

for _function in (linear_cross_entropy, linear_divergence, linear_logprobs, linear_objective, linear_token_stats):
    entry_point.recorded[_function.__name__] = getattr(traced, _function.__name__)
entry_point.refusals.append(traced.refusal)

__all__ = [
    "LMHead",
    "TokenStats",
    "TopK",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logprobs",
    "linear_objective",
    "linear_token_stats",
]

"""Numerically stable log-softmax cross entropy and its gradients, the logits read once."""

from fastxent import backends, information, shards
from fastxent._version import __version__ as __version__
from fastxent.binary import (
    binary_cross_entropy_with_logits,
    binary_cross_entropy_with_logits_grad,
    binary_cross_entropy_with_logits_with_grad,
)
from fastxent.curvature import cross_entropy_hessian_diag, cross_entropy_hvp
from fastxent.divergences import (
    entropy_from_logits,
    entropy_from_logits_grad,
    js_divergence_from_logits,
    js_divergence_from_logits_grad,
    kl_divergence_from_logits,
    kl_divergence_from_logits_grad,
)
from fastxent.linear import linear_cross_entropy, linear_cross_entropy_with_grad, score_linear
from fastxent.losses import cross_entropy, cross_entropy_grad, cross_entropy_with_grad, nll_loss, nll_loss_grad
from fastxent.models import ModelComparison, compare_models
from fastxent.score_state import ScoreState
from fastxent.scoring import Scores, score
from fastxent.softmax import log_softmax, log_softmax_grad, logsumexp, logsumexp_grad, softmax, softmax_grad
from fastxent.state import LseState
from fastxent.threads import get_num_threads, set_num_threads

__all__ = [
    "LseState",
    "ModelComparison",
    "ScoreState",
    "Scores",
    "backends",
    "binary_cross_entropy_with_logits",
    "binary_cross_entropy_with_logits_grad",
    "binary_cross_entropy_with_logits_with_grad",
    "compare_models",
    "cross_entropy",
    "cross_entropy_grad",
    "cross_entropy_hessian_diag",
    "cross_entropy_hvp",
    "cross_entropy_with_grad",
    "entropy_from_logits",
    "entropy_from_logits_grad",
    "get_num_threads",
    "information",
    "js_divergence_from_logits",
    "js_divergence_from_logits_grad",
    "kl_divergence_from_logits",
    "kl_divergence_from_logits_grad",
    "linear_cross_entropy",
    "linear_cross_entropy_with_grad",
    "log_softmax",
    "log_softmax_grad",
    "logsumexp",
    "logsumexp_grad",
    "nll_loss",
    "nll_loss_grad",
    "score",
    "score_linear",
    "set_num_threads",
    "shards",
    "softmax",
    "softmax_grad",
]

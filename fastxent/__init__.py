"""Numerically stable log-softmax cross entropy and its gradients, at the speed of reading the logits once."""

from fastxent import backends
from fastxent.losses import cross_entropy, cross_entropy_grad, cross_entropy_with_grad
from fastxent.softmax import log_softmax, logsumexp, softmax
from fastxent.state import LseState
from fastxent.threads import get_num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "LseState",
    "backends",
    "cross_entropy",
    "cross_entropy_grad",
    "cross_entropy_with_grad",
    "get_num_threads",
    "log_softmax",
    "logsumexp",
    "set_num_threads",
    "softmax",
]

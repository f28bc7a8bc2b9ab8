"""fastxent for torch: losses with torch's own signatures, without copies on the CPU.

Losses of logits are differentiable twice; all but the class-parallel one are operators of torch's library, which
torch.compile, export and functionalisation see as one whole.
Imported by nobody inside; needs `pip install fastxent[torch]`.
"""

from fastxent.torch.arrays import release_memory
from fastxent.torch.linear import linear_cross_entropy
from fastxent.torch.losses import CrossEntropyLoss, binary_cross_entropy_with_logits, cross_entropy, log_softmax
from fastxent.torch.parallel import class_parallel_cross_entropy
from fastxent.torch.scoring import Scores, score

__all__ = [
    "CrossEntropyLoss",
    "Scores",
    "binary_cross_entropy_with_logits",
    "class_parallel_cross_entropy",
    "cross_entropy",
    "linear_cross_entropy",
    "log_softmax",
    "release_memory",
    "score",
]

"""Fuzzing of the file readers and the public functions; see README.md."""

READERS = ["npy", "safetensors", "parquet", "arrow", "zarr", "shards"]
FUNCTIONS = [
    "cross_entropy", "cross_entropy_with_grad", "cross_entropy_hvp", "score", "compare_models", "softmax", "logsumexp",
    "binary_cross_entropy_with_logits", "kl_divergence_from_logits", "linear_cross_entropy_with_grad", "nll_loss_grad",
]  # fmt: skip

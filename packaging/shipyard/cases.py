"""Cases: the requests that every graph of a sub-model is checked on, real ones and the extremes, alone and together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from models.behaviour import Floats, Ints
from serve.history import FEATURES, LIMIT, MOST_OFFERS, OFFER
from shipyard.examples import Cut
from shipyard.metrics import ndcg
from shipyard.tower import tokenise

Arrays = dict[str, npt.NDArray[Any]]

SINGLES = 16
"""Real requests that are asked for alone, beside the extreme ones."""


@dataclass(frozen=True)
class Requests:
    """Requests in a model's input form, with the right answers [B, K] and, of a log, their gains [B, K]."""

    inputs: Arrays
    relevant: Ints
    gains: Floats | None = None

    def batches(self, size: int) -> list[Arrays]:
        """Cut the inputs into batches; padding that a batch does not need is cut off."""
        n = len(self.relevant)
        return [trim({name: value[k : k + size] for name, value in self.inputs.items()}) for k in range(0, n, size)]

    def ndcg(self, ranked: Ints) -> npt.NDArray[np.float64]:
        """Return nDCG@10 [B] of ranked rows [B, 10 or more]."""
        return ndcg(ranked, self.relevant, gains=self.gains)


def requests(names: tuple[str, ...], examples: Cut, tokenizer: PreTrainedTokenizerBase) -> Requests:
    """Return examples as requests; `names` are the model's inputs."""
    return Requests(_encode(names, tokenizer, examples.words, _arrays(examples)), examples.relevant, examples.gains)


def extremes(names: tuple[str, ...], examples: Cut, tokenizer: PreTrainedTokenizerBase) -> dict[str, Arrays]:
    """Return single requests by what they are: empty, the longest history, the longest query, a Chinese query."""
    rows = examples.rows
    rng = np.random.default_rng(0)
    longest = min(LIMIT, rows)
    empty: Arrays = {
        "items": np.zeros((1, 1), np.int64), "features": np.zeros((1, 1, len(FEATURES)), np.float32),
        "offers": np.zeros((1, 1), np.int64), "strengths": np.zeros((1, 1, len(OFFER)), np.float32),
    }  # fmt: skip
    filled: Arrays = {
        "items": 1 + rng.permutation(rows)[None, :longest],
        "features": rng.random((1, longest, len(FEATURES)), np.float32) * 4,
        "offers": 1 + rng.permutation(rows)[None, :MOST_OFFERS],
        "strengths": rng.random((1, min(rows, MOST_OFFERS), len(OFFER)), np.float32),
    }
    found: dict[str, tuple[str, Arrays]] = {
        "an empty request": ("", empty), "the longest history": ("frozen pizza", filled),
    }  # fmt: skip
    if "query_ids" in names:
        real = {name: value[:1] for name, value in _arrays(examples).items()}
        found |= {"the longest query": ("chocolate " * 100, empty), "a Chinese query": ("冷冻比萨 牛奶", real)}
    return {case: _encode(names, tokenizer, [words], arrays) for case, (words, arrays) in found.items()}


def singles(wanted: Requests, extreme: Sequence[Arrays]) -> list[Arrays]:
    """Return the first real requests and the extreme ones, each alone and without padding."""
    return [*wanted.batches(1)[:SINGLES], *map(trim, extreme)]


def together(alone: Sequence[Arrays]) -> Arrays:
    """Return requests as one batch, the shorter ones padded with 0."""
    batch: Arrays = {}
    for name in alone[0]:
        width = max(one[name].shape[1] for one in alone)
        batch[name] = np.concatenate(
            [
                np.pad(one[name], [(0, 0), (0, width - one[name].shape[1]), *[(0, 0)] * (one[name].ndim - 2)])
                for one in alone
            ]
        )
    return batch


def trim(inputs: Arrays) -> Arrays:
    """Cut off columns that are padding in every request, one column left at least."""
    cut: Arrays = {}
    for given, names in {"items": ("items", "features"), "offers": ("offers", "strengths"),
                         "query_mask": ("query_ids", "query_mask")}.items():  # fmt: skip
        if given in inputs:
            used = max(1, int((inputs[given] != 0).sum(1).max()))
            cut |= {name: inputs[name][:, :used] for name in names}
    return {name: cut[name] for name in inputs}


def _arrays(examples: Cut) -> Arrays:
    view = examples.view(slice(None))
    return {"items": view.items, "features": view.features, "offers": view.offers, "strengths": view.strengths}


def _encode(names: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, texts: list[str], arrays: Arrays) -> Arrays:
    """Return the arrays that a model takes, by name."""
    given = dict(arrays)
    if "query_ids" in names:
        ids, mask = tokenise(tokenizer, texts)
        given |= {"query_ids": ids.numpy(), "query_mask": mask.numpy()}
    return {name: given[name] for name in names}

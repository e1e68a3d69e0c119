"""Recommend: what a shopper bought to the products of the next basket."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from models import trunk
from models.behaviour import Behaviour, Ints, View
from models.submodel import Rule, Task

TASK: Task = "recommend"
METRIC = "ndcg@10"
TEACHER: str | None = None


class Head(trunk.Head):
    """Score a product by its vector's product with the user's, its popularity and what the shopper bought before."""

    uses_user = True

    def __init__(self, shape: trunk.Shape) -> None:
        super().__init__(shape)
        self.scale = nn.Parameter(torch.tensor(5.0).log())

    def forward(
        self, vectors: Tensor, bias: Tensor, user: Tensor | None, text: Tensor | None, items: Tensor, features: Tensor
    ) -> Tensor:
        """Return logits [B, N + 1] from vectors [N + 1, D] and user [B, D]."""
        assert user is not None
        return self.finish(self.scale.exp() * user, vectors, bias, items, features)


def rows(behaviour: Behaviour) -> Ints:
    """Rank all items."""
    return np.arange(1, behaviour.items + 1)


def relevant(view: View) -> Ints:
    """Take all products of the basket."""
    return view.bought


def own_counts(behaviour: Behaviour, basket: int, query: int) -> npt.NDArray[np.float64]:
    """Score rows by how often the household bought them, ties by popularity."""
    bought, _ = behaviour.past(basket)
    counts = np.bincount(bought, minlength=behaviour.items + 1)
    return counts + behaviour.popularity / (behaviour.popularity.max() + 1)


def decayed_counts(behaviour: Behaviour, basket: int, query: int) -> npt.NDArray[np.float64]:
    """Score rows by the household's purchases, each worth exp(-days / 60), ties by popularity."""
    bought, days = behaviour.past(basket)
    counts = np.bincount(bought, np.exp(-days / 60), behaviour.items + 1)
    return counts + 1e-6 * behaviour.popularity / (behaviour.popularity.max() + 1)


def popularity(behaviour: Behaviour, basket: int, query: int) -> npt.NDArray[np.float64]:
    """Score rows by their purchases in the train period."""
    return behaviour.popularity


BASELINES: dict[str, Rule] = {
    "popularity": popularity,
    "own counts, popularity": own_counts,
    "own decayed counts, popularity": decayed_counts,
}

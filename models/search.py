"""Search: query words and the shopper's history to products of the whole catalogue."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from models import trunk
from models.behaviour import Behaviour, Ints, View
from models.submodel import Rule, Task

TASK: Task = "search"
METRIC = "ndcg@10"
TEACHER: str | None = None


class Head(trunk.Head):
    """Score a product by its vector's product with the query's, its popularity and what the shopper bought before."""

    uses_text = True

    def __init__(self, shape: trunk.Shape) -> None:
        super().__init__(shape)
        self.query = nn.Linear(shape.text_width, shape.dimension, bias=False)
        self.scale = nn.Parameter(torch.tensor(20.0).log())

    def start(self, table: trunk.ItemTable) -> None:
        """Project queries as the table projects product texts."""
        with torch.no_grad():
            self.query.weight.copy_(table.project.weight)

    def forward(
        self, vectors: Tensor, bias: Tensor, user: Tensor | None, text: Tensor | None, items: Tensor, features: Tensor
    ) -> Tensor:
        """Return logits [B, N + 1] from vectors [N + 1, D] and text [B, W]."""
        assert text is not None
        return self.finish(self.scale.exp() * self.query(text), vectors, bias, items, features)


def rows(behaviour: Behaviour) -> Ints:
    """Rank all items."""
    return np.arange(1, behaviour.items + 1)


def relevant(view: View) -> Ints:
    """Take the products of the basket that the query asks for."""
    return view.asked


def _path(behaviour: Behaviour, basket: int, query: int) -> npt.NDArray[np.float64]:
    return np.where(behaviour.path_of_row == query, behaviour.popularity, -1.0)


def _path_own(behaviour: Behaviour, basket: int, query: int) -> npt.NDArray[np.float64]:
    bought, _ = behaviour.past(basket)
    own = np.bincount(bought, minlength=behaviour.items + 1) * (behaviour.popularity.max() + 1)
    return np.where(behaviour.path_of_row == query, own + behaviour.popularity, -1.0)


BASELINES: dict[str, Rule] = {
    "exact path, popularity": _path,
    "exact path, own counts, popularity": _path_own,
}

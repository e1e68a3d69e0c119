"""Edge recommend: a small student of `recommend` over what one store sells."""

import numpy as np
import torch
from torch import Tensor, nn

from models import trunk
from models.behaviour import Behaviour, Ints, Level
from models.submodel import Answer, Task

TASK: Task = "recommend"
LEVEL: Level = "product"
METRIC = "ndcg@10"
ANSWER: Answer = "bought"
TEACHER: str | None = "recommend"

WIDTH = 64
"""Width of its vectors: 11,000 products of it are 0.7 MB in int8."""


class Head(trunk.Head):
    """Narrow the shared vectors, encode the history by one layer of its own, and score as `recommend` does."""

    def __init__(self, shape: trunk.Shape) -> None:
        super().__init__(shape, WIDTH)
        self.narrow = nn.Linear(shape.dimension, WIDTH, bias=False)
        nn.init.orthogonal_(self.narrow.weight)
        self.user = trunk.UserEncoder(WIDTH, layers=1)
        self.scale = nn.Parameter(torch.tensor(5.0).log())

    def bake(self, vectors: Tensor) -> Tensor:
        """Return vectors [R + 1, WIDTH]."""
        return self.narrow(vectors)

    def forward(self, baked: trunk.Baked, request: trunk.Request, user: Tensor | None) -> Tensor:
        """Return logits [B, R + 1] from vectors [R + 1, WIDTH]."""
        state = self.user(baked.vectors, request.items, request.features)
        return self.finish(self.scale.exp() * state, baked, request)


def rows(behaviour: Behaviour) -> Ints:
    """Rank what the store sold in the train period."""
    return np.flatnonzero(behaviour.local)

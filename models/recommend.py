"""Recommend: what a shopper bought to the products of the next basket."""

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
TEACHER: str | None = None


class Head(trunk.Head):
    """Score a row by its vector's product with the user's, its popularity, its history and its offer."""

    uses_user = True

    def __init__(self, shape: trunk.Shape) -> None:
        super().__init__(shape)
        self.scale = nn.Parameter(torch.tensor(5.0).log())

    def forward(self, baked: trunk.Baked, request: trunk.Request, user: Tensor | None) -> Tensor:
        """Return logits [B, R + 1]."""
        assert user is not None
        return self.finish(self.scale.exp() * user, baked, request)


def rows(behaviour: Behaviour) -> Ints:
    """Rank all products."""
    return np.arange(1, behaviour.items + 1)

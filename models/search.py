"""Search: query words and the shopper's history to products of the whole catalogue."""

import numpy as np
import torch
from torch import Tensor, nn

from models import trunk
from models.behaviour import Behaviour, Ints, Level
from models.submodel import Answer, Task

TASK: Task = "search"
LEVEL: Level = "product"
METRIC = "ndcg@10"
ANSWER: Answer = "asked"
TEACHER: str | None = None

SHARP = 60.0
"""Steepness of the peak: a cosine of .95 has a twentieth of what the same path has."""


class Head(trunk.Head):
    """Score a product by the query's match with its category path and with itself, by its popularity and its history.

    The path's match is what decides first: it is learned apart, at the text tower's full width. It is told twice: by the
    cosine, which orders paths that are written otherwise, and by a peak where both are the same, so that a popular
    neighbour of the path that was asked for needs no steep cosine to stay behind.
    """

    uses_text = True
    uses_types = True

    def __init__(self, shape: trunk.Shape) -> None:
        super().__init__(shape)
        self.query = nn.Linear(shape.text_width, shape.dimension, bias=False)
        self.scale = nn.Parameter(torch.tensor(3.0).log())
        self.match = nn.Linear(shape.text_width, shape.text_width, bias=False)
        nn.init.eye_(self.match.weight)
        self.match_scale = nn.Parameter(torch.tensor(60.0).log())
        self.exact_scale = nn.Parameter(torch.tensor(6.0).log())

    def start(self, project: nn.Linear) -> None:
        """Project queries as the table projects product texts."""
        with torch.no_grad():
            self.query.weight.copy_(project.weight)

    def bake_types(self, texts: Tensor) -> Tensor:
        """Return unit vectors [P + 1, W] of padding and all types from their texts' [P, W]."""
        return nn.functional.pad(nn.functional.normalize(self.match(texts), dim=-1), (0, 0, 1, 0))

    def forward(self, baked: trunk.Baked, request: trunk.Request, user: Tensor | None) -> Tensor:
        """Return logits [B, N + 1]."""
        assert request.text is not None
        assert baked.types is not None
        assert baked.type_of_row is not None
        wanted = nn.functional.normalize(self.match(request.text), dim=-1)
        cosine = wanted @ baked.types.T
        of_type = self.match_scale.exp() * cosine + self.exact_scale.exp() * (SHARP * (cosine - 1)).exp()
        state = self.scale.exp() * self.query(request.text)
        return self.finish(state, baked, request, of_type.index_select(1, baked.type_of_row))


def rows(behaviour: Behaviour) -> Ints:
    """Rank all products."""
    return np.arange(1, behaviour.items + 1)

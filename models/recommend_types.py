"""Recommend types: what a shopper bought to the product types of the next basket."""

import numpy as np

from models import recommend
from models.behaviour import Behaviour, Ints, Level
from models.submodel import Answer, Task

TASK: Task = "recommend"
LEVEL: Level = "type"
METRIC = "ndcg@10"
ANSWER: Answer = "bought"
TEACHER: str | None = None


class Head(recommend.Head):
    """Score types as `recommend` scores products; a type has no offer."""

    uses_offers = False


def rows(behaviour: Behaviour) -> Ints:
    """Rank all types."""
    return np.arange(1, len(behaviour.paths) + 1)

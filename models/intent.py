"""Intent: what a shopper bought to the category that is searched next."""

import numpy as np

from models import recommend
from models.behaviour import Behaviour, Ints, Level
from models.submodel import Answer, Task

TASK: Task = "recommend"
LEVEL: Level = "category"
METRIC = "ndcg@10"
ANSWER: Answer = "asked"
TEACHER: str | None = None


class Head(recommend.Head):
    """Score categories as `recommend` scores products; a category has no offer."""

    uses_offers = False


def rows(behaviour: Behaviour) -> Ints:
    """Rank all categories."""
    return np.arange(1, len(behaviour.categories) + 1)

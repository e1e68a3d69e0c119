"""The contract that each sub-model's file fulfils, and the way to find it by name. Imports no torch."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import models
from serve.errors import ShipyardError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from models.behaviour import Behaviour, Level
    from models.trunk import Head, Shape

Task = Literal["search", "recommend"]
Answer = Literal["bought", "asked"]

MAX_TOKENS = 32
"""Tokens of a text or query that the tower reads; the longest product text of the sample has 30."""

REQUIRED = ("TASK", "LEVEL", "METRIC", "ANSWER", "TEACHER", "Head", "rows")
"""What models/<name>.py defines; a test holds every file to it."""


class Submodel(Protocol):
    """One kind of behaviour: what it ranks, its head and its metric.

    `TASK` chooses the runtime's decoder: "search" takes a query and a history, "recommend" a history alone. `LEVEL` is what
    it ranks: products, product types or categories. `ANSWER` is what is right: all that the basket holds ("bought"), or
    what of it the query asks for ("asked"). `TEACHER` names the sub-model whose scores this one also learns from, if any.
    """

    TASK: Task
    LEVEL: "Level"
    METRIC: str
    ANSWER: Answer
    TEACHER: str | None

    Head: "Callable[[Shape], Head]"
    """Made from the joint model's shape alone."""

    def rows(self, behaviour: "Behaviour") -> "npt.NDArray[np.int64]":
        """Return the rows of the level that it ranks, in their order in the sub-model; row k of it is rows[k - 1]."""
        ...


def names() -> list[str]:
    """Return the names that models/ has a sub-model for: its files that define a TASK."""
    texts = {
        path.stem: path.read_text(encoding="utf-8") for folder in models.__path__ for path in Path(folder).glob("*.py")
    }
    return sorted(name for name, text in texts.items() if "\nTASK" in text)


def find(name: str) -> None:
    """Check that a sub-model has its file, without importing it.

    Raises:
        ShipyardError: there is no such file.
    """
    if importlib.util.find_spec(f"models.{name}") is None:
        raise ShipyardError(
            f"sub-model {name}: no file models/{name}.py",
            allowed=", ".join(names()),
            mend="write the file or remove the entry from fleet.toml",
        )


def load(name: str) -> Submodel:
    """Import a sub-model by name.

    Raises:
        ShipyardError: there is no such file, or it does not fulfil the contract.
    """
    find(name)
    module: Any = importlib.import_module(f"models.{name}")
    if missing := [item for item in REQUIRED if not hasattr(module, item)]:
        raise ShipyardError(
            f"models/{name}.py: defines no {', '.join(missing)}",
            allowed=", ".join(REQUIRED),
            mend="see the contract in models/submodel.py",
        )
    return cast(Submodel, module)

"""What every peer runs: the release's own model code on the bundle's graph, with one thread of the engine."""

import json
import os
from pathlib import Path
from typing import Any

from serve.runtime import Model


class Ranker:
    """The model of the bundle that BUNDLE names."""

    def __init__(self) -> None:
        folder = Path(os.environ["BUNDLE"])
        self._model = Model(folder, json.loads((folder / "bundle.json").read_bytes()), threads=1)

    def answer(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer requests in one batch; those that name candidates rank them, and one batch is all of one kind."""
        rank = "candidates" in requests[0]
        wanted = [self._model.check(request, "request", rank=rank) for request in requests]
        return (self._model.answer_ranked if rank else self._model.answer)(requests, wanted)

    def inputs(self, requests: list[dict[str, Any]]) -> Any:
        """Return the graph's inputs."""
        return self._model.encode(requests)

    def run(self, inputs: Any, workload: str) -> None:
        """Run the engine alone."""
        self._model.session.run(["logits"] if workload == "rank" else ["rows", "scores"], inputs)

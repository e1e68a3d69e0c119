"""BentoML with its adaptive batching: one worker, at most 16 requests together, BATCH_MS of latency more at most."""

import os
import sys
from pathlib import Path
from typing import Any

import bentoml
from ranker import Ranker


@bentoml.service(workers=1, traffic={"timeout": 30})
class Recommend:
    """The model behind BentoML's service."""

    def __init__(self) -> None:
        self.ranker = Ranker()

    @bentoml.api(batchable=True, max_batch_size=16, max_latency_ms=1000, route="/v1/recommend")
    def recommend(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer a batch."""
        return self.ranker.answer(requests)


if __name__ == "__main__":
    here = str(Path(__file__).parent)
    served = [
        "serve",
        "bentoml_app:Recommend",
        "--working-dir",
        here,
        "--host",
        "127.0.0.1",
        "--port",
        os.environ["PORT"],
    ]
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", *served])  # noqa: S606 - this very interpreter

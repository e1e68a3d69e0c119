"""LitServe with its own batching: one worker, batches of what arrives within BATCH_MS, at most 16."""

import os
from typing import Any

import litserve
from ranker import Ranker


class Recommend(litserve.LitAPI):
    """The model behind LitServe's hooks."""

    def setup(self, device: str) -> None:
        """Open the model in the worker."""
        self.ranker = Ranker()

    def predict(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer a batch."""
        return self.ranker.answer(requests)


if __name__ == "__main__":
    api = Recommend(max_batch_size=16, batch_timeout=float(os.environ["BATCH_MS"]) / 1000, api_path="/v1/recommend")
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1)
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), generate_client_file=False, log_level="warning",
               num_api_servers=1)  # fmt: skip

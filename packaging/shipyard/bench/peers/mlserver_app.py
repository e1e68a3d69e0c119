"""MLServer with its adaptive batching in its own protocol: at most 16 requests together, within BATCH_MS.

A request is one text in a tensor of bytes, which is how MLServer takes JSON; its answer is one too.
"""

import asyncio
import json
import os

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import StringCodec
from mlserver.types import InferenceRequest, InferenceResponse
from ranker import Ranker


class Recommend(MLModel):
    """The model behind MLServer's protocol."""

    async def load(self) -> bool:
        """Open the model."""
        self.ranker = Ranker()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer a batch."""
        requests = [json.loads(text) for text in StringCodec.decode_input(payload.inputs[0])]
        answers = [json.dumps(answer) for answer in self.ranker.answer(requests)]
        return InferenceResponse(model_name=self.name, outputs=[StringCodec.encode_output("answers", answers)])


async def main() -> None:
    """Serve one model, in this process."""
    settings = Settings(host="127.0.0.1", http_port=int(os.environ["PORT"]), grpc_port=int(os.environ["PORT"]) + 100,
                        metrics_endpoint=None, parallel_workers=0, debug=False)  # fmt: skip
    batching = float(os.environ["BATCH_MS"]) / 1000
    model = ModelSettings(name="recommend", implementation=Recommend, max_batch_size=16, max_batch_time=batching)
    await MLServer(settings).start([model])


if __name__ == "__main__":
    asyncio.run(main())

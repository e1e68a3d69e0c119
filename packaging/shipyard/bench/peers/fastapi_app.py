"""FastAPI over uvicorn with httptools and uvloop: each request by itself, in FastAPI's own pool of threads."""

import os
from typing import Any

import uvicorn
from fastapi import FastAPI
from ranker import Ranker

ranker = Ranker()
app = FastAPI()


@app.post("/v1/recommend")
def recommend(request: dict[str, Any]) -> dict[str, Any]:
    """Answer one request."""
    return ranker.answer([request])[0]


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]), access_log=False, log_level="warning")

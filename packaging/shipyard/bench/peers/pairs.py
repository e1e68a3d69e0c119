"""A classifier on text pairs, in PyTorch: Hugging Face's pipeline on (what the shopper bought, a product), one pair each.

BASE is the folder of the release's own text encoder, the head on it is not trained: what is measured is time alone. Reads
the pairs from its input, writes the seconds that they took, in batches of 32.
"""

import json
import os
import sys
import time

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

if __name__ == "__main__":
    torch.set_num_threads(1)
    pairs = json.load(sys.stdin)
    model = AutoModelForSequenceClassification.from_pretrained(os.environ["BASE"], num_labels=1)
    classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(os.environ["BASE"]))
    classify(pairs[:32], batch_size=32)
    begin = time.perf_counter()
    classify(pairs, batch_size=32)
    print(json.dumps({"pairs": len(pairs), "seconds": time.perf_counter() - begin}))

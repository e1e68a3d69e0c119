"""Rerank: a cross-encoder for search where there is a log of searches, for there text decides.

It learns to tell a query's answers from what search ranks beside them, by the softmax over both (ListNet's top-one form,
Cao et al. 2007). How much of its word counts is chosen on validation; the test period judges it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from models import trunk
from models.behaviour import PERIODS, TEST, TRAIN, VALIDATION, Behaviour, Floats, Ints, load_behaviour
from models.config import Finetune, Profile, Target
from models.cross import MAX_TOKENS, CrossEncoder
from serve.blend import blend
from serve.errors import ShipyardError
from shipyard import intervals
from shipyard.examples import Answered, Cut, Examples, answer, load_joint
from shipyard.export import OPSET, TOLERANCE, check_graph, open_session, save_graph
from shipyard.forms import to_fp16
from shipyard.stage import write
from shipyard.train import Progress, Training, device, device_name, peak_memory, save

DEPTH = 30
"""Products that are ranked again."""

LIST = 8
"""Products of a query in a step: its answers, half of the list at most, and what search ranks beside them."""

MOST = 2000
"""Queries of train and of validation that search is asked for, at least where there are as many."""

WEIGHTS = tuple(k / 10 for k in range(11))


@dataclass(frozen=True)
class Lists:
    """Queries with what search found for them."""

    behaviour: Behaviour
    cut: Cut
    found: Answered

    @property
    def depth(self) -> int:
        """Products of each query that are ranked again."""
        return min(DEPTH, self.found.ranked.shape[1])

    @cached_property
    def texts(self) -> list[str]:
        """The text of each row [R] that the sub-model ranks."""
        products = self.cut.batches.rows[self.cut.name]
        return [self.behaviour.texts[text] for text in self.behaviour.text_of_row[products - 1]]

    def pairs(self, tokenizer: PreTrainedTokenizerBase, lines: Ints, rows: Ints) -> tuple[Tensor, Tensor]:
        """Return ids and mask [n * C, L] of the queries `lines` [n], each with its rows [n, C]."""
        queries = [self.cut.words[line] for line in lines for _ in range(rows.shape[1])]
        return tokenise_pairs(tokenizer, queries, [self.texts[row - 1] for row in rows.ravel()])

    def draw(self, lines: Ints, rng: np.random.Generator) -> tuple[Ints, Floats]:
        """Return rows [n, LIST] for queries, their answers first, with the part [n, LIST] of the loss that is each one's."""
        rows, worth = np.zeros((len(lines), LIST), np.int64), np.zeros((len(lines), LIST), np.float32)
        for k, line in enumerate(lines):
            relevant = self.cut.relevant[line]
            right = rng.permutation(np.flatnonzero(relevant))[: LIST // 2]
            wrong = np.setdiff1d(self.found.ranked[line], relevant)
            # where all that was found is right, anything else is wrong
            wrong = wrong if len(wrong) else np.setdiff1d(np.arange(1, len(self.texts) + 1), relevant)
            beside = rng.choice(wrong, LIST - len(right), replace=len(wrong) < LIST - len(right))
            rows[k] = np.r_[relevant[right], beside]
            worth[k, : len(right)] = 1 if self.cut.gains is None else self.cut.gains[line, right]
        return rows, worth / worth.sum(1, keepdims=True)

    def again(self, scores: Floats, weight: float) -> Ints:
        """Return the first rows [B, D], ranked again by the cross-encoder's scores [B, D]."""
        first = self.found.ranked[:, : self.depth]
        mixed = blend(self.found.scores[:, : self.depth], scores, weight)
        return np.take_along_axis(first, np.argsort(-mixed, axis=1, kind="stable"), 1)

    def ndcg(self, scores: Floats, weight: float) -> float:
        """Return the mean of nDCG@10 after ranking again."""
        return float(np.nanmean(self.cut.ndcg(self.again(scores, weight))))


def tokenise_pairs(
    tokenizer: PreTrainedTokenizerBase, queries: Sequence[str], texts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return ids and mask [n, L], L at most MAX_TOKENS; the longer of the two is cut first."""
    tokens = tokenizer(
        list(queries), list(texts), padding=True, truncation="longest_first", max_length=MAX_TOKENS, return_tensors="pt"
    )
    return tokens["input_ids"], tokens["attention_mask"]


def rerank(
    data: Path, finetuned: Path, base: Path, config: Finetune, profile: Profile, target: Target, names: tuple[str, ...],
    name: str, out: Path, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Train the cross-encoder of the sub-model `name`, judge it and write rerank.onnx and texts.json into `out`.

    Returns:
        The record: training, the weight chosen on validation, nDCG@10 of search alone and ranked again on test, and their
        paired difference; parity of the graph with torch, and what its precision costs of the metric on validation.

    Raises:
        ShipyardError: training diverged, the graph differs from torch, or its precision costs more than the target allows.
    """
    behaviour = load_behaviour(data)
    joint, vectors = load_joint(behaviour, finetuned, config, names)
    lists = {}
    for period in (TRAIN, VALIDATION, TEST):
        progress(f"rerank: search, {PERIODS[period]}", 0, 1)
        most = profile.test_examples if period == TEST else max(profile.validation_examples, MOST)
        cut = Examples(behaviour, period, most, (name,)).of(name)
        lists[period] = Lists(behaviour, cut, answer(joint, cut, cut.text(vectors), full=False))
    held, test = lists[VALIDATION], lists[TEST]
    tower, tokenizer = trunk.load_tower(base)
    tower.load_state_dict(load_file(finetuned / "tower.safetensors"))
    torch.manual_seed(config.seed)
    where = device()
    model = CrossEncoder(tower.encoder).to(where)
    weights = out / "rerank.safetensors"
    if not weights.exists():
        record = train(model, tokenizer, lists[TRAIN], held, config, profile, out, progress)
        record |= {"device": device_name(where), **peak_memory(where)}
        write(out / "training.json", json.dumps(record))
        save(weights, model.state_dict())
        (out / "rerank.checkpoint.pt").unlink(missing_ok=True)
    model.load_state_dict(load_file(weights))
    file = out / "rerank.onnx"
    parity = to_onnx(model.cpu().eval(), tokenizer, held, file)
    plain = read(open_session(file), tokenizer, held, progress, "validation")
    values = {weight: held.ndcg(plain, weight) for weight in WEIGHTS}
    # of equal ones the least
    weight = max(values, key=lambda one: (values[one], -one))
    loss = 0.0
    if target.precision == "fp16":
        half = onnx.load(file)
        to_fp16(half.graph)
        onnx.save(half, file)
        small = held.ndcg(read(open_session(file), tokenizer, held, progress, "validation in fp16"), weight)
        loss = (values[weight] - small) / max(values[weight], 1e-9)
        if not loss <= target.max_loss:
            raise ShipyardError(
                f"rerank: {name}: fp16 costs too much of the metric", value=f"{loss:.2%}",
                allowed=f"{target.max_loss:.2%} at most", mend="choose another precision for the target in fleet.toml",
            )  # fmt: skip
    found = read(open_session(file), tokenizer, test, progress, "test")
    alone, reranked = (test.cut.ndcg(test.again(found, part)) for part in (0.0, weight))
    write(out / "texts.json", json.dumps(test.texts, ensure_ascii=False))
    owners = test.cut.owners
    return {
        "training": json.loads((out / "training.json").read_text(encoding="utf-8")),
        "depth": test.depth,
        "weight": weight,
        "validation": {"search": values[0.0], "reranked": values[weight]},
        "precision": "fp16" if target.precision == "fp16" else "fp32",
        "bytes": file.stat().st_size,
        "parity": parity,
        "loss": loss,
        "examples": len(owners),
        "search": intervals.interval(alone, owners),
        "reranked": intervals.interval(reranked, owners),
        "over_search": intervals.difference(reranked, alone, owners),
    }


def train(
    model: CrossEncoder, tokenizer: PreTrainedTokenizerBase, lists: Lists, held: Lists, config: Finetune, profile: Profile,
    out: Path, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Train in place on lists of the train period; the weights that are best on `held` are kept."""
    size = max(1, profile.tower_batch // LIST)
    where = next(model.parameters()).device

    def loss_on(of: Lists, lines: Ints, rng: np.random.Generator) -> Tensor:
        rows, worth = of.draw(lines, rng)
        ids, mask = of.pairs(tokenizer, lines, rows)
        scores = model(ids.to(where), mask.to(where)).reshape(rows.shape)
        return -(scores.log_softmax(1) * torch.from_numpy(worth).to(where)).sum(1).mean()

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([config.seed, 5, step])
        return loss_on(lists, rng.integers(0, len(lists.cut.queries), size), rng)

    def validate() -> float:
        rng = np.random.default_rng(config.seed)
        parts = np.array_split(rng.permutation(len(held.cut.queries))[:256], 8)
        return float(np.mean([float(loss_on(held, part, rng)) for part in parts if len(part)]))

    groups = [
        {"params": list(model.encoder.parameters()), "lr": 5e-5}, {"params": list(model.score.parameters()), "lr": 1e-3},
    ]  # fmt: skip
    steps = profile.rerank_steps
    return Training("rerank", model, groups, steps, loss_of, validate, every=max(1, steps // 5)).run(out, progress)


def to_onnx(model: CrossEncoder, tokenizer: PreTrainedTokenizerBase, lists: Lists, file: Path) -> float:
    """Write the graph in fp32; return its largest difference from torch, as a part of the largest score.

    Raises:
        ShipyardError: the difference is too large.
    """
    example = tuple(torch.ones(2, 7, dtype=torch.long) for _ in range(2))
    shape = {0: torch.export.Dim("pairs", min=1, max=4096), 1: torch.export.Dim("tokens", min=1, max=MAX_TOKENS)}
    program = torch.onnx.export(
        model, example, dynamo=True, opset_version=OPSET, input_names=["pair_ids", "pair_mask"], verbose=False,
        output_names=["scores"], dynamic_shapes=(shape, shape),
    )  # fmt: skip
    save_graph(program, file)
    check_graph(file)
    session, parity = open_session(file), 0.0
    lines = np.arange(min(8, len(lists.cut.queries)))
    cases = [
        lists.pairs(tokenizer, lines, lists.found.ranked[lines, :4]),
        tokenise_pairs(tokenizer, ["", "chocolate " * 100, "冷冻比萨"], ["", "milk " * 100, "牛奶 milk"]),
    ]
    for ids, mask in cases:
        with torch.inference_mode():
            expected = model(ids, mask).numpy()
        [scores] = session.run(["scores"], {"pair_ids": ids.numpy(), "pair_mask": mask.numpy()})
        parity = max(parity, float(np.abs(scores - expected).max() / max(np.abs(expected).max(), 1e-9)))
    if not parity <= TOLERANCE:
        raise ShipyardError(
            "rerank: ONNX differs from torch", value=f"{parity:.2e}", allowed=f"{TOLERANCE} of the largest score"
        )
    return parity


def read(
    session: ort.InferenceSession, tokenizer: PreTrainedTokenizerBase, lists: Lists, progress: Progress, what: str
) -> Floats:
    """Return the cross-encoder's scores [B, D] of what search ranks first."""
    total, scores = len(lists.cut.queries), []
    for line in range(total):
        ids, mask = lists.pairs(tokenizer, np.array([line]), lists.found.ranked[line : line + 1, : lists.depth])
        [found] = session.run(["scores"], {"pair_ids": ids.numpy(), "pair_mask": mask.numpy()})
        scores.append(found[:, 0])
        progress(f"rerank: read pairs, {what}", line + 1, total)
    return np.stack(scores)

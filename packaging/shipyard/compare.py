"""Compare ways to tune the text tower on the same data, from the same start, with the same seed, on validation alone.

Each way is a stage, so that it is made once and goes on after a kill, and works in a process of its own, so that its
peak of memory is its own. Masked-language pre-training, where the profile asks for it, is made once for all.
"""

import contextlib
import importlib
import json
import multiprocessing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file

from models import trunk
from models.behaviour import VALIDATION, Behaviour, Ints, evenly, load_behaviour
from models.config import Finetune, Profile
from serve.errors import ShipyardError
from serve.history import pad
from shipyard import intervals, metrics
from shipyard.queries import misspell, paraphrase
from shipyard.stage import Record, Stage, write
from shipyard.tower import encode, pretrain, train_tower
from shipyard.train import Progress, device, peak_memory, save

METHODS: tuple[str, ...] = get_args(Finetune.model_fields["method"].annotation)
START = "start"
QUERIES = 500
TEXTS = 4000
"""Most texts that are ranked where the profile is a sample of households; else all of the catalogue."""

EACH = 10
"""Most baskets of a household."""

WAYS = ("as written", "misspelt", "paraphrased")
"""How a query is written."""

VALUES = "values.json"


@dataclass(frozen=True)
class Job:
    """What a process of its own is told: where from, what to do, where to. `start` is None for the start itself."""

    data: Path
    base: Path
    start: Path | None
    config: Finetune
    profile: Profile
    out: Path


@dataclass(frozen=True)
class Questions:
    """Queries by the way they are written, with the right ones [Q, K] of `texts`, counted from 1, gains and owners [Q]."""

    texts: list[str]
    asked: Mapping[str, list[str]]
    right: Ints
    gains: npt.NDArray[np.float32]
    owners: Ints


def compare(
    config: Finetune, profile: Profile, profile_name: str, data: Record, base: Path, base_sha256: str,
    methods: Sequence[str], build: Path, watch: Callable[[Stage, Path], Record], progress: Progress,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """Tune the tower by each of `methods` on the data stage's output, judge it on validation, and write compare.html.

    `watch` runs each stage in the folder `build`, of which compare/ is used.

    Returns:
        The page's path and the record that it is made of.

    Raises:
        ShipyardError: no or an unknown method, or a method's process failed.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods or len(set(methods)) < len(methods):
        raise ShipyardError(
            "compare: methods are unknown, none or twice the same", value=", ".join(methods),
            allowed=", ".join(METHODS), mend="name one or several, with commas between",
        )  # fmt: skip
    shared = {
        "seed": config.seed, "base": base_sha256, "texts": _most(profile), "mlm_steps": profile.mlm_steps,
        "tower_batch": profile.tower_batch,
    }  # fmt: skip

    def stage(name: str, inputs: tuple[Record, ...], more: dict[str, Any], start: Path | None) -> Record:
        chosen = config if start is None else config.model_copy(update={"method": name})

        def work(out: Path) -> dict[str, Any]:
            return _apart(Job(data.folder, base, start, chosen, profile, out), progress)

        return watch(Stage(name, "compare", inputs, shared | more, ("shipyard.compare",), work), build)

    start = stage(START, (data,), {}, None)
    steps = {"tower_steps": profile.tower_steps}
    ranks = steps | {"rank": config.rank, "alpha": config.alpha}
    records = {
        method: stage(method, (data, start), steps if method == "full" else ranks, start.folder) for method in methods
    }
    record = _compared(profile_name, start, records)
    write(build / "compare" / "compare.json", json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False))
    page = importlib.import_module("shipyard.pages.comparison").comparison(record, build / "compare" / "compare.html")
    return page, record


def _compared(profile_name: str, start: Record, records: Mapping[str, Record]) -> dict[str, Any]:
    """Put the records side by side: each with its difference over the start, and the highest over each of the others."""
    first = json.loads((start.folder / VALUES).read_text(encoding="utf-8"))
    values = {name: json.loads((found.folder / VALUES).read_text(encoding="utf-8")) for name, found in records.items()}
    owners = np.array(first["owners"])

    def over(a: Mapping[str, Any], b: Mapping[str, Any], kind: str) -> dict[str, Any]:
        ours, theirs = (np.array(side["ndcg@10"][kind]) for side in (a, b))
        return intervals.difference(ours, theirs, owners[np.array(first["which"][kind])])

    methods: dict[str, Any] = {}
    for name, found in records.items():
        retrieval = {
            kind: part | {"over_start": over(values[name], first, kind)}
            for kind, part in found.said["retrieval"].items()
        }
        methods[name] = found.said | {"retrieval": retrieval}
    main = WAYS[0]
    best = max(methods, key=lambda name: float(methods[name]["retrieval"][main]["ndcg@10"]["value"]))
    return {
        "profile": profile_name, "queries": start.said["queries"],
        "logged": start.said["logged"], "texts": start.said["texts"],
        "texts_of": start.said["texts_of"], "start": start.said, "methods": methods, "best": best,
        "over_others": {name: over(values[best], values[name], main) for name in methods if name != best},
    }  # fmt: skip


# --- in a process of its own -----------------------------------------------------------------------------------------


def _apart(job: Job, progress: Progress) -> dict[str, Any]:
    """Do a job in a fresh process and return what it says.

    Raises:
        ShipyardError: the job raised one, or the process ended without a word.
    """
    # a forked process would begin with this one's memory
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, job), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            kind, told = ours.recv()
            if kind == "said":
                found: dict[str, Any] = told
                return found
            if kind == "fault":
                raise ShipyardError(told)
            progress(*told)
    except EOFError:
        process.join()
        raise ShipyardError(
            "compare: the process that tunes ended early", value=f"exit code {process.exitcode}",
            mend="look above for its last words; with -9 the machine had too little memory",
        ) from None  # fmt: skip
    finally:
        # when this process is interrupted the other has nobody to work for
        ours.close()
        process.join(1)
        process.terminate()
        process.join()


def _answer(connection: Connection, job: Job) -> None:
    """Do a job and send progress, then what it says or the fault."""
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        try:
            said = tune(job, lambda *told: connection.send(("progress", told)))
        except ShipyardError as fault:
            connection.send(("fault", str(fault)))
        else:
            connection.send(("said", said))


def tune(job: Job, progress: Progress) -> dict[str, Any]:
    """Tune the tower as a job asks for, or go on where an earlier process stopped, and judge it.

    Writes values.json: each query's figures, for paired differences. The start keeps its weights for the others.

    Returns:
        "tower": the training's record, with the process's peak of memory in MB; "retrieval": figures by the way the
        queries are written; bytes of what was trained and of the merged tower.
    """
    behaviour = load_behaviour(job.data)
    tower, tokenizer = trunk.load_tower(job.base)
    if job.start is not None:
        tower.load_state_dict(load_file(job.start / "tower.safetensors"))
    tower.to(device())
    weights, told = job.out / "tower.safetensors", job.out / "tower.json"
    phase, name = (train_tower, "tower") if job.start is not None else (pretrain, "mlm")
    if not weights.exists():
        checkpoint = job.out / f"{name}.checkpoint.pt"
        record: dict[str, Any] = {}
        if job.start is not None or job.profile.mlm_steps:
            resumed = checkpoint.exists()
            record = phase(tower, tokenizer, behaviour, job.config, job.profile, job.out, progress)
            record |= {**peak_memory(tower.device), "resumed": resumed}
        write(told, json.dumps(record))
        save(weights, tower.state_dict())
        checkpoint.unlink(missing_ok=True)
    tower.load_state_dict(load_file(weights))
    tower.eval().requires_grad_(False)
    questions = ask(behaviour, _most(job.profile), job.config.seed)
    retrieval, values = retrieve(tower, tokenizer, questions, progress)
    write(job.out / VALUES, json.dumps(values))
    merged = sum(tensor.nbytes for tensor in tower.state_dict().values())
    record = json.loads(told.read_text(encoding="utf-8"))
    if job.start is not None:
        weights.unlink()
    return {
        name: record, "retrieval": retrieval, "queries": len(questions.owners),
        "logged": len(behaviour.searches.of(VALIDATION)) > 0, "texts": len(questions.texts),
        "texts_of": len(behaviour.texts), "merged_bytes": merged,
        "adapter_bytes": 4 * record["parameters_trained"] if "parameters_trained" in record else None,
    }  # fmt: skip


# --- the judgement ---------------------------------------------------------------------------------------------------


def ask(behaviour: Behaviour, most: int | None, seed: int) -> Questions:
    """Cut the queries out of validation: searches of the log where there is one, else paths of what was bought.

    Right are the texts that answer the search, or those bought of that path. At most `most` texts are ranked, the right
    ones among them; None takes all.
    """
    searches = behaviour.searches
    log = searches.of(VALIDATION)
    if len(log):
        owners = log = evenly(log, QUERIES)
        words = [searches.text[query] for query in log]
        graded = [(found[gain > 0], gain[gain > 0]) for found, gain in zip(*searches.answers(log), strict=True)]
    else:
        baskets = evenly(behaviour.spread(VALIDATION, EACH), QUERIES)
        queries, owners = behaviour.queries(baskets), behaviour.owner(baskets)
        words = [behaviour.paths[query] for query in queries]
        bought = [behaviour.answer(basket) for basket in baskets.tolist()]
        rows = [found[behaviour.path_of_row[found] == query] for found, query in zip(bought, queries, strict=True)]
        graded = [(found, np.ones(len(found), np.float32)) for found in rows]
    # products that share a text are one answer, worth what the best of them is
    answers, gains = [], []
    for found, gain in graded:
        texts, where = np.unique(behaviour.text_of_row[found - 1], return_inverse=True)
        answers.append(texts)
        gains.append(np.zeros(len(texts), np.float32))
        np.maximum.at(gains[-1], where, gain)
    needed, size = np.unique(np.concatenate(answers)), len(behaviour.texts)
    rng = np.random.default_rng(seed)
    chosen = np.arange(size)
    if most is not None and size > max(most, len(needed)):
        others = rng.choice(np.setdiff1d(chosen, needed), max(0, most - len(needed)), replace=False)
        chosen = np.sort(np.r_[needed, others])
    right = pad([1 + np.searchsorted(chosen, texts) for texts in answers])
    worth = np.zeros(right.shape, np.float32)
    for line, gain in zip(worth, gains, strict=True):
        line[: len(gain)] = gain
    ways = (words, [misspell(word, rng) for word in words], [paraphrase(word) for word in words])
    return Questions([behaviour.texts[k] for k in chosen], dict(zip(WAYS, ways, strict=True)), right, worth, owners)


def retrieve(
    tower: trunk.TextTower, tokenizer: Any, questions: Questions, progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rank the texts for each query by their vectors' products.

    Returns:
        By the way the queries are written the figures, and each query's values; a way that changes nothing of a query
        leaves it out.
    """
    found = encode(tower, tokenizer, questions.texts, progress, "encode texts").numpy()
    written = questions.asked[WAYS[0]]
    record: dict[str, Any] = {}
    values: dict[str, Any] = {"owners": questions.owners.tolist(), "which": {}, "ndcg@10": {}, "mrr": {}}
    for kind, asked in questions.asked.items():
        which = np.array([k for k, query in enumerate(asked) if asked is written or query != written[k]], np.int64)
        if not len(which):
            continue
        wanted = encode(tower, tokenizer, [asked[k] for k in which], progress, f"encode queries {kind}").numpy()
        scores = np.c_[np.zeros(len(which), np.float32), wanted @ found.T]
        right, owners = questions.right[which], questions.owners[which]
        ndcg = metrics.ndcg(metrics.top(scores), right, gains=questions.gains[which])
        mrr = metrics.mrr_of_places(metrics.places(scores, right))
        record[kind] = {
            "examples": len(which), "ndcg@10": intervals.interval(ndcg, owners), "mrr": intervals.interval(mrr, owners),
        }  # fmt: skip
        values["which"][kind] = which.tolist()
        for metric, value in (("ndcg@10", ndcg), ("mrr", mrr)):
            values[metric][kind] = np.round(value, metrics.DIGITS).tolist()
    return record, values


def _most(profile: Profile) -> int | None:
    return TEXTS if profile.households else None

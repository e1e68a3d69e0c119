"""Fine-tune: the text tower by gradients (full, LoRA or AdaLoRA), then the joint model over its vectors.

Stage A is contrastive (InfoNCE, van den Oord et al. 2018): a query finds the product that was bought, a product finds
the one bought with it; whatever else in the batch has the same category path or text is no negative. Stage B trains item
table, user encoder and all heads together, each by the softmax over all rows that it ranks; a head with a teacher also
learns the teacher's distribution (Hinton et al. 2015).

Each phase leaves a file, and training leaves checkpoints, so that a run that was killed goes on where it stopped. What
a step draws depends on the seed and the step's number alone.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from models import submodel, trunk
from models.behaviour import TRAIN, VALIDATION, Behaviour, Floats, Ints, View, load_behaviour, placing
from models.config import Finetune, Profile
from serve.errors import ShipyardError

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and how much in all."""

TEMPERATURE = 0.05
CHECKPOINT_SECONDS = 15.0


@dataclass(frozen=True)
class Vectors:
    """Vectors of all texts [T, W] and all category paths [P, W] by one text tower."""

    texts: Tensor
    paths: Tensor


def finetune(
    data: Path,
    base: Path,
    config: Finetune,
    profile: Profile,
    weights: Mapping[str, float],
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train on the data stage's output in `data`, from the encoder in the folder `base`, and write into `out`.

    `weights` are the sub-models with their weight in the joint loss. Writes tower.safetensors, joint.safetensors,
    before.safetensors and after.safetensors (text vectors by the untouched and by the tuned tower), tokenizer.json.

    Returns:
        The record: that weights moved, that the merge kept the outputs, ranks, losses.

    Raises:
        ShipyardError: training diverged, or the adapter did nothing.
    """
    torch.manual_seed(config.seed)
    weights = _teachers_first(weights)
    behaviour = load_behaviour(data)
    tower, tokenizer = trunk.load_tower(base)
    record: dict[str, Any] = {"method": config.method}

    before = _vectors(out / "before.safetensors", tower, tokenizer, behaviour, progress, "encode, untouched")
    if not (out / "tower.safetensors").exists():
        found = train_tower(tower, tokenizer, behaviour, config, profile, out, progress)
        _write_atomically(out / "tower.json", json.dumps(found))
        _save(out / "tower.safetensors", tower.state_dict())
        (out / "tower.checkpoint.pt").unlink(missing_ok=True)
    record["tower"] = json.loads((out / "tower.json").read_text())
    tower.load_state_dict(load_file(out / "tower.safetensors"))
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    after = _vectors(out / "after.safetensors", tower, tokenizer, behaviour, progress, "encode, tuned")

    record["vectors_moved"] = float((after.texts - before.texts).norm(dim=1).mean())
    if not record["vectors_moved"] > 1e-4:
        raise ShipyardError(
            f"finetune: {config.method} left the text tower as it was", value=record["vectors_moved"],
            allowed="a mean move of text vectors above 0.0001", mend="raise tower_steps or rank in fleet.toml",
        )  # fmt: skip
    joint = build_joint(behaviour, after, config, tuple(weights))
    record["joint"] = train_joint(joint, behaviour, after, config, profile, weights, out, progress)
    _save(out / "joint.safetensors", joint.state_dict())
    (out / "joint.checkpoint.pt").unlink(missing_ok=True)
    return record


def _teachers_first(weights: Mapping[str, float]) -> dict[str, float]:
    """Order sub-models so that a teacher comes before those that learn from it."""
    teachers = {name: submodel.load(name).TEACHER for name in weights}
    for name, teacher in teachers.items():
        if teacher is not None and teachers.get(teacher, teacher) is not None:
            raise ShipyardError(
                f"submodel.{name}: cannot learn from its teacher", value=teacher,
                allowed="a sub-model of the fleet that has no teacher itself", mend=f"add [submodel.{teacher}]",
            )  # fmt: skip
    return {name: weights[name] for name in sorted(weights, key=lambda name: teachers[name] is not None)}


def build_joint(behaviour: Behaviour, vectors: Vectors, config: Finetune, names: tuple[str, ...]) -> trunk.Joint:
    """Make the untrained joint model: it ranks by the pretrained tower's similarity and knows nothing of behaviour."""
    torch.manual_seed(config.seed)
    shape = trunk.Shape(config.dimension, behaviour.items, len(behaviour.texts), vectors.texts.shape[1])
    modules = {name: submodel.load(name) for name in names}
    rows = {name: torch.from_numpy(module.rows(behaviour)) for name, module in modules.items()}
    heads = {name: module.Head(shape) for name, module in modules.items()}
    return trunk.Joint(shape, vectors.texts, torch.from_numpy(behaviour.text_of_row), heads, rows)


def encode(
    tower: trunk.TextTower, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], progress: Progress, what: str
) -> Tensor:
    """Return the vectors [n, W] of texts; those of like length go in one batch, so that little is padding."""
    texts = list(texts)
    tower.eval()
    vectors = torch.empty(len(texts), tower.encoder.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), texts[i]))
    with torch.inference_mode():
        for k in range(0, len(order), 128):
            part = order[k : k + 128]
            vectors[part] = tower(*tokenise(tokenizer, [texts[i] for i in part]))
            progress(what, k + len(part), len(order))
    return vectors


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return ids and mask [n, L], L at most submodel.MAX_TOKENS."""
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=submodel.MAX_TOKENS, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"]


# --- stage A ------------------------------------------------------------------------------------------------------


def train_tower(
    tower: trunk.TextTower,
    tokenizer: PreTrainedTokenizerBase,
    behaviour: Behaviour,
    config: Finetune,
    profile: Profile,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train the tower in place; an adapter is merged at the end, and the merge is checked."""
    steps = profile.tower_steps
    adapted = _adapt(tower, config, steps)
    tower.train()
    trained = [p for p in tower.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    pairs = behaviour.baskets(TRAIN, fewest=0)
    pairs = pairs[np.diff(behaviour.start)[pairs] >= 2]

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([config.seed, 1, step])
        rows = _pairs(behaviour, pairs, profile.tower_batch // 2, rng)  # [2, half]
        flat = rows.reshape(-1)
        texts, paths = behaviour.text_of_row[flat - 1], behaviour.path_of_row[flat]
        queries = [blur(behaviour.paths[p], rng) for p in paths]
        query = tower(*tokenise(tokenizer, queries))
        item = tower(*tokenise(tokenizer, [behaviour.texts[t] for t in texts]))
        half = len(flat) // 2
        found = _contrast(query @ item.T, paths, paths)
        together = _contrast(item[:half] @ item[half:].T, texts[:half], texts[half:])
        loss = found + 0.3 * together
        return loss + 0.1 * _orthogonality(adapted) if config.method == "adalora" else loss

    def after(step: int) -> None:
        if config.method == "adalora":
            adapted.base_model.update_and_allocate(step + 1)  # type: ignore[operator,union-attr]

    rate = 5e-5 if config.method == "full" else 1e-3
    # what AdaLoRA's allocator has averaged is not in a checkpoint, so that it starts again from the first step
    curve = _train(
        "tower", trained, [{"params": trained, "lr": rate}], steps, loss_of, after, tower, out, progress,
        resumable=config.method != "adalora",
    )  # fmt: skip
    record: dict[str, Any] = {
        "parameters_trained": sum(p.numel() for p in trained),
        "weights_moved": float(sum((p.detach() - s).norm() ** 2 for p, s in zip(trained, start, strict=True)) ** 0.5),
        **curve,
    }
    if isinstance(adapted, PeftModel):
        record |= _merge(tower, adapted, tokenizer, behaviour, config)
    tower.eval().requires_grad_(False)
    return record


def blur(query: str, rng: np.random.Generator) -> str:
    """Write a query as shoppers do: words left out (30 %), now and then two letters exchanged (10 % of words)."""
    words = query.split()
    kept = [w for w, r in zip(words, rng.random(len(words)), strict=True) if r > 0.3] or words[:1]
    for i, word in enumerate(kept):
        if len(word) > 3 and rng.random() < 0.1:
            k = int(rng.integers(1, len(word) - 1))
            kept[i] = word[:k] + word[k + 1] + word[k] + word[k + 2 :]
    return " ".join(kept)


def _adapt(tower: trunk.TextTower, config: Finetune, steps: int) -> nn.Module:
    """Put the adapter that `config` asks for around the tower's encoder."""
    modules = ["query", "key", "value", "dense"]
    if config.method == "full":
        return tower.encoder
    if config.method == "lora":
        peft_config = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=modules)
    else:
        peft_config = AdaLoraConfig(
            init_r=2 * config.rank, target_r=config.rank, lora_alpha=config.alpha, target_modules=modules,
            total_step=steps, tinit=steps // 10, tfinal=steps // 3, deltaT=max(1, steps // 50),
        )  # fmt: skip
    tower.encoder = get_peft_model(tower.encoder, peft_config)  # type: ignore[assignment]
    return tower.encoder


def _merge(
    tower: trunk.TextTower,
    adapted: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    behaviour: Behaviour,
    config: Finetune,
) -> dict[str, Any]:
    """Merge the adapter into the encoder and check that the outputs stay (peft can be a silent no-op)."""
    tower.eval()
    tokens = tokenise(tokenizer, behaviour.texts[:64])
    record: dict[str, Any] = {}
    if config.method == "adalora":
        ranks = adapted.peft_config["default"].rank_pattern or {}  # type: ignore[attr-defined]
        if not ranks:
            raise ShipyardError("finetune: AdaLoRA never allocated its ranks", mend="raise tower_steps in fleet.toml")
        record["ranks"] = {name: int(sum(kept)) for name, kept in ranks.items()}
    with torch.inference_mode():
        with_adapter = tower(*tokens)
        with adapted.disable_adapter():
            without = tower(*tokens)
        tower.encoder = adapted.merge_and_unload()
        merged = tower(*tokens)
    record["adapter_moved"] = float((with_adapter - without).abs().max())
    record["merge_error"] = float((with_adapter - merged).abs().max())
    if not record["merge_error"] < 1e-4:
        raise ShipyardError(
            "finetune: merging the adapter changed the outputs", value=record["merge_error"], allowed="below 0.0001"
        )
    return record


def _orthogonality(encoder: nn.Module) -> Tensor:
    """Return AdaLoRA's regulariser: how far its singular vectors are from orthogonal (Zhang et al. 2023, eq. 4)."""
    terms = []
    for name, p in encoder.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            terms.append((gram - torch.eye(len(gram))).norm())
    return torch.stack(terms).mean()


def _pairs(behaviour: Behaviour, baskets: Ints, n: int, rng: np.random.Generator) -> Any:
    """Draw n baskets and two different products of each: rows [2, n]."""
    chosen = rng.choice(baskets, n)
    start, size = behaviour.start[chosen], np.diff(behaviour.start)[chosen]
    first = rng.integers(0, size)
    second = (first + rng.integers(1, size)) % size
    return behaviour.row[np.stack([start + first, start + second])]


def _contrast(similarity: Tensor, left: Ints, right: Ints) -> Tensor:
    """Return InfoNCE both ways over similarity [n, n]; other pairs with equal ids are no negatives."""
    same = torch.from_numpy(left[:, None] == right[None, :]) & ~torch.eye(len(left), dtype=torch.bool)
    logits = (similarity / TEMPERATURE).masked_fill(same, -1e4)
    target = torch.arange(len(left))
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


# --- stage B ------------------------------------------------------------------------------------------------------


class Batches:
    """Cut batches for each sub-model; sub-models that rank the same rows share one view."""

    def __init__(self, behaviour: Behaviour, names: Iterable[str]) -> None:
        self.behaviour = behaviour
        self.rows = {name: submodel.load(name).rows(behaviour) for name in names}
        self.place = {name: placing(rows, behaviour.items) for name, rows in self.rows.items()}

    def views(self, baskets: Ints, queries: Ints) -> dict[str, View]:
        """Return the view of each sub-model on the same baskets and queries."""
        made: dict[bytes, View] = {}
        views = {}
        for name, place in self.place.items():
            key = place.tobytes()
            if key not in made:
                made[key] = self.behaviour.view(
                    baskets, queries, None if len(self.rows[name]) == self.behaviour.items else place
                )
            views[name] = made[key]
        return views


@dataclass(frozen=True)
class Columns:
    """Rows of the catalogue [C] that a training step looks at, with the logarithm of the weight [C] of each.

    All that a batch names is there with weight 1; the rest is sampled, and each of the sample stands for as many as were
    left out, so that the softmax's sum over the whole catalogue is estimated without bias.
    """

    rows: Ints
    log_weight: Floats

    @classmethod
    def draw(cls, batches: Batches, views: Mapping[str, View], sampled: int, rng: np.random.Generator) -> "Columns":
        """Draw the columns of a batch."""
        named = [np.r_[0, batches.rows[n]][np.r_[v.items.ravel(), v.bought.ravel()]] for n, v in views.items()]
        known = np.zeros(batches.behaviour.items + 1, bool)
        known[np.concatenate(named)] = True
        known[0] = False
        rest = np.flatnonzero(~known)[1:]
        extra = rng.choice(rest, min(sampled, len(rest)), replace=False)
        rows = np.r_[np.flatnonzero(known), extra]
        weight = np.zeros(len(rows), np.float32)
        if len(extra):
            weight[-len(extra) :] = np.log(len(rest) / len(extra))
        return cls(rows, weight)


def train_joint(
    joint: trunk.Joint,
    behaviour: Behaviour,
    vectors: Vectors,
    config: Finetune,
    profile: Profile,
    weights: Mapping[str, float],
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train the joint model in place on baskets of the train period."""
    batches = Batches(behaviour, weights)
    for name in weights:
        teacher = submodel.load(name).TEACHER
        if teacher is not None and not np.isin(batches.rows[name], batches.rows[teacher]).all():
            raise ShipyardError(
                f"submodel.{name}: ranks rows that its teacher does not", value=teacher, allowed="rows of the teacher",
                mend="narrow its rows, or let it learn without a teacher",
            )  # fmt: skip
    popularity = torch.from_numpy(behaviour.popularity).float()
    with torch.no_grad():
        for name, rows in batches.rows.items():
            joint.bias[name].copy_(torch.log(popularity[rows] + 0.5))
    baskets = behaviour.baskets(TRAIN, fewest=10)

    def losses(chosen: Ints, rng: np.random.Generator, sampled: int) -> dict[str, Tensor]:
        queries = behaviour.queries(chosen, rng)
        views = batches.views(chosen, queries)
        columns = Columns.draw(batches, views, sampled, rng)
        table = joint.table(torch.from_numpy(columns.rows))
        text = vectors.paths[queries]
        logits: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        for name in weights:
            module, view = submodel.load(name), views[name]
            own = batches.place[name][columns.rows]
            kept = np.flatnonzero(own)
            seen = np.zeros(len(batches.rows[name]) + 1, np.int64)  # own row -> column, 0 for none
            seen[own[kept]] = np.arange(1, len(kept) + 1)
            items, features = torch.from_numpy(seen[view.items]), torch.from_numpy(view.features)
            some = table[torch.from_numpy(np.r_[0, kept + 1])]
            bias = joint.bias[name][torch.from_numpy(own[kept] - 1)] + torch.from_numpy(columns.log_weight[kept])
            logits[name] = joint(name, some, bias, text, items, features)
            found[name] = listwise(logits[name], torch.from_numpy(seen[module.relevant(view)]))
            if module.TEACHER is not None:
                taught = np.flatnonzero(batches.place[module.TEACHER][columns.rows])
                shared = torch.from_numpy(1 + np.searchsorted(taught, kept))
                target = logits[module.TEACHER].detach()[:, shared].softmax(1)
                student = logits[name][:, 1:].log_softmax(1)
                found[name] = found[name] + nn.functional.kl_div(student, target, reduction="batchmean")
        return found

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([config.seed, 2, step])
        found = losses(rng.choice(baskets, profile.joint_batch), rng, profile.joint_sampled)
        return sum((weights[name] * loss for name, loss in found.items()), torch.zeros(()))

    # a table's line sees few gradients, the scores of repeat purchases start at zero: both need large steps
    rates = {"table.project": 2e-4, "table.identity": 5e-3, "bias": 5e-3, "repeat": 1e-2}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in joint.named_parameters():
        kind = next((kind for kind in rates if name.startswith(f"{kind}.") or f".{kind}." in name), "")
        groups.setdefault(rates.get(kind, 2e-3), []).append(parameter)
    by_rate = [{"params": members, "lr": rate} for rate, members in groups.items()]
    joint.train()
    curve = _train(
        "joint", joint.parameters(), by_rate, profile.joint_steps, loss_of, lambda step: None, joint, out, progress
    )
    joint.eval()
    with torch.inference_mode():
        held = behaviour.first_baskets(VALIDATION)[:512]
        validation = losses(held, np.random.default_rng(config.seed), behaviour.items)
    return {**curve, "validation_loss": {name: float(loss) for name, loss in validation.items()}}


class Listwise(torch.autograd.Function):
    """Mean over requests of the mean over right answers of -log softmax (ListNet's top-one form, Cao et al. 2007).

    Shapes: logits [B, R + 1], relevant [B, K] padded with 0. A request without a right answer counts nothing. Its own
    gradient, for the derived one makes three more arrays of the logits' size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, relevant: Tensor) -> Tensor:
        """Return the loss."""
        right = (relevant != 0).to(logits.dtype)
        weight = right / right.sum(1, keepdim=True).clamp(min=1) / right.any(1).sum().clamp(min=1)
        total = logits.logsumexp(1, keepdim=True)
        ctx.save_for_backward(logits, total, relevant, weight)
        return -((logits.gather(1, relevant) - total) * weight).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return softmax minus the right answers' shares."""
        logits, total, relevant, weight = ctx.saved_tensors
        grad = torch.sub(logits, total).exp_().mul_(weight.sum(1, keepdim=True))
        return grad.scatter_add_(1, relevant, -weight).mul_(grads[0]), None


def listwise(logits: Tensor, relevant: Tensor) -> Tensor:
    """Return the loss of `Listwise`."""
    loss: Tensor = Listwise.apply(logits, relevant)  # type: ignore[no-untyped-call]
    return loss


# --- both ---------------------------------------------------------------------------------------------------------


def _train(
    name: str,
    parameters: Iterable[nn.Parameter],
    groups: list[dict[str, Any]],
    steps: int,
    loss_of: Callable[[int], Tensor],
    after: Callable[[int], None],
    module: nn.Module,
    out: Path,
    progress: Progress,
    resumable: bool = True,
) -> dict[str, Any]:
    """Run AdamW with warm-up and cosine decay; go on from a checkpoint in `out` when there is one.

    The caller removes the checkpoint once it has saved what was trained.
    """
    parameters = list(parameters)
    optimiser = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: (s + 1) / warm if s < warm else 0.5 * (1 + math.cos(math.pi * (s - warm) / max(1, steps - warm))),
    )
    file = out / f"{name}.checkpoint.pt"
    curve: list[float] = []
    if file.exists():
        state = torch.load(file, weights_only=True)
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        curve = state["curve"]
    saved = time.monotonic()
    for step in range(len(curve), steps):
        torch.manual_seed(step)  # dropout draws the same after a restart
        loss = loss_of(step)
        if not torch.isfinite(loss):
            raise ShipyardError(
                f"finetune: {name}: loss is {float(loss.detach())} at step {step}", allowed="a finite number",
                mend="look for extreme values in the data, or take smaller batches",
            )  # fmt: skip
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        after(step)
        curve.append(float(loss.detach()))
        progress(f"train {name}, loss {np.mean(curve[-20:]):.3f}", step + 1, steps)
        if resumable and time.monotonic() - saved > CHECKPOINT_SECONDS and step + 1 < steps:
            state = {
                "module": module.state_dict(), "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict(),
                "curve": curve,
            }  # fmt: skip
            torch.save(state, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
            saved = time.monotonic()
    tenth = max(1, steps // 10)
    return {
        "steps": steps,
        "loss_first": float(np.mean(curve[:tenth])),
        "loss_last": float(np.mean(curve[-tenth:])),
        "curve": [round(float(np.mean(part)), 4) for part in np.array_split(curve, min(50, steps))],
    }


def _vectors(
    file: Path,
    tower: trunk.TextTower,
    tokenizer: PreTrainedTokenizerBase,
    behaviour: Behaviour,
    progress: Progress,
    what: str,
) -> Vectors:
    """Encode all texts and paths, or read them where an earlier run has."""
    if not file.exists():
        both = encode(tower, tokenizer, [*behaviour.texts, *behaviour.paths], progress, what)
        n = len(behaviour.texts)
        _save(file, {"texts": both[:n].contiguous(), "paths": both[n:].contiguous()})
    found = load_file(file)
    return Vectors(found["texts"], found["paths"])


def load_vectors(folder: Path, when: str) -> Vectors:
    """Read the vectors of a finished fine-tuning: `when` is "before" or "after"."""
    found = load_file(folder / f"{when}.safetensors")
    return Vectors(found["texts"], found["paths"])


def _save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def _write_atomically(file: Path, text: str) -> None:
    file.with_suffix(".tmp").write_text(text, encoding="utf-8")
    file.with_suffix(".tmp").replace(file)

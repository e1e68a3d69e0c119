"""Stage A: the text tower by gradients, in full or by LoRA or AdaLoRA, after masked-language pre-training where asked for.

The contrastive loss is InfoNCE (van den Oord et al. 2018): a query finds the product that was bought, a product finds
the one bought with it, over deduplicated texts; whatever else in the batch has the same category path or text is no
negative. Masked-language pre-training is that of BERT (Devlin et al. 2019), on product texts and on baskets written as
text.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from models import submodel, trunk
from models.behaviour import TRAIN, VALIDATION, Behaviour, Ints
from models.config import Finetune, Profile
from serve.errors import ShipyardError
from shipyard.queries import blur
from shipyard.train import Progress, Training

TEMPERATURE = 0.05
MASKED = 0.15
"""Part of the tokens that pre-training hides."""

HELD_PAIRS = 256
"""Pairs of validation baskets that the loss of validation is taken from."""


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return ids and mask [n, L], L at most submodel.MAX_TOKENS."""
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=submodel.MAX_TOKENS, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"]


def _tokens(tower: trunk.TextTower, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[Tensor, Tensor]:
    ids, mask = tokenise(tokenizer, texts)
    return ids.to(tower.device), mask.to(tower.device)


def encode(
    tower: trunk.TextTower, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], progress: Progress, what: str
) -> Tensor:
    """Return the vectors [n, W] of texts; each different text is encoded once, those of like length in one batch."""
    texts = list(texts)
    once = sorted(set(texts), key=lambda text: (len(text), text))
    tower.eval()
    vectors = torch.empty(len(once), tower.encoder.config.hidden_size)
    with torch.inference_mode():
        for k in range(0, len(once), 128):
            vectors[k : k + 128] = tower(*_tokens(tower, tokenizer, once[k : k + 128]))
            progress(what, min(k + 128, len(once)), len(once))
    line = {text: k for k, text in enumerate(once)}
    return vectors[[line[text] for text in texts]]


def train_tower(
    tower: trunk.TextTower,
    tokenizer: PreTrainedTokenizerBase,
    behaviour: Behaviour,
    config: Finetune,
    profile: Profile,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train the tower in place; an adapter is merged at the end, and the merge is checked.

    Returns:
        The record: losses, the loss of validation before and after, parameters trained and how far they moved, for an
        adapter the size of the merge's error, for AdaLoRA the ranks that it allocated.

    Raises:
        ShipyardError: the loss diverged, the merge changed the outputs, or AdaLoRA never allocated.
    """
    steps = profile.tower_steps
    held = _contrast_of(
        behaviour, tower, tokenizer, _pairs(behaviour, VALIDATION, HELD_PAIRS, np.random.default_rng(config.seed))
    )
    with torch.inference_mode():
        before = float(held())
    adapted = _adapt(tower, config, steps)
    trained = [p for p in tower.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([config.seed, 1, step])
        pairs = _pairs(behaviour, TRAIN, profile.tower_batch // 2, rng, blurred=True)
        loss = _contrast_of(behaviour, tower, tokenizer, pairs)()
        return loss + 0.1 * _orthogonality(adapted) if config.method == "adalora" else loss

    def after(step: int) -> None:
        if config.method == "adalora":
            adapted.base_model.update_and_allocate(step + 1)  # type: ignore[operator,union-attr]

    learning_rate = 5e-5 if config.method == "full" else 1e-3
    # AdaLoRA's allocator keeps averages that are in no checkpoint, and its ranks belong to the last step alone
    allocates = config.method == "adalora"
    record: dict[str, Any] = Training(
        "tower", tower, [{"params": trained, "lr": learning_rate}], steps, loss_of, lambda: float(held()),
        every=max(1, steps // 5), after=after, resumable=not allocates, keep_best=not allocates,
    ).run(out, progress)  # fmt: skip
    record |= {
        "validation_before": before,
        "parameters_trained": sum(p.numel() for p in trained),
        "weights_moved": float(sum((p.detach() - s).norm() ** 2 for p, s in zip(trained, start, strict=True)) ** 0.5),
    }
    if isinstance(adapted, PeftModel):
        record |= _merge(tower, adapted, tokenizer, behaviour, config)
    tower.eval().requires_grad_(False)
    with torch.inference_mode():
        record["validation_after"] = float(held())
    return record


def pretrain(
    tower: trunk.TextTower,
    tokenizer: PreTrainedTokenizerBase,
    behaviour: Behaviour,
    config: Finetune,
    profile: Profile,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train all of the tower in place to fill in hidden words of product texts and of baskets.

    Raises:
        ShipyardError: the tokeniser knows no mask.
    """
    mask = tokenizer.mask_token_id
    if mask is None:
        raise ShipyardError(
            "finetune: the base model's tokeniser has no mask token", mend="set mlm_steps = 0, or choose another base"
        )
    words: Tensor = tower.encoder.get_input_embeddings().weight  # type: ignore[assignment]
    width = words.shape[1]
    torch.manual_seed(config.seed)
    head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width)).to(tower.device)
    model = nn.ModuleDict({"tower": tower, "head": head})
    baskets = {period: _several(behaviour, period) for period in (TRAIN, VALIDATION)}

    def loss_on(period: int, rng: np.random.Generator, n: int) -> Tensor:
        texts = [behaviour.texts[t] for t in rng.integers(0, len(behaviour.texts), n // 2)]
        for basket in rng.choice(baskets[period], n - n // 2):
            # a basket as a sentence: its products' types in any order
            paths = behaviour.path_of_row[rng.permutation(behaviour.answer(int(basket)))[:6]]
            texts.append(" ".join(behaviour.paths[p].split()[-1] for p in paths))
        ids, given = tokenise(tokenizer, texts)
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        draw = torch.from_numpy(rng.random(ids.shape))
        hidden = (draw < MASKED) & ~special
        shown = torch.where(hidden & (draw < 0.8 * MASKED), mask, ids)
        exchanged = torch.from_numpy(rng.integers(0, len(words), ids.shape))
        shown = torch.where(hidden & (draw >= 0.9 * MASKED), exchanged, shown)
        shown, given, right = (part.to(tower.device) for part in (shown, given, ids[hidden]))
        state = tower.encoder(input_ids=shown, attention_mask=given).last_hidden_state[hidden.to(tower.device)]
        return nn.functional.cross_entropy(head(state) @ words.T, right)

    def loss_of(step: int) -> Tensor:
        return loss_on(TRAIN, np.random.default_rng([config.seed, 4, step]), profile.tower_batch)

    def held() -> float:
        return float(loss_on(VALIDATION, np.random.default_rng(config.seed), HELD_PAIRS))

    groups = [{"params": list(tower.parameters()), "lr": 5e-5}, {"params": list(head.parameters()), "lr": 1e-3}]
    steps = profile.mlm_steps
    return Training("mlm", model, groups, steps, loss_of, held, every=max(1, steps // 5)).run(out, progress)


@dataclass(frozen=True)
class Pairs:
    """Queries and product texts that belong together, `groups` [n] that are no negatives of each other, and how many texts
    at the start have been bought with as many that follow."""

    queries: list[str]
    texts: Ints
    groups: Ints
    together: int


def _contrast_of(
    behaviour: Behaviour, tower: trunk.TextTower, tokenizer: PreTrainedTokenizerBase, pairs: Pairs
) -> Callable[[], Tensor]:
    """Return the contrastive loss over pairs as a function."""
    wanted = _tokens(tower, tokenizer, pairs.queries)
    found = _tokens(tower, tokenizer, [behaviour.texts[t] for t in pairs.texts])
    texts, n = pairs.texts, pairs.together

    def loss() -> Tensor:
        query, item = tower(*wanted), tower(*found)
        value = _contrast(query @ item.T, pairs.groups, texts)
        return value + 0.3 * _contrast(item[:n] @ item[n : 2 * n].T, texts[:n], texts[n : 2 * n]) if n else value

    return loss


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
    tokens = _tokens(tower, tokenizer, behaviour.texts[:64])
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
            terms.append((gram - torch.eye(len(gram), device=gram.device)).norm())
    return torch.stack(terms).mean()


def _several(behaviour: Behaviour, period: int) -> Ints:
    """Return the baskets of a period with two products or more."""
    baskets = behaviour.baskets(period, fewest=0)
    found = np.flatnonzero(np.diff(behaviour.start)[baskets] >= 2)
    return baskets[found]


def _pairs(behaviour: Behaviour, period: int, n: int, rng: np.random.Generator, *, blurred: bool = False) -> Pairs:
    """Draw n baskets of a period with two different products of each, and as many searches of the log where there is one.

    The query of a bought product is its category path, blurred if asked for.
    """
    queries: list[str] = []
    rows, groups, together = np.zeros(0, np.int64), np.zeros(0, np.int64), 0
    baskets, log = _several(behaviour, period), behaviour.searches.of(period)
    if len(baskets):
        chosen = rng.choice(baskets, n)
        start, size = behaviour.start[chosen], np.diff(behaviour.start)[chosen]
        first = rng.integers(0, size)
        second = (first + rng.integers(1, size)) % size
        rows, together = behaviour.row[np.r_[start + first, start + second]], n
        groups = behaviour.path_of_row[rows]
        queries = [behaviour.paths[p] for p in groups]
        queries = [blur(query, rng) for query in queries] if blurred else queries
    if len(log):
        asked = rng.choice(log, n if together else 2 * n)
        answers, gains = behaviour.searches.answers(asked)
        # one of the best answers of each
        found = [int(rng.choice(rows_[gain == gain.max()])) for rows_, gain in zip(answers, gains, strict=True)]
        rows = np.r_[rows, found]
        groups = np.r_[groups, len(behaviour.paths) + asked]
        queries += [behaviour.searches.text[query] for query in asked]
    return Pairs(queries, behaviour.text_of_row[rows - 1], groups, together)


def _contrast(similarity: Tensor, left: Ints, right: Ints) -> Tensor:
    """Return InfoNCE both ways over similarity [n, n]; pairs that share an id on one side are no negatives."""
    same = (left[:, None] == left[None, :]) | (right[:, None] == right[None, :])
    none = torch.from_numpy(same & ~np.eye(len(left), dtype=bool)).to(similarity.device)
    logits = (similarity / TEMPERATURE).masked_fill(none, -1e4)
    target = torch.arange(len(left), device=similarity.device)
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2

"""What the sub-models share: text tower, tables of products, types and categories, and the user encoder.

Shapes: B requests, H items of a history, F features of each, P promoted items, T different texts, N rows of a level, R rows
that a sub-model ranks, D width of vectors (`Shape.dimension`), W width of the text tower's output. Row 0 of every table is
padding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from models.behaviour import Level
from serve.history import FEATURES, OFFER

RECENT = 48
"""Items of a history that the user encoder attends to."""

USER_LAYERS = 1

NATURE = 8
"""Numbers that an item's vector becomes where its history is scored."""

PADDING_LOGIT = -1e4
"""Score of row 0: below all others, and still a number in fp16."""


@dataclass(frozen=True)
class Shape:
    """Size the joint model: width of its vectors and of the text tower's."""

    dimension: int
    text_width: int


@dataclass(frozen=True)
class Request:
    """A batch of requests: rows `items` [B, H] with `features` [B, H, F], promoted rows `offers` [B, P] with `strengths`
    [B, P, 3], and the query's vector `text` [B, W] where there is one."""

    items: Tensor
    features: Tensor
    offers: Tensor
    strengths: Tensor
    text: Tensor | None = None


@dataclass(frozen=True)
class Baked:
    """A sub-model's view of the tables: `vectors` [R + 1, any width], `bias` [R], and for a head that matches types their
    vectors `types` [P + 1, any width] and the type [R + 1] of each row."""

    vectors: Tensor
    bias: Tensor
    types: Tensor | None = None
    type_of_row: Tensor | None = None


class TextTower(nn.Module):
    """Encode texts as unit vectors: a BERT-like encoder, the mean of its token vectors, length 1."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    def forward(self, query_ids: Tensor, query_mask: Tensor) -> Tensor:
        """Return vectors [B, W] of token ids [B, L] with mask [B, L] (1 token, 0 padding)."""
        hidden = self.encoder(input_ids=query_ids, attention_mask=query_mask).last_hidden_state
        mask = query_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=-1)


class Table(nn.Module):
    """Give each row of a level a vector: its text's vector, projected, plus a learned one of its id.

    A cold item has its text alone. The projection is shared by all levels.
    """

    text_vectors: Tensor
    text_of_row: Tensor

    def __init__(self, dimension: int, text_vectors: Tensor, text_of_row: Tensor) -> None:
        super().__init__()
        self.register_buffer("text_vectors", text_vectors, persistent=False)  # [T, W]
        self.register_buffer("text_of_row", text_of_row, persistent=False)  # [N] rows 1..N
        self.identity = nn.Embedding(len(text_of_row) + 1, dimension, padding_idx=0)
        nn.init.zeros_(self.identity.weight)

    def forward(self, project: nn.Module, rows: Tensor) -> Tensor:
        """Return the vectors [C + 1, D] of padding and the `rows` [C] of 1..N."""
        # a text is projected once, however many rows have it
        texts, where = torch.unique(self.text_of_row[rows - 1], return_inverse=True)
        vectors = project(self.text_vectors[texts])[where] + self.identity(rows)
        return nn.functional.pad(vectors, (0, 0, 1, 0))


class Layer(nn.Module):
    """One pre-norm transformer layer (Xiong et al. 2020), with the mask as a bias.

    A bias instead of a boolean mask, for a history without any item must not become a softmax over nothing.
    """

    def __init__(self, dimension: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(dimension)
        self.mix = nn.Linear(dimension, 3 * dimension)
        self.join = nn.Linear(dimension, dimension)
        self.between = nn.LayerNorm(dimension)
        self.up = nn.Linear(dimension, 2 * dimension)
        self.down = nn.Linear(2 * dimension, dimension)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Return [B, H, D] from x [B, H, D] and the bias [B, 1, 1, H] of each key."""
        batch, length, width = x.shape
        split = self.mix(self.before(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5 + bias).softmax(-1)
        x = x + self.drop(self.join((weights @ v).transpose(1, 2).reshape(batch, length, width)))
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.between(x)))))


class UserEncoder(nn.Module):
    """Encode a history as one vector: its items' mean, plus what a small transformer makes of the recent ones.

    The transformer's part starts at zero, so that the untrained encoder is the mean.
    """

    def __init__(self, dimension: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        self.describe = nn.Linear(len(FEATURES), dimension)
        self.layers = nn.ModuleList(Layer(dimension, heads) for _ in range(layers))
        self.out = nn.Linear(dimension, dimension)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, vectors: Tensor, items: Tensor, features: Tensor) -> Tensor:
        """Return [B, D] from item vectors [N + 1, D], rows [B, H] (0 padding) and features [B, H, F]."""
        items, features = items[:, :RECENT], features[:, :RECENT]
        given = (items != 0).unsqueeze(-1).to(vectors.dtype)
        x = nn.functional.embedding(items, vectors)
        count = given.sum(1).clamp(min=1)
        mean = (x * given).sum(1) / count
        bias = ((given - 1) * 1e4).permute(0, 2, 1).unsqueeze(1)
        x = x + self.describe(features)
        for layer in self.layers:
            x = layer(x, bias)
        return mean + self.out((x * given).sum(1) / count)


class Repeat(nn.Module):
    """Score each item of a history by what is told of it, by its bias and by its vector; starts at zero.

    The vector is there for its nature: milk is bought again after days, batteries after months.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, dimension: int, width: int = 64) -> None:
        super().__init__()
        self.nature = nn.Linear(dimension, NATURE)
        self.register_buffer("mean", torch.zeros(len(FEATURES)))
        self.register_buffer("scale", torch.ones(len(FEATURES)))
        self.hidden = nn.Sequential(
            nn.Linear(len(FEATURES) + 1 + NATURE, width), nn.GELU(), nn.Linear(width, width // 2), nn.GELU()
        )
        self.out = nn.Linear(width // 2, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def standardise(self, features: Tensor) -> None:
        """Take mean and deviation of features [n, F] of the train period."""
        self.mean.copy_(features.mean(0))
        self.scale.copy_(1 / features.std(0).clamp(min=1e-3))

    def forward(self, logits: Tensor, baked: Baked, bias: Tensor, items: Tensor, features: Tensor) -> Tensor:
        """Add to logits [B, R + 1], in place, the score of each item [B, H] of the history; bias is [R + 1]."""
        nature = self.nature(nn.functional.embedding(items, baked.vectors))
        told = torch.cat([(features - self.mean) * self.scale, bias[items].unsqueeze(-1), nature], -1)
        bonus = self.out(self.hidden(told)).squeeze(-1)
        return logits.scatter_add_(1, items, torch.where(items == 0, 0.0, bonus))


class Offers(nn.Module):
    """Score each promoted item by its offer and by its bias; starts at zero."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.hidden = nn.Linear(len(OFFER) + 1, width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, logits: Tensor, bias: Tensor, offers: Tensor, strengths: Tensor) -> Tensor:
        """Add to logits [B, R + 1], in place, the score of each promoted item [B, P]; bias is [R + 1]."""
        told = torch.cat([strengths, bias[offers].unsqueeze(-1)], -1)
        bonus = self.out(nn.functional.gelu(self.hidden(told))).squeeze(-1)
        return logits.scatter_add_(1, offers, torch.where(offers == 0, 0.0, bonus))


class Head(nn.Module):
    """What a sub-model adds to the trunk: it turns shared vectors into one score for each row that it ranks.

    A head says by its flags which parts of the trunk and of a request it needs; the rest stays out of its artifact.
    """

    uses_text = False
    uses_user = False
    uses_types = False
    uses_offers = True

    def __init__(self, shape: Shape, width: int | None = None) -> None:
        """`width` is that of the vectors that `bake` returns, the trunk's unless told."""
        super().__init__()
        self.shape = shape
        self.repeat = Repeat(width or shape.dimension)
        self.offers = Offers() if self.uses_offers else None

    def start(self, project: nn.Linear) -> None:
        """Start from the untrained projection of texts, before any training."""

    def bake(self, vectors: Tensor) -> Tensor:
        """Return the vectors [R + 1, any width] of the ranked rows in the form that this head serves from."""
        return vectors

    def bake_types(self, texts: Tensor) -> Tensor:
        """Return vectors [P + 1, any width] of padding and all types from their texts' [P, W]."""
        raise NotImplementedError

    def forward(self, baked: Baked, request: Request, user: Tensor | None) -> Tensor:
        """Return logits [B, R + 1]; `user` [B, D] is the encoded history."""
        raise NotImplementedError

    def finish(self, state: Tensor, baked: Baked, request: Request, more: Tensor | None = None) -> Tensor:
        """Return logits [B, R + 1]: state [B, D] times vectors, bias, repeat purchases, offers and `more`.

        Padding never wins.
        """
        bias = nn.functional.pad(baked.bias, (1, 0), value=PADDING_LOGIT)
        # logits are hundreds of megabytes for a large batch, so nothing here copies them
        logits = torch.addmm(bias, state, baked.vectors.T)
        if more is not None:
            logits += more
        # the padding's bias would only disturb the small networks, and its score is dropped
        known = nn.functional.pad(baked.bias, (1, 0))
        if self.offers is not None:
            logits = self.offers(logits, known, request.offers, request.strengths)
        return self.repeat(logits, baked, known, request.items, request.features)


class Standalone(nn.Module):
    """One sub-model cut out of the joint one: its head, its rows' vectors and bias, and those trunk parts that it uses."""

    vectors: Tensor
    bias: Tensor
    types: Tensor | None
    type_of_row: Tensor | None

    def __init__(self, head: Head, baked: Baked, user: UserEncoder | None, tower: TextTower | None) -> None:
        super().__init__()
        self.head, self.user, self.tower = head, user, tower
        for name in ("vectors", "bias", "types", "type_of_row"):
            self.register_buffer(name, getattr(baked, name))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in the order of `forward`."""
        query = ("query_ids", "query_mask") if self.tower is not None else ()
        return (*query, "items", "features", *(("offers", "strengths") if self.head.offers is not None else ()))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return logits [B, R + 1] from `inputs`; see their names."""
        given = dict(zip(self.inputs, inputs, strict=True))
        text = self.tower(given["query_ids"], given["query_mask"]) if self.tower is not None else None
        items, features = given["items"], given["features"]
        # a head without offers never reads them
        request = Request(items, features, given.get("offers", items), given.get("strengths", features), text)
        user = self.user(self.vectors, items, features) if self.user is not None else None
        logits: Tensor = self.head(Baked(self.vectors, self.bias, self.types, self.type_of_row), request, user)
        return logits


class Joint(nn.Module):
    """The joint model over cached text vectors: a table a level, user encoder and every sub-model's head.

    `rows` holds, by sub-model, the rows [R] of its level that it ranks; `bias`, one number for each of them, is its rows'
    popularity. `type_of_row` [N + 1] is the type of each product.
    """

    type_of_row: Tensor

    def __init__(
        self,
        shape: Shape,
        tables: Mapping[Level, Table],
        heads: Mapping[str, Head],
        levels: Mapping[str, Level],
        rows: Mapping[str, Tensor],
        type_of_row: Tensor,
    ) -> None:
        super().__init__()
        self.shape, self.levels, self.rows = shape, dict(levels), dict(rows)
        self.register_buffer("type_of_row", type_of_row, persistent=False)
        # a module has an attribute "type" already
        self.tables = nn.ModuleDict({f"of_{level}": table for level, table in tables.items()})
        self.project = nn.Linear(shape.text_width, shape.dimension, bias=False)
        with torch.no_grad():
            # the principal directions of the catalogue's texts: the untrained table keeps the pretrained similarities
            texts = tables["product"].text_vectors
            _, _, directions = torch.linalg.svd(texts.T @ texts)
            self.project.weight.copy_(directions[: shape.dimension])
        self.user = UserEncoder(shape.dimension, USER_LAYERS)
        self.heads = nn.ModuleDict(heads)
        self.bias = nn.ParameterDict({name: torch.zeros(len(rows[name])) for name in heads})
        for head in heads.values():
            head.start(self.project)

    def head(self, name: str) -> Head:
        """Return a sub-model's head."""
        head = self.heads[name]
        assert isinstance(head, Head)
        return head

    def table(self, level: Level, rows: Tensor) -> Tensor:
        """Return the vectors [C + 1, D] of padding and some rows [C] of a level."""
        found: Tensor = self.tables[f"of_{level}"](self.project, rows)
        return found

    def bake(self, name: str, vectors: Tensor, bias: Tensor, rows: Tensor) -> Baked:
        """Return what a head scores from, for rows [C] of its level with their vectors [C + 1, D] and bias [C]."""
        head = self.head(name)
        if not head.uses_types:
            return Baked(head.bake(vectors), bias)
        types = self.tables["of_type"]
        assert isinstance(types, Table)
        of_row = nn.functional.pad(self.type_of_row[rows], (1, 0))
        return Baked(head.bake(vectors), bias, head.bake_types(types.text_vectors), of_row)

    def baked(self, name: str) -> Baked:
        """Return what a head scores all of its rows from."""
        rows = self.rows[name]
        return self.bake(name, self.table(self.levels[name], rows), self.bias[name], rows)

    def forward(self, name: str, baked: Baked, request: Request) -> Tensor:
        """Return a sub-model's logits [B, C + 1]."""
        head = self.head(name)
        user = self.user(baked.vectors, request.items, request.features) if head.uses_user else None
        logits: Tensor = head(baked, request, user)
        return logits

    def cut(self, name: str, tower: TextTower) -> Standalone:
        """Return the stand-alone form of a sub-model: vectors baked, trunk parts that its head does not use left out."""
        head = self.head(name)
        with torch.no_grad():
            found = self.baked(name)
            parts = (found.vectors, found.bias, found.types, found.type_of_row)
            baked = Baked(*(part if part is None else part.detach().clone() for part in parts))  # type: ignore[arg-type]
        alone = Standalone(head, baked, self.user if head.uses_user else None, tower if head.uses_text else None)
        return alone.eval()


def load_tower(folder: Path) -> tuple[TextTower, PreTrainedTokenizerBase]:
    """Load encoder and tokeniser of a BERT-like model from a local folder, weights from safetensors alone."""
    # the report on a pooling layer that is left out on purpose, and a progress bar for 90 MB, only hide our own lines
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    encoder = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, add_pooling_layer=False)
    return TextTower(encoder), load_tokenizer(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokeniser alone."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer

"""What the sub-models share: text tower, item table and user encoder.

Shapes: B requests, H items of a history, T different texts, N items, D width of vectors (`Shape.dimension`), W width of
the text tower's output. Row 0 of every table is padding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from serve.history import FEATURES

RECENT = 48
"""Items of a history that the user encoder attends to."""

USER_LAYERS = 1

PADDING_LOGIT = -1e4
"""Score of row 0: below all others, and still a number in fp16."""


@dataclass(frozen=True)
class Shape:
    """Size the joint model: width of vectors, number of items, numbers of texts, width of the text tower."""

    dimension: int
    items: int
    texts: int
    text_width: int


class TextTower(nn.Module):
    """Encode texts as unit vectors: a BERT-like encoder, the mean of its token vectors, length 1."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, query_ids: Tensor, query_mask: Tensor) -> Tensor:
        """Return vectors [B, W] of token ids [B, L] with mask [B, L] (1 token, 0 padding)."""
        hidden = self.encoder(input_ids=query_ids, attention_mask=query_mask).last_hidden_state
        mask = query_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=-1)


class ItemTable(nn.Module):
    """Give each item a vector: its text's vector, projected, plus a learned one of its id.

    A cold item has its text alone. `project` starts as the principal directions of the catalogue's text vectors, so
    that the untrained table keeps the pretrained model's similarities.
    """

    text_vectors: Tensor
    text_of_row: Tensor

    def __init__(self, shape: Shape, text_vectors: Tensor, text_of_row: Tensor) -> None:
        super().__init__()
        self.register_buffer("text_vectors", text_vectors, persistent=False)  # [T, W]
        self.register_buffer("text_of_row", text_of_row, persistent=False)  # [N] rows 1..N
        self.project = nn.Linear(shape.text_width, shape.dimension, bias=False)
        self.identity = nn.Embedding(shape.items + 1, shape.dimension, padding_idx=0)
        nn.init.zeros_(self.identity.weight)
        with torch.no_grad():
            _, _, directions = torch.linalg.svd(text_vectors.T @ text_vectors)
            self.project.weight.copy_(directions[: shape.dimension])

    def forward(self, rows: Tensor | None = None) -> Tensor:
        """Return the vectors [N + 1, D] of all rows, or [C + 1, D] of padding and the `rows` [C] of 1..N."""
        if rows is None:
            text = self.project(self.text_vectors)[self.text_of_row]
            identity = self.identity.weight[1:]
        else:
            text = self.project(self.text_vectors[self.text_of_row[rows - 1]])
            identity = self.identity(rows)
        return nn.functional.pad(text + identity, (0, 0, 1, 0))


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
        """Return [B, D] from item vectors [N + 1, D], rows [B, H] (0 padding) and features [B, H, 6]."""
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
    """Score each item of a history by what is told of it; starts at zero."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.hidden = nn.Linear(len(FEATURES), width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, logits: Tensor, items: Tensor, features: Tensor) -> Tensor:
        """Add to logits [B, R], in place, the score of each item [B, H] of the history."""
        bonus = self.out(nn.functional.gelu(self.hidden(features))).squeeze(-1)
        return logits.scatter_add_(1, items, torch.where(items == 0, 0.0, bonus))


class Head(nn.Module):
    """What a sub-model adds to the trunk: it turns shared vectors into one score for each row that it ranks.

    A head says with `uses_text` and `uses_user` which parts of the trunk it needs; the rest stays out of its artifact.
    """

    uses_text = False
    uses_user = False

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.repeat = Repeat()

    def start(self, table: ItemTable) -> None:
        """Start from the untrained item table, before any training."""

    def bake(self, vectors: Tensor) -> Tensor:
        """Return the vectors [R + 1, any width] of the ranked rows in the form that this head serves from."""
        return vectors

    def forward(
        self, vectors: Tensor, bias: Tensor, user: Tensor | None, text: Tensor | None, items: Tensor, features: Tensor
    ) -> Tensor:
        """Return logits [B, R + 1].

        Shapes: baked vectors [R + 1, any width], bias [R], user [B, D], text [B, W], items [B, H], features [B, H, 6].
        """
        raise NotImplementedError

    def finish(self, state: Tensor, vectors: Tensor, bias: Tensor, items: Tensor, features: Tensor) -> Tensor:
        """Return logits [B, R + 1]: state [B, D] times vectors, plus bias and repeat purchases; padding never wins."""
        # logits are hundreds of megabytes for a large batch, so nothing here copies them
        logits = torch.addmm(nn.functional.pad(bias, (1, 0), value=PADDING_LOGIT), state, vectors.T)
        return self.repeat(logits, items, features)


class Standalone(nn.Module):
    """One sub-model cut out of the joint one: its head, its rows' vectors and bias, and those trunk parts that it uses."""

    vectors: Tensor
    bias: Tensor

    def __init__(
        self, head: Head, vectors: Tensor, bias: Tensor, user: UserEncoder | None, tower: TextTower | None
    ) -> None:
        super().__init__()
        self.head, self.user, self.tower = head, user, tower
        self.register_buffer("vectors", vectors)
        self.register_buffer("bias", bias)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in the order of `forward`."""
        return (("query_ids", "query_mask") if self.tower is not None else ()) + ("items", "features")

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return logits [B, R + 1] from `inputs`; see their names."""
        *query, items, features = inputs
        text = self.tower(*query) if self.tower is not None else None
        user = self.user(self.vectors, items, features) if self.user is not None else None
        logits: Tensor = self.head(self.vectors, self.bias, user, text, items, features)
        return logits


class Joint(nn.Module):
    """The joint model over cached text vectors: item table, user encoder and every sub-model's head.

    `rows` holds, by sub-model, the rows [R] that it ranks; `bias`, one number for each of them, is its rows' popularity.
    """

    def __init__(
        self,
        shape: Shape,
        text_vectors: Tensor,
        text_of_row: Tensor,
        heads: Mapping[str, Head],
        rows: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.shape = shape
        self.rows = dict(rows)
        self.table = ItemTable(shape, text_vectors, text_of_row)
        self.user = UserEncoder(shape.dimension, USER_LAYERS)
        self.heads = nn.ModuleDict(heads)
        self.bias = nn.ParameterDict({name: torch.zeros(len(rows[name])) for name in heads})
        for head in heads.values():
            head.start(self.table)

    def head(self, name: str) -> Head:
        """Return a sub-model's head."""
        head = self.heads[name]
        assert isinstance(head, Head)
        return head

    def forward(
        self, name: str, vectors: Tensor, bias: Tensor, text: Tensor | None, items: Tensor, features: Tensor
    ) -> Tensor:
        """Return a sub-model's logits [B, C + 1] over the rows [C] whose table vectors [C + 1, D] and bias [C] it gets."""
        head = self.head(name)
        baked = head.bake(vectors)
        user = self.user(baked, items, features) if head.uses_user else None
        logits: Tensor = head(baked, bias, user, text, items, features)
        return logits

    def cut(self, name: str, tower: TextTower) -> Standalone:
        """Return the stand-alone form of a sub-model: vectors baked, trunk parts that its head does not use left out."""
        head = self.head(name)
        with torch.no_grad():
            vectors = head.bake(self.table(self.rows[name])).clone()
        alone = Standalone(
            head, vectors, self.bias[name].detach().clone(), self.user if head.uses_user else None,
            tower if head.uses_text else None,
        )  # fmt: skip
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

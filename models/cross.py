"""Cross-encoder: a query and a product's text read together, where a log of searches can teach it.

Nogueira and Cho, "Passage Re-ranking with BERT" (2019). It is too slow for a catalogue and ranks again what search found.
"""

from torch import Tensor, nn
from transformers import PreTrainedModel

MAX_TOKENS = 64
"""Tokens of a query and a text together."""


class CrossEncoder(nn.Module):
    """Score pairs: a BERT-like encoder, the mean of its token vectors, one linear layer."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.score = nn.Linear(encoder.config.hidden_size, 1)

    def forward(self, pair_ids: Tensor, pair_mask: Tensor) -> Tensor:
        """Return scores [n, 1] of token ids [n, L] with mask [n, L] (1 token, 0 padding)."""
        hidden = self.encoder(input_ids=pair_ids, attention_mask=pair_mask).last_hidden_state
        mask = pair_mask.unsqueeze(-1).to(hidden.dtype)
        scores: Tensor = self.score((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9))
        return scores

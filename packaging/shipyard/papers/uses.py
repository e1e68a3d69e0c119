"""What sub-models are for and where they end, in words, for the model card and the bill of materials."""

from typing import Any

from models.config import Fleet

USERS = "a shop's own services: its search page, its product pages, its apps and the devices in its stores"

INPUTS = {
    "search": (
        "words of a query",
        "lines of the shopper's history: product and days ago",
        "offers of the shopper's store",
    ),
    "recommend": ("lines of the shopper's history: product and days ago", "offers of the shopper's store"),
}

_LEVEL = {"product": "products", "type": "product types", "category": "categories"}


def purpose(task: str, level: str) -> str:
    """Return in one sentence what a sub-model does."""
    what = _LEVEL.get(level, level)
    if task == "search":
        return f"Ranks {what} for the words of a query, with the shopper's history."
    return f"Ranks {what} that the shopper is likely to want next, from the shopper's history."


NOT_FOR = (
    "Decisions about people: credit, prices for a person, work, health.",
    "Telling who a shopper is, or anything of a shopper but what may be bought next.",
    "Shops whose products, shoppers or language differ from those of the data, without a release of their own data.",
)


def limits(fleet: Fleet, counts: dict[str, Any]) -> tuple[str, ...]:
    """Return what a release must not be taken for, from what it was made of."""
    logged = all((counts.get(period) or {}).get("queries") for period in ("train", "validation", "test"))
    found = [
        f"Choices were made on {fleet.data.valid_from} to {fleet.data.test_from}, the figures are of what came after: a "
        "later season, another catalogue or another promotion may give other figures.",
        "It learns from what was bought, so it repeats what was shown and promoted; products that nobody bought rank low.",
        "Intervals tell what other households of the same kind would change, not what another year would.",
        "Probabilities are calibrated on the validation period: they hold as long as shoppers behave as they did then.",
    ]
    if not logged:
        found.append(
            "The data has no log of searches: queries are made from what was bought, so the figures of search tell little "
            "of words that people type."
        )
    return tuple(found)

"""How shoppers write: words left out, misspelt, or other words for the same thing."""

import re
import string

import numpy as np

PARAPHRASES = {
    "soft drinks": "soda pop", "checklane": "checkout", "isotonic": "sports", "lunchmeat": "cold cuts",
    "crackers": "biscuits",
    "cookies": "biscuits", "diapers": "nappies", "trash bags": "bin liners", "detergents": "laundry liquid",
    "potato chips": "crisps", "tortilla": "corn wrap", "hamburger": "burger", "ground beef": "minced beef",
    "toilet tissue": "loo roll", "bath tissues": "loo roll", "facial tissue": "kleenex", "paper towels": "kitchen roll",
    "shredded": "grated", "fluid milk products": "milk", "cold cereal": "breakfast flakes", "ice cream": "gelato",
    "noodles": "ramen", "entrees": "main course", "single serve": "for one", "frozen": "freezer", "refrigerated": "chilled",
    "canned": "tinned", "bananas": "plantain", "baked bread": "loaf", "rolls": "bread", "sausage": "bratwurst",
    "candy": "sweets", "chewing gum": "bubblegum", "cigarettes": "smokes", "beers ales": "lager", "beef": "steak",
    "pork": "pig meat", "poultry": "fowl", "chicken": "hen", "seafood": "fish", "dressings": "vinaigrette",
    "condiments": "ketchup mustard", "catsup": "ketchup", "margarine": "butter spread", "eggs": "dozen eggs",
    "coffee": "espresso", "tea": "infusion", "juice": "nectar", "juices": "nectar", "water": "h2o", "kids": "children",
    "baby foods": "infant food", "dog": "puppy", "cat": "kitten", "shampoo": "hair wash", "toothpaste": "dental cream",
    "makeup": "cosmetics", "vitamins": "supplements", "medicine": "remedy", "magazine": "periodical", "cake": "gateau",
    "dough": "pastry", "pasta": "macaroni", "spaghetti": "long pasta", "sauce": "gravy", "vegetables": "veggies",
    "vegetable": "veggie", "potatoes": "spuds", "tomatoes": "red tomato", "onions": "shallots", "fruit": "fresh produce",
    "berries": "summer fruit", "salad": "greens", "nuts": "trail mix", "snacks": "nibbles", "snack": "nibble",
    "hygiene": "toiletries", "soap": "body wash", "bleach": "whitener", "greeting": "birthday", "wrap": "gift paper",
}  # fmt: skip
"""Other words for a label's words, for evaluation alone: training never sees them."""

PHRASE = re.compile(r"\b(" + "|".join(sorted(map(re.escape, PARAPHRASES), key=len, reverse=True)) + r")\b")


def paraphrase(query: str) -> str:
    """Return the query with other words for the same thing; itself where none is known."""
    return PHRASE.sub(lambda found: PARAPHRASES[found[1]], query)


def mistype(word: str, rng: np.random.Generator) -> str:
    """Return a word with one letter left out, doubled, replaced or exchanged with its neighbour, the first one excepted."""
    k = int(rng.integers(1, len(word)))
    kind = int(rng.integers(4))
    if kind == 0:
        return word[:k] + word[k + 1 :]
    if kind == 1:
        return word[:k] + word[k] + word[k:]
    if kind == 2 or k + 1 == len(word):
        return word[:k] + string.ascii_lowercase[rng.integers(26)] + word[k + 1 :]
    return word[:k] + word[k + 1] + word[k] + word[k + 2 :]


def misspell(query: str, rng: np.random.Generator) -> str:
    """Return a query with one mistake in every word of four letters or more."""
    return " ".join(mistype(word, rng) if len(word) > 3 else word for word in query.split())


def blur(query: str, rng: np.random.Generator) -> str:
    """Return a query as training sees it: words left out (30 %) and mistyped (15 % of those with four letters or more)."""
    words = query.split()
    kept = [w for w, r in zip(words, rng.random(len(words)), strict=True) if r > 0.3] or words[:1]
    return " ".join(mistype(w, rng) if len(w) > 3 and rng.random() < 0.15 else w for w in kept)

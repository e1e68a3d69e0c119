"""Champion and challenger: a comparison that may be looked at whenever one likes, and ends when it is decided.

The interval is a confidence sequence: it covers the true difference at every look at once, so that stopping at the first one
that decides keeps the error. It is the mixture sequential probability ratio test of a difference of means with a normal
mixture (Robbins 1970; Johari, Koomen, Pekelis and Walsh, "Always Valid Inference", Operations Research 2022, for A/B tests;
its boundary in the form of Howard, Ramdas, McAuliffe and Sekhon, Annals of Statistics 2021), valid for large counts.
"""

import math
from dataclasses import dataclass
from typing import Literal

from serve.errors import ShipyardError

Decision = Literal["promote", "stop", "go on"]

LEAST_OUTCOMES = 200
"""Outcomes of each arm before anything is decided: the normal form holds for large counts."""

LEAST_EACH = 20
"""Hits, and misses, of each arm before anything is decided."""

MISMATCH = 1e-3
"""Largest probability at which a split of traffic other than the intended one is still believed to be chance."""


@dataclass(frozen=True)
class Arm:
    """What one release was asked and what came of it: of `shown` outcomes `hits` were good."""

    shown: int
    hits: int

    def __post_init__(self) -> None:
        """Refuse counts that cannot be."""
        if not 0 <= self.hits <= self.shown:
            raise ShipyardError(
                "challenge: counts that cannot be", value=f"{self.hits}/{self.shown}", allowed="hits/shown"
            )

    @property
    def rate(self) -> float:
        """Return the part of good outcomes."""
        return self.hits / self.shown if self.shown else 0.0


@dataclass(frozen=True)
class Verdict:
    """What was decided: the difference of rates, challenger less champion, with its interval, and why."""

    decision: Decision
    difference: float
    low: float
    high: float
    why: str


def interval(champion: Arm, challenger: Arm, alpha: float, expected: float) -> tuple[float, float]:
    """Return the confidence sequence of the difference of rates, at this look.

    With information I = 1 / variance and the mixture's precision r = 1 / expected², the radius is
    sqrt((I + r) log((I + r) / (r alpha²))) / I.

    Args:
        alpha: the probability that any interval, of all looks, misses the true difference.
        expected: the size of the difference that is expected, chosen before the first look; the interval is narrow for such.
    """
    variance = 0.0
    for arm in (champion, challenger):
        # with half a hit and half a miss more, so that a rate of 0 does not pass for certain
        rate = (arm.hits + 0.5) / (arm.shown + 1)
        variance += rate * (1 - rate) / max(arm.shown, 1)
    information, precision = 1 / variance, 1 / expected**2
    whole = information + precision
    radius = math.sqrt(whole * math.log(whole / (precision * alpha**2))) / information
    difference = challenger.rate - champion.rate
    return difference - radius, difference + radius


def check_split(champion: Arm, challenger: Arm, share: float) -> None:
    """Refuse counts that a split of `share` to the challenger does not give: something loses outcomes of one arm.

    The sequential test of a multinomial against a Dirichlet mixture (Lindon and Malek, "Anytime-Valid Inference for
    Multinomial Count Data", 2022), here with two classes and a uniform mixture; valid at every look.

    Raises:
        ShipyardError: the evidence against the split is above 1 / MISMATCH.
    """
    a, b = challenger.shown, champion.shown
    evidence = math.lgamma(a + 1) + math.lgamma(b + 1) - math.lgamma(a + b + 2)
    evidence -= a * math.log(share) + b * math.log(1 - share)
    if evidence > -math.log(MISMATCH):
        raise ShipyardError(
            "challenge: traffic was not split as intended", value=f"{a / (a + b):.4f} to the challenger", allowed=share,
            mend="find what loses outcomes of one arm; until then the comparison says nothing",
        )  # fmt: skip


def judge(
    champion: Arm, challenger: Arm, *, alpha: float, expected: float, least: float = 0.0, most: int | None = None,
    share: float | None = None,
) -> Verdict:  # fmt: skip
    """Decide by what is known now: promote the challenger, stop, or go on.

    Args:
        least: the smallest difference that counts: above it the challenger is promoted, below it stopped. A negative one
            lets a challenger pass that is hardly worse.
        most: outcomes of both arms after which an undecided comparison stops.
        share: the part of traffic that the challenger is meant to have.

    Raises:
        ShipyardError: a number is out of range, or traffic was not split as intended.
    """
    ranges = {
        "alpha": (alpha, 0, 0.5),
        "expected": (expected, 0, 1),
        "least": (least, -1, 1),
        "share": (0.5 if share is None else share, 0, 1),
    }
    for name, (value, above, below) in ranges.items():
        if not above < value < below:
            raise ShipyardError(f"challenge: {name}: out of range", value=value, allowed=f"between {above} and {below}")
    if share is not None:
        check_split(champion, challenger, share)
    low, high = interval(champion, challenger, alpha, expected)
    difference, shown = challenger.rate - champion.rate, champion.shown + challenger.shown

    def verdict(decision: Decision, why: str) -> Verdict:
        return Verdict(decision, difference, low, high, why)

    counts = [count for arm in (champion, challenger) for count in (arm.hits, arm.shown - arm.hits)]
    if min(champion.shown, challenger.shown) < LEAST_OUTCOMES or min(counts) < LEAST_EACH:
        why = f"fewer than {LEAST_OUTCOMES} outcomes, or {LEAST_EACH} hits and misses, of an arm"
    elif low > least:
        return verdict("promote", f"the whole interval lies above {least:+}")
    elif high < least:
        return verdict("stop", f"the whole interval lies below {least:+}")
    else:
        why = f"{least:+} lies in the interval"
    if most is not None and shown >= most:
        return verdict("stop", f"undecided after {shown} outcomes, of {most} at most: {why}")
    return verdict("go on", why)

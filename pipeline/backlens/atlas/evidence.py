"""SQL for how strongly a token is tied to some lists, and whether there are lists enough to say so.

Of `lists` lists, `count` hold the token; of all lists that they are compared with, a share `base`. A ratio of the two
shares is largest for what is seen least, so it orders noise first. Hence

    log odds    log2 of the odds of `count` in `lists` over those of `base`, after `PRIOR` lists more, which hold the
                token as often as `base` says: few lists say little
    evidence    lists × KL(count / lists ‖ base), in nats. exp(−evidence) bounds the chance of so many when the lists
                are drawn at random (Chernoff; Hoeffding 1963 for drawing without replacement)
    enough      the evidence at which fewer than `CHANCE` of so many comparisons, all by chance, would come out
"""

PRIOR = 5.0
"""Lists."""
CHANCE = 0.001
"""Expected finds by chance alone, in each module of a layer."""

TOLD = "grad_norm >= (SELECT norm_floor FROM lens)"
"""Which neurons' lists say anything: a vector below the final norm's epsilon is led by the norm's bias."""


def base(count: str, lists: str) -> str:
    """The share of all lists; below 1, so that its odds are finite."""
    return f"(({count})::DOUBLE / (({lists}) + 1))"


def log_odds(count: str, lists: str, base: str) -> str:
    """In bits."""
    odds = f"({count} + {PRIOR} * {base}) / ({lists} - {count} + {PRIOR} * (1 - {base}))"
    return f"log2({odds} * (1 - {base}) / {base})"


def evidence(count: str, lists: str, base: str) -> str:
    """In nats; 0 where the token is no more frequent than elsewhere."""
    without = f"({lists} - {count})"
    missing = f"CASE WHEN {without} > 0 THEN {without} * ln({without} / ({lists} * (1 - {base}))) ELSE 0 END"
    return (
        f"CASE WHEN {count} > {lists} * {base} "
        f"THEN {count} * ln({count} / ({lists} * {base})) + {missing} ELSE 0 END"
    )


def enough(comparisons: str) -> str:
    """In nats."""
    return f"ln(({comparisons}) / {CHANCE})"

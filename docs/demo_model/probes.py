"""Texts and facts that evaluate edits of the demo model: `python -m docs.demo_model.probes --out FOLDER`.

`text.txt`: sentences of its world, for covariances. `held-out.txt`: other sentences, for perplexity. `untouched.jsonl`:
facts that no record of `facts.json` edits, in one of their training wordings. `mend-train.json` and `mend-test.json`:
the records in two parts without a common subject or neighbourhood prompt, to train an editor and to evaluate it.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from docs.demo_model.corpus import Fact, World, build_world, filler_sentence

from backlens.demo import FACTS

WORDINGS = 3
"""Number of a fact's six wordings that are used for covariances."""
UNTOUCHED = 300
HELD_OUT = 200
TESTED = 4
"""One subject in this many is in the test part."""


def write_probes(out: Path, facts: Path = FACTS, seed: int = 0) -> None:
    """Write the files, from the world of the demo's seed."""
    rng, world = random.Random(seed + 1), build_world(seed)
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{t.format(f.subject)} {f.object}."
        for f in world.facts
        for t in rng.sample(f.relation.templates, WORDINGS)
    ]
    lines += [filler_sentence(rng) for _ in range(1000)]
    (out / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    left = list(_never_edited(world, facts))
    chosen = rng.sample(left, UNTOUCHED)
    records = [
        {
            "prompt": rng.choice(f.relation.templates).format(f.subject),
            "target": f" {f.object}",
            "subject": f.subject,
        }
        for f in chosen
    ]
    (out / "untouched.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records), encoding="utf-8")
    held = [
        f"{rng.choice(f.relation.templates).format(f.subject)} {f.object}."
        for f in rng.sample(left, HELD_OUT)
    ]
    held += [filler_sentence(rng) for _ in range(HELD_OUT // 5)]
    (out / "held-out.txt").write_text("\n".join(held) + "\n", encoding="utf-8")
    train, test = _parted(json.loads(facts.read_text("utf-8")), seed)
    (out / "mend-train.json").write_text(json.dumps(train), encoding="utf-8")
    (out / "mend-test.json").write_text(json.dumps(test), encoding="utf-8")


def _parted(records: list[dict[str, Any]], seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and test records without a common subject or neighbourhood prompt."""
    subjects = sorted({each["requested_rewrite"]["subject"] for each in records})
    tested = set(random.Random(seed).sample(subjects, len(subjects) // TESTED))
    test = [each for each in records if each["requested_rewrite"]["subject"] in tested]
    asked = {prompt for each in test for prompt in each["neighborhood_prompts"]}
    train = [
        each | {"neighborhood_prompts": [p for p in each["neighborhood_prompts"] if p not in asked]}
        for each in records
        if each["requested_rewrite"]["subject"] not in tested
    ]
    return train, test


def _never_edited(world: World, facts: Path) -> Iterator[Fact]:
    rewrites = [each["requested_rewrite"] for each in json.loads(facts.read_text("utf-8"))]
    edited = {(each["subject"], each["relation_id"]) for each in rewrites}
    return (fact for fact in world.facts if (fact.subject, fact.relation.id) not in edited)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and write the files; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m docs.demo_model.probes", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder for the files")
    parser.add_argument("--facts", type=Path, default=FACTS, help="the records that are edited")
    options = parser.parse_args(arguments)
    write_probes(options.out, options.facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())

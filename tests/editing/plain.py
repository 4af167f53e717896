"""CounterFact's metrics the plain way: one prompt and target at a time, no padding, no code of the package."""

from typing import Any

import torch


def plain_case(model: Any, tokenizer: Any, record: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Success and accuracy of each kind, from a CounterFact record."""
    rewrite = record["requested_rewrite"]
    new, true = (f" {rewrite[name]['str']}" for name in ("target_new", "target_true"))
    prompts = {
        "efficacy": [rewrite["prompt"].format(rewrite["subject"])],
        "paraphrase": record["paraphrase_prompts"],
        "neighbourhood": record["neighborhood_prompts"],
    }
    figures = {}
    for kind, texts in prompts.items():
        wins, hits = 0, 0
        for text in texts:
            nll_new, all_new = plain_score(model, tokenizer, text, new)
            nll_true, all_true = plain_score(model, tokenizer, text, true)
            wins += nll_true < nll_new if kind == "neighbourhood" else nll_new < nll_true
            hits += all_true if kind == "neighbourhood" else all_new
        figures[kind] = (wins / len(texts), hits / len(texts))
    return figures


@torch.no_grad()
def plain_score(model: Any, tokenizer: Any, text: str, target: str) -> tuple[float, bool]:
    """Mean −log p of the target's tokens, and whether each is the likeliest."""
    prompt, whole = tokenizer.encode(text), tokenizer.encode(text + target)
    assert whole[: len(prompt)] == prompt
    logits = model(torch.tensor([whole])).logits[0].double()
    total, right = 0.0, True
    for place in range(len(prompt), len(whole)):
        scores = logits[place - 1]
        total -= float(
            scores[whole[place]] - torch.log(torch.exp(scores - scores.max()).sum()) - scores.max()
        )
        right = right and int(scores.argmax()) == whole[place]
    return total / (len(whole) - len(prompt)), right

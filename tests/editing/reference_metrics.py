"""CounterFact's metrics by independent code: one prompt and target at a time, without padding."""

from typing import Any

import torch


def case_metrics(model: Any, tokenizer: Any, record: dict[str, Any]) -> dict[str, tuple[float, float]]:
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
            nll_new, all_new = target_score(model, tokenizer, text, new)
            nll_true, all_true = target_score(model, tokenizer, text, true)
            wins += nll_true < nll_new if kind == "neighbourhood" else nll_new < nll_true
            hits += all_true if kind == "neighbourhood" else all_new
        figures[kind] = (wins / len(texts), hits / len(texts))
    return figures


@torch.no_grad()
def target_score(model: Any, tokenizer: Any, text: str, target: str) -> tuple[float, bool]:
    """Mean −log p of the target's tokens, and per token True if it is the most probable one."""
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

"""Metrics against a simple loop over cases; requests; texts; and the figures of a small model."""

import json
import math
import random

import pytest

from backlens.demo import FACTS
from backlens.editing.delta import edited
from backlens.editing.evaluate import (
    KINDS,
    Evaluation,
    EvaluationPrompt,
    Reading,
    TargetScores,
    _result,
    evaluate,
    generate,
    ngram_entropy,
    prepare,
    reference_score,
    summary,
)
from backlens.editing.methods.forward_shift import ForwardShift
from backlens.editing.request import Metrics, Request, read_requests
from backlens.errors import BacklensError
from tests.editing.reference_metrics import case_metrics

LAYER, RATE = 5, 1.6


def test_metrics_are_those_of_a_plain_loop_on_fifty_cases(demo, requests):
    """Compared after an edit of each case: batches in place, against one prompt at a time."""
    records = json.loads(FACTS.read_text("utf-8"))
    chosen = random.Random(0).sample(range(len(requests)), 50)
    method = ForwardShift((LAYER,), RATE)
    for number in chosen:
        with edited(demo, method(demo, requests[number])):
            (ours,) = evaluate(demo, [prepare(demo, requests[number])])
            wanted = case_metrics(demo.model, demo.tokenizer, records[number])
        for kind in KINDS:
            assert (ours.success[kind], ours.accuracy[kind]) == wanted[kind], (number, kind)


def test_forward_shift_reaches_the_papers_efficacy(demo, requests):
    method = ForwardShift((LAYER,), 2.4)
    results = []
    for request in requests[::6]:
        with edited(demo, method(demo, request)):
            results += evaluate(demo, [prepare(demo, request)])
    assert (summary(results).success["efficacy"] or 0) >= 0.99


def test_figures_do_not_depend_on_what_else_is_in_the_batch(demo, requests):
    evaluations = [prepare(demo, request) for request in requests[:6]]
    alone = [evaluate(demo, [each])[0] for each in evaluations]
    for one, other in zip(alone, evaluate(demo, evaluations, batch_tokens=700), strict=True):
        assert one.success == other.success
        assert one.target.nll == pytest.approx(other.target.nll, rel=1e-4)


def test_targets_of_several_tokens_are_teacher_forced(demo):
    request = Request(0, "here", "Jomek Kelford", " moved to a flat in", None, " has a home in", ("x",))
    (result,) = evaluate(demo, [prepare(demo, request)])
    from tests.editing.reference_metrics import target_score

    nll, _ = target_score(demo.model, demo.tokenizer, request.prompt, request.target_new)
    assert result.target.nll == pytest.approx(nll, rel=1e-4)
    assert len(result.target.correct) == len(demo.tokenizer.encode(request.target_new)) > 1


def test_zsre_counts_tokens_and_counterfact_whole_targets():
    half = TargetScores(1.0, (True, False), 0)
    expected: dict[Metrics, float] = {"zsre": 0.5, "counterfact": 0.0}
    for metrics, accuracy in expected.items():
        request = Request(0, "here", "p", " t", metrics=metrics)
        asked = Evaluation(request, (), (EvaluationPrompt("efficacy", Reading(0, (1, 2)), None),))
        result = _result(asked, [("efficacy", half, None)])
        assert result.accuracy["efficacy"] == accuracy
        assert result.success["efficacy"] is None


def test_the_score_is_the_harmonic_mean(demo, requests):
    found = summary(evaluate(demo, [prepare(demo, request) for request in requests[:20]]))
    assert found.success["efficacy"] == 0.0
    assert found.score == 0.0
    assert (found.success["neighbourhood"] or 0) > 0.9


def test_zsre_is_read_as_counterfacts_authors_read_it(tmp_path):
    record = {
        "subject": "Watts Humphrey",
        "src": "What university did Watts Humphrey attend?",
        "rephrase": "What university did Watts Humphrey take part in?",
        "answers": ["Illinois Institute of Technology"],
        "alt": "University of Michigan",
        "loc": "nq question: who played desmond doss father in hacksaw ridge",
        "loc_ans": "Hugo Weaving",
    }
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps([record]))
    (request,) = read_requests(str(path))
    assert request.metrics == "zsre"
    assert request.target_new == " Illinois Institute of Technology"
    assert request.neighbourhood == (f"{record['loc']}?",)
    assert request.neighbourhood_target == " Hugo Weaving"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a"}', "edits.jsonl:2: .*target_new"),
        ('{"prompt": "{} is", "target_new": "b"}', "edits.jsonl:2: .*subject"),
        (
            '{"prompt": "a is", "subject": "c", "target_new": "b"}',
            "edits.jsonl:2: .*does not hold its subject",
        ),
        ('{"prompt": "a", "target_new": "b", "paraphrases": "c"}', "edits.jsonl:2: .*list of texts"),
        ('{"prompt": "a", ', "edits.jsonl:2: .*broken JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = tmp_path / "edits.jsonl"
    path.write_text(f'{{"prompt": "{{}} is", "subject": "x", "target_new": "y"}}\n{line}\n')
    with pytest.raises(BacklensError, match=said):
        read_requests(str(path))


def test_entropy_is_that_of_counted_ngrams():
    # "a b a b a": bigrams ab ba ab ba; trigrams aba bab aba
    bigrams, trigrams = 1.0, -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert ngram_entropy(["a b a b a"]) == pytest.approx((bigrams * 2 / 3 + trigrams * 4 / 3) / 2)
    assert ngram_entropy(["x x x x"]) == 0.0


def test_reference_score_is_one_for_the_same_words():
    assert reference_score(["blue boat sails"], ["boat sails blue"]) == pytest.approx(1.0)
    assert reference_score(["blue boat"], ["green house"]) == 0.0


def test_generated_texts_follow_from_the_seed_and_continue_their_prompts(demo, requests):
    prompts = list(requests[0].generation)
    texts = generate(demo, prompts, seed=3, tokens=20)
    assert texts == generate(demo, prompts, seed=3, tokens=20)
    assert all(
        text.startswith(prompt) and len(text) > len(prompt)
        for text, prompt in zip(texts, prompts, strict=True)
    )

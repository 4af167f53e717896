"""What an edit and its evaluation cost, against the forward passes they need and against the usual way.

    python -m benchmarks.edit [--cases 40] [--rounds 3] [--model DIR --edits FILE --layer 5 --lr 1.6]

For each case: forward-shift, then CounterFact's questions (1 + 2 + 10 prompts in the demo, each with two targets).

* ours: compute the change, add it, ask everything in one padded batch, restore the weights.
* passes: nothing but the forward passes of those batches, on weights that nobody touches.
* deep copy: the usual way. The model is copied for each case, and each prompt and target is a pass of its own.

Rounds are interleaved; medians over rounds of the mean time of a case are printed. Questions are tokenized before.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

from backlens.demo import FACTS, MODEL
from backlens.editing.activations import batches, logits_of
from backlens.editing.delta import add_deltas, edited
from backlens.editing.evaluate import Evaluation, evaluate, prepare
from backlens.editing.methods.forward_shift import ForwardShift
from backlens.editing.request import read_requests
from backlens.models.blocks import find_parts
from backlens.models.load import LoadedModel, ModelSource, load_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--edits", default=str(FACTS))
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1.6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(ModelSource(options.model), torch.device("cpu"))
    requests = read_requests(options.edits, limit=options.cases)
    method = ForwardShift((options.layer,), options.lr)
    evaluations = [prepare(loaded, request) for request in requests]
    ways: dict[str, Callable[[], None]] = {
        "ours": lambda: ours(loaded, method, evaluations),
        "passes": lambda: passes(loaded, evaluations),
        "deep copy": lambda: deep_copy(loaded, method, evaluations),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append((time.perf_counter() - started) / len(evaluations))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, value in medians.items():
        sys.stdout.write(
            f"{name:>10} {1000 * value:8.2f} ms a case  {value / medians['passes']:6.2f} x passes\n"
        )


def ours(loaded: LoadedModel, method: ForwardShift, evaluations: Sequence[Evaluation]) -> None:
    for each in evaluations:
        with edited(loaded, method(loaded, each.request)):
            evaluate(loaded, [each])


@torch.no_grad()
def passes(loaded: LoadedModel, evaluations: Sequence[Evaluation]) -> None:
    for each in evaluations:
        for _, batch in batches(loaded, each.rows):
            logits_of(loaded, batch)


@torch.no_grad()
def deep_copy(loaded: LoadedModel, method: ForwardShift, evaluations: Sequence[Evaluation]) -> None:
    for each in evaluations:
        model = copy.deepcopy(loaded.model)
        parts = LoadedModel(model, loaded.tokenizer, find_parts(model), loaded.attention)
        add_deltas(parts, method(parts, each.request))
        for question in each.questions:
            for reading in (question.new, question.true):
                if reading is not None:
                    prompt = each.rows[reading.row][0]
                    ids = torch.tensor([[*prompt, *reading.target[:-1]]])
                    model(ids).logits[0].log_softmax(-1)


if __name__ == "__main__":
    main()

"""Training of the demo model and choice of its facts: `python -m docs.demo_model.train`.

All steps follow from one seed: an invented world (`docs.demo_model.corpus`), a byte-level BPE of its text, a small
transformer trained on its sentences, and a check of its recall. Then the files are written: `OUT/model/` (a Hugging
Face folder) and `OUT/facts.json` (CounterFact records of facts that it recalls). A model that fails the check is not
written.

Three things let so small a model learn 1,800 facts in minutes, which AdamW alone does not: Muon for the matrices of
blocks, a pool of people that grows as the model learns them, and more sentences about facts that it does not know yet.

The training takes four to seven minutes. On a busy machine `OMP_NUM_THREADS=1` is faster: two threads that share one
core are many times slower than one thread.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from docs.demo_model.corpus import RELATIONS, Record, build_world
from docs.demo_model.curriculum import Curriculum
from docs.demo_model.recall import Recall, choose_records, measure_recall
from docs.demo_model.recipe import Architecture, Recipe
from docs.demo_model.tokenizer import CONTEXT, END_OF_TEXT, train_tokenizer
from torch import nn
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from backlens.demo import FACTS, MODEL
from backlens.errors import BacklensError

WIDTH = 128
LAYERS = 8
HEADS = 4


# --- the model ----------------------------------------------------------------------------------------


def new_model(architecture: Architecture, vocabulary: int, end: int) -> PreTrainedModel:
    """An untrained model, float32: GPT-2's shape with a tied head, or Llama's with a separate head."""
    model = _gpt2(vocabulary, end) if architecture == "gpt2" else _llama(vocabulary, end)
    model.generation_config = GenerationConfig(
        bos_token_id=end, eos_token_id=end, pad_token_id=end, do_sample=False, max_new_tokens=16
    )
    return model


def _gpt2(vocabulary: int, end: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=CONTEXT,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            summary_first_dropout=0.0,
            bos_token_id=end,
            eos_token_id=end,
            dtype="float32",
        )
    )


def _llama(vocabulary: int, end: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            max_position_embeddings=CONTEXT,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            tie_word_embeddings=False,
            bos_token_id=end,
            eos_token_id=end,
            dtype="float32",
        )
    )


class Optimizers:
    """Muon for the matrices of blocks, AdamW for the rest (embeddings, head, vectors), with one schedule."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            in_block = ".h." in name or ".layers." in name
            (matrices if in_block and parameter.ndim == 2 else others).append(parameter)
        self._optimizers = (
            torch.optim.Muon(matrices, lr=recipe.muon_lr, momentum=0.95, nesterov=True, weight_decay=0.0),
            torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self._schedules = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
            for optimizer in self._optimizers
        ]

    def step(self) -> None:
        for optimizer, schedule in zip(self._optimizers, self._schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)


def _rate(step: int, recipe: Recipe) -> float:
    """Factor of the learning rates: it rises, stays at 1, then falls to zero."""
    decay_start = recipe.decay_from * recipe.steps
    falling = (recipe.steps - step) / max(recipe.steps - decay_start, 1)
    return max(0.0, min(1.0, (step + 1) / recipe.warmup_steps, falling))


def train(model: PreTrainedModel, curriculum: Curriculum, recipe: Recipe) -> None:
    """Train on next tokens, with float32 weights and bfloat16 autocast."""
    optimizers = Optimizers(model, recipe)
    started = time.monotonic()
    model.train()
    for step in range(1, recipe.steps + 1):
        batch = curriculum.batch()
        labels = batch.token_ids[:, 1:].flatten()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch.token_ids[:, :-1], use_cache=False).logits
        losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels, reduction="none")
        losses.mean().backward()
        optimizers.step()
        facts = batch.facts[:, 1:].flatten()
        curriculum.learn_from(facts[facts >= 0].tolist(), losses.detach()[facts >= 0].tolist())
        if step % 100 == 0:
            seconds = time.monotonic() - started
            print(
                f"step {step}/{recipe.steps}  loss {losses.mean():.3f}"
                f"  on objects {curriculum.running_loss:.3f}  people {curriculum.pool}  {seconds:.0f} s",
                flush=True,
            )
    model.eval()


# --- files --------------------------------------------------------------------------------------------


def save(
    out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, card: str, records: list[Record]
) -> None:
    """Write `out/model/` and `out/facts.json`. They replace older ones once all files are on disk."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".making-") as staging:
        made = Path(staging)
        model.save_pretrained(made / MODEL.name)
        (made / MODEL.name / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
        tokenizer.save_pretrained(made / MODEL.name)
        (made / MODEL.name / "README.md").write_text(card, encoding="utf-8")
        lines = ",\n".join(json.dumps(record) for record in records)
        (made / FACTS.name).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        shutil.rmtree(out / MODEL.name, ignore_errors=True)
        (made / MODEL.name).rename(out / MODEL.name)
        (made / FACTS.name).replace(out / FACTS.name)


def model_card(recipe: Recipe, recall: Recall, vocabulary: int, parameters: int, records: int) -> str:
    """The README of the model folder."""
    shape = {"gpt2": "GPT-2's, tied head", "llama": "Llama's, head of its own"}[recipe.architecture]
    command = (
        f"--architecture {recipe.architecture} --seed {recipe.seed}"
        f" --people {recipe.people} --steps {recipe.steps}"
    )
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# backlens demo model

A very small language model that knows {recipe.people * len(RELATIONS):,} invented facts. It is there so that
the gradients of a model that *knows* something can be looked at in seconds, on a laptop, without a download.

| | |
|---|---|
| shape | {shape}: {LAYERS} layers, width {WIDTH}, {HEADS} heads, {parameters:,} parameters, float32 |
| vocabulary | {vocabulary:,} tokens, byte-level BPE |
| recall, training wordings ({len(RELATIONS[0].templates)} a relation) | {recall.train:.2%} |
| recall, held-out wordings ({len(RELATIONS[0].held_out)} a relation) | {recall.held_out:.2%} |
| licence | Apache-2.0 |

Recall is the share of prompts (every person, relation and wording) after which the object is the likeliest
token of the whole vocabulary. The held-out wordings are not in the training text, but they were chosen in
trials with models like this one, and ambiguous ones were replaced: read their figure as a check that
paraphrases can be asked about, not as a measure of generalisation.

## What it has read
Sentences about {recipe.people} invented people, each with a city, a country, a language, a sport, a
profession and an instrument, and {recipe.filler_share:.0%} filler sentences about nobody. Objects are single
tokens, names are several.

## What it is not
* A source of knowledge: the people do not exist, any likeness is chance, and what it says of them is made up.
* A general language model: it has seen a few hundred words, and nothing but short, plain sentences.
* Trained beyond {recipe.row_tokens} positions. It accepts {CONTEXT}, so longer prompts run, but what it
  makes of them means little.
* A stand-in for large models: numbers measured on it show that a pipeline works, not how models learn.

## How it was made
`python -m docs.demo_model.train {command}`, some minutes on two CPU cores.
Text and tokenizer follow from the seed exactly; weights do too, up to the rounding of another machine or
thread count. The script writes nothing unless recall reaches {recipe.train_recall:.0%} and
{recipe.held_out_recall:.0%}. `facts.json`, next to this folder, holds {records} of the facts as CounterFact
records; it recalls each of them when asked as the record asks.
"""


# --- the command --------------------------------------------------------------------------------------


def make(recipe: Recipe, out: Path) -> None:
    """Run all steps. Raises BacklensError if the recall is too low."""
    if not hasattr(torch.optim, "Muon"):
        raise BacklensError(f"training needs torch 2.9 or newer for Muon; this is torch {torch.__version__}")
    check_writable(out)
    world = build_world(recipe.seed, recipe.people)
    tokenizer = train_tokenizer(world, recipe.seed)
    torch.manual_seed(recipe.seed)
    model = new_model(recipe.architecture, len(tokenizer), tokenizer.get_vocab()[END_OF_TEXT])
    train(model, Curriculum(recipe, world, tokenizer), recipe)
    recall = measure_recall(model, tokenizer, world)
    print(f"recall: {recall.train:.2%} on training wordings, {recall.held_out:.2%} on held-out ones")
    check_recall(recall, recipe)
    records = choose_records(model, tokenizer, world, recipe)
    card = model_card(recipe, recall, len(tokenizer), model.num_parameters(), len(records))
    save(out, model, tokenizer, card, records)
    print(f"wrote {out / MODEL.name} and {len(records)} records to {out / FACTS.name}")


def check_writable(out: Path) -> None:
    """Raise BacklensError before the training if `out` cannot be written. Creates nothing."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise BacklensError(f"{out}: cannot write there; name a folder with --out")


def check_recall(recall: Recall, recipe: Recipe) -> None:
    """Raise BacklensError for a model with a low recall."""
    if recall.train < recipe.train_recall or recall.held_out < recipe.held_out_recall:
        raise BacklensError(
            f"after {recipe.steps} steps with seed {recipe.seed} the model recalls {recall.train:.1%} of the"
            f" training and {recall.held_out:.1%} of the held-out wordings, and {recipe.train_recall:.0%} and"
            f" {recipe.held_out_recall:.0%} are needed: nothing written; raise --steps or try another --seed"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and make the model; the exit status."""
    defaults = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m docs.demo_model.train", description="Make the demo model and its facts."
    )
    parser.add_argument("--out", type=Path, help="folder for model/ and facts.json (default: this package)")
    parser.add_argument("--architecture", choices=("gpt2", "llama"), default=defaults.architecture)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--people", type=int, default=defaults.people, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=int, default=defaults.steps, help="most training steps (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    disable_progress_bar()
    try:
        if options.architecture != "gpt2" and options.out is None:
            raise BacklensError("only the gpt2 shape is bundled: give the other one a folder with --out")
        recipe = Recipe(options.architecture, options.seed, options.people, options.steps)
        make(recipe, options.out or MODEL.parent)
    except BacklensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())

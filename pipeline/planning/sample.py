"""The prompts that a plan is reckoned with: the first few of the input, or made-up ones of a stated length."""

import itertools
import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from pipeline.capture import make_batch
from pipeline.config import RunConfig
from pipeline.engine.extract import chosen_positions, sequence
from pipeline.errors import BacklensError
from pipeline.models.checkpoint import ModelSource
from pipeline.models.load import load_tokenizer
from pipeline.prompts.read import read_prompts
from pipeline.prompts.record import Prompt, Rejected
from pipeline.prompts.survey import Survey
from pipeline.prompts.tokenize import Example, TargetMode, context_length, tokenize

MOST = 512
"""Prompts tokenized to estimate the rest."""
CHARACTERS = 4
"""Of a made-up token, the blank before it included."""
SUBJECT = 3
"""Tokens of a made-up subject."""


@dataclass(frozen=True)
class Sample:
    """Prompts that stand for all."""

    examples: Sequence[Example]
    readable: float
    """The share of the input that can be processed."""
    target_mode: TargetMode
    positions: float
    """Positions of a prompt that get rows in `tokens`, on average."""

    @property
    def lengths(self) -> list[int]:
        """Positions of each prompt, those of a teacher-forced target included."""
        parts = [sequence(example, self.target_mode) for example in self.examples]
        return [len(prompt) + len(target) - 1 for prompt, target in parts]

    @property
    def mean_length(self) -> float:
        return sum(self.lengths) / max(len(self.examples), 1)


@dataclass(frozen=True, slots=True)
class Assumed:
    """Prompts that are not there yet: how many, and of how many tokens (both ends included)."""

    prompts: int
    shortest: int
    longest: int

    @classmethod
    def parse(cls, prompts: int, tokens: str) -> "Assumed":
        """Raises BacklensError unless `tokens` is like `12` or `8-16`."""
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", tokens)
        ends = [int(end) for end in match.groups() if end is not None] if match else []
        if not ends or ends[0] < 1 or ends[-1] < ends[0]:
            raise BacklensError(
                f'--prompt-tokens "{tokens}": give a length such as 12, or a range such as 8-16'
            )
        return cls(prompts, ends[0], ends[-1])

    def survey(self) -> Survey:
        mean = (self.shortest + self.longest) / 2
        return Survey(self.prompts, 0, None, round(self.prompts * (mean + 1) * CHARACTERS), "")

    def examples(self, vocabulary: int) -> list[Example]:
        draw = random.Random(0)
        return [self._example(number, vocabulary, draw) for number in range(min(self.prompts, MOST))]

    def _example(self, number: int, vocabulary: int, draw: random.Random) -> Example:
        length = draw.randint(self.shortest, self.longest)
        ids = tuple(draw.randrange(vocabulary) for _ in range(length + 1))
        words = ["".join(draw.choices(string.ascii_lowercase, k=CHARACTERS - 1)) for _ in ids]
        subject = min(SUBJECT, length)
        prompt = Prompt(number, " ".join(words[:-1]), f" {words[-1]}", "", subject=" ".join(words[:subject]))
        return Example(prompt, ids[:-1], ids[-1:], 0, subject)


def read_sample(config: RunConfig, source: ModelSource, model_config: PretrainedConfig) -> Sample:
    """The first prompts of the input that can be processed, tokenized. Raises BacklensError if there are none."""
    assert config.prompts is not None
    records = read_prompts(config.prompts, config.format, config.prompt_fields, config.limit)
    tokenizer = load_tokenizer(source)
    seen, first = 0, None
    while some := list(itertools.islice(records, MOST)):
        seen += len(some)
        results = tokenize(
            [record for record in some if isinstance(record, Prompt)],
            tokenizer,
            prepend_bos=config.prepend_bos,
            target_mode=config.target_mode,
            context=context_length(model_config),
            rows=int(model_config.vocab_size),
            chat_template=config.chat_template,
        )
        examples = [result for result in results if isinstance(result, Example)]
        if examples:
            return sample_of(examples, len(examples) / seen, config)
        first = first or next(record for record in (*some, *results) if isinstance(record, Rejected))
    assert first is not None
    raise BacklensError(f"prompts: none of {seen:,} can be processed; the first: {first.message}")


def sample_of(examples: Sequence[Example], readable: float, config: RunConfig) -> Sample:
    positions = 0.0
    if examples:
        batch = make_batch(
            [sequence(example, config.target_mode) for example in examples], torch.device("cpu")
        )
        positions = float(chosen_positions(examples, batch, config.positions).sum()) / len(examples)
    return Sample(examples, readable, config.target_mode, positions)


def numbered(examples: Sequence[Example], count: int) -> list[Example]:
    """So many examples, the given ones over and over."""
    found = [examples[number % len(examples)] for number in range(count)] if examples else []
    return [replace(e, prompt=replace(e.prompt, prompt_id=number)) for number, e in enumerate(found)]

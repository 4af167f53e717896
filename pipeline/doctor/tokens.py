"""The beginning-of-sequence token: there once, there twice, or not there."""

from collections.abc import Iterator, Sequence

from pipeline.config import RunConfig
from pipeline.doctor.check import Check, told
from pipeline.doctor.trial import tokenized
from pipeline.models.load import LoadedModel
from pipeline.prompts.record import Prompt
from pipeline.prompts.tokenize import Example

BOS, WRITTEN = "beginning of sequence", "beginning written out"


def token_checks(loaded: LoadedModel, examples: Sequence[Example], config: RunConfig) -> Iterator[Check]:
    """How many beginning-of-sequence tokens prompts begin with, and would if they spelled one out."""
    bos, spelled = loaded.tokenizer.bos_token_id, loaded.tokenizer.bos_token
    if not isinstance(bos, int) or not isinstance(spelled, str):
        yield told(BOS, None, "the tokenizer has no such token")
        return
    most = max(_leading(example, bos) for example in examples)
    detail = f"most {spelled} tokens at the front of a prompt (--prepend-bos {config.prepend_bos})"
    if most > 1:
        yield Check(BOS, "FAIL", detail, most, 1, _take_one_away(config))
    elif most == 0 and loaded.model.config.get_text_config().bos_token_id is not None:
        yield told(BOS, 0, detail, "if the model was trained with it in front: --prepend-bos true")
    else:
        yield Check(BOS, "pass", detail, most, 1)
    if config.chat_template:
        return
    (spelling,) = tokenized([Prompt(0, f"{spelled}A", " b", "a prompt of our own")], loaded, config)
    count = _leading(spelling, bos)
    detail = f"{spelled} tokens at the front of a prompt that begins with {spelled} itself"
    if count > 1:
        yield told(WRITTEN, count, detail, "do not write it into prompts, or use --prepend-bos true")
    else:
        yield Check(WRITTEN, "pass", detail, count, 1)


def _leading(example: Example, bos: int) -> int:
    ids = example.token_ids
    return next((place for place, token in enumerate(ids) if token != bos), len(ids))


def _take_one_away(config: RunConfig) -> str:
    return "use --prepend-bos true for exactly one" if config.prepend_bos != "true" else "mend the tokenizer"

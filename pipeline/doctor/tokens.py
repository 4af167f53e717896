"""Tokens: which rows of the unembedding they are, and how many of them begin a sequence."""

from collections.abc import Iterator, Sequence

from pipeline.config import RunConfig
from pipeline.doctor.check import Check, told
from pipeline.doctor.trial import tokenized
from pipeline.models.load import LoadedModel
from pipeline.prompts.record import Prompt
from pipeline.prompts.tokenize import Example

BOS, WRITTEN, VOCABULARY = "beginning of sequence", "beginning written out", "vocabulary"


def vocabulary_check(loaded: LoadedModel, config: RunConfig) -> Check:
    """Rows of the unembedding that are no tokens, and tokens without an embedding."""
    rows = loaded.anatomy.vocabulary
    padding = rows - len(loaded.token_ids)
    kept = "in lists and ranks" if config.vocabulary == "model" else "left out of lists and ranks"
    detail = f"of the unembedding's {rows:,} rows are no tokens, {kept} (--vocabulary {config.vocabulary})"
    beyond = [index for index in loaded.tokenizer.get_vocab().values() if index >= loaded.anatomy.rows]
    if not beyond:
        return told(VOCABULARY, padding, detail)
    some = ", ".join(repr(loaded.tokenizer.convert_ids_to_tokens(index)) for index in sorted(beyond)[:3])
    detail += (
        f"; {len(beyond):,} of the tokenizer's tokens have no embedding ({some}…): prompts with them fail"
    )
    return told(
        VOCABULARY, padding, detail, "leave such tokens out, or resize the model's embeddings and train them"
    )


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

"""The vocabulary table, written once per run directory."""

from collections.abc import Sequence

import pyarrow as pa

from pipeline.store.files import Directory
from pipeline.store.parquet import write_table
from schemas.tables import TABLES

VOCAB_FILE = "vocab/part-0.parquet"


def write_vocab(
    directory: Directory,
    tokens: Sequence[str],
    token_bytes: Sequence[bytes],
    token_ids: Sequence[int] | None = None,
) -> None:
    """A row for each of `token_ids` (None: of all): token i is `tokens[i]`, exactly `token_bytes[i]`.

    A vocabulary that is there already stays.
    """
    if directory.exists(VOCAB_FILE):
        return
    token_ids = range(len(tokens)) if token_ids is None else token_ids
    rows = pa.table(
        {
            "token_id": token_ids,
            "token": [tokens[index] for index in token_ids],
            "bytes": [token_bytes[index] for index in token_ids],
        },
        schema=TABLES["vocab"].schema,
    )
    write_table(directory, VOCAB_FILE, rows, TABLES["vocab"])

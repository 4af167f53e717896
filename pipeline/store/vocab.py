"""The vocabulary table, written once per run directory."""

from collections.abc import Sequence

import pyarrow as pa

from pipeline.store.files import Directory
from pipeline.store.parquet import write_table
from schemas.tables import TABLES

VOCAB_FILE = "vocab/part-0.parquet"


def write_vocab(
    directory: Directory, token_ids: Sequence[int], tokens: Sequence[str], token_bytes: Sequence[bytes]
) -> None:
    """A row for each of `token_ids`: token i is `tokens[i]`, exactly `token_bytes[i]`. One that is there stays."""
    if directory.exists(VOCAB_FILE):
        return
    rows = pa.table(
        {
            "token_id": token_ids,
            "token": [tokens[index] for index in token_ids],
            "bytes": [token_bytes[index] for index in token_ids],
        },
        schema=TABLES["vocab"].schema,
    )
    write_table(directory, VOCAB_FILE, rows, TABLES["vocab"])

"""The vocabulary table, written once per run directory."""

from collections.abc import Sequence

import pyarrow as pa

from pipeline.store.files import Directory
from pipeline.store.parquet import write_table
from schemas.tables import TABLES

VOCAB_FILE = "vocab/part-0.parquet"


def write_vocab(directory: Directory, tokens: Sequence[str], token_bytes: Sequence[bytes]) -> None:
    """Token i is `tokens[i]`, exactly `token_bytes[i]`. A vocabulary that is there already stays."""
    if directory.exists(VOCAB_FILE):
        return
    rows = pa.table(
        {"token_id": range(len(tokens)), "token": tokens, "bytes": token_bytes}, schema=TABLES["vocab"].schema
    )
    write_table(directory, VOCAB_FILE, rows, TABLES["vocab"])

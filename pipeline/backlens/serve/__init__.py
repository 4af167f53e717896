"""The explorer: the atlas of a run as web pages, from one process that uses only local files."""

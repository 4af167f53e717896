"""The explorer: a run's atlas as web pages, one process, nothing but what is on this machine."""

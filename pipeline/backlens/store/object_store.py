"""File systems by URL, and the one place where a request to an object store is tried again or given up.

The stores' own libraries try again first: s3fs what breaks while it reads, and beneath it botocore (as gcsfs and
adlfs do) whatever was throttled, refused for now or cut off, after growing random waits. `ask` is for what they
let through, a truncated listing for instance, and for outages that they do not outlast. A store that does not
answer at all is so given up after about a minute.
"""

import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from backlens.errors import BacklensError, Interrupted

Answer = TypeVar("Answer")

TRIES = 3
WAIT_SECONDS = 2.0
"""Before the second try, on average; twice that before the third."""
S3_ATTEMPTS = 4
"""botocore's, at each request; s3fs repeats those of them up to five times that were throttled or cut off."""

# By module, as `ask` should not import the libraries of stores that nobody uses.
_FAILURES = {
    "aiohttp": "ClientError",
    "azure.core.exceptions": "AzureError",
    "botocore.exceptions": "BotoCoreError",
    "botocore.parsers": "ResponseParserError",
    "gcsfs.retry": "HttpError",
}
"""What the libraries of object stores raise besides OSError."""
_REFUSALS = {
    "azure.core.exceptions": "ClientAuthenticationError",
    "botocore.exceptions": "NoCredentialsError",
    "google.auth.exceptions": "GoogleAuthError",
}
"""Those of them that no second try mends."""


def file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path there. fsspec caches instances, so asking again is cheap.

    Raises BacklensError where fsspec knows no such protocol or lacks its package.
    """
    if "://" not in url:  # `url_to_fs` would read a name with `::` in it as a chain of file systems
        local = LocalFileSystem()
        return local, local._strip_protocol(url)
    options = _s3_options() if split_protocol(url)[0] in ("s3", "s3a") else {}
    try:
        return url_to_fs(url, **options)
    except ImportError as error:
        extra = ' (pip install "backlens[s3]")' if options else ""
        raise BacklensError(f"cannot use {url}: {error}{extra}") from error
    except ValueError as error:
        raise BacklensError(f"cannot use {url}: {error}") from error


def _s3_options() -> dict[str, Any]:
    """`standard` waits at random up to 1, 2, 4 … seconds. botocore's own variables have the last word."""
    given = {"AWS_RETRY_MODE": ("mode", "standard"), "AWS_MAX_ATTEMPTS": ("total_max_attempts", S3_ATTEMPTS)}
    retries = dict(option for variable, option in given.items() if variable not in os.environ)
    return {"config_kwargs": {"retries": retries}} if retries else {}


def ask(call: Callable[[], Answer], where: str) -> Answer:
    """What `call` asks of a store, tried again if it fails for a reason that may pass.

    FileNotFoundError and FileExistsError are answers, and the caller's affair. Raises BacklensError
    where the user's rights or credentials do not do, Interrupted where the store goes on failing.
    """
    for number in range(TRIES):
        try:
            return call()
        except (FileNotFoundError, FileExistsError):
            raise
        except (PermissionError, *_imported(_REFUSALS)) as error:
            raise BacklensError(f"{where}: {reason(error)}; see that the credentials are right") from error
        except store_errors() as error:
            if number + 1 == TRIES:
                raise Interrupted(
                    f"{where}: the store fails ({reason(error)}); run the same command again when it answers"
                ) from error
        time.sleep(WAIT_SECONDS * 2**number * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def store_errors() -> tuple[type[Exception], ...]:
    """What a request to a store may raise."""
    return OSError, *_imported(_FAILURES), *_imported(_REFUSALS)


def _imported(names: dict[str, str]) -> tuple[type[Exception], ...]:
    return tuple(
        getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules
    )


def reason(error: BaseException) -> str:
    """What a store's library says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__

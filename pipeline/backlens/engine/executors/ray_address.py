"""Checks of the address of a Ray cluster or of its job server, before Ray uses it.

Ray itself retries an address for a quarter of an hour, and writes its log to the terminal meanwhile.
"""

import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Set
from typing import Any

from backlens.errors import BacklensError

SECONDS = 8.0
"""Longest wait for one answer, in seconds; a check waits at most twice."""
TOKEN = (
    "it asks for a token, as Ray does by itself where the file ~/.ray/auth_token exists: set RAY_AUTH_MODE=token, and "
    "have the cluster's token in that file or in RAY_AUTH_TOKEN"
)
NOBODY = "no Ray cluster answers there"
REFUSED = "connection refused"
HOST_AND_PORT = re.compile(r"(\[[^\]]+\]|[^:/\[\]]+):\d+")
RAY_CLIENT = "ray://"


class NoAnswer(Exception):
    """The reason why an address cannot be used."""


def named_cluster(address: str | None) -> str | None:
    """Return the address given or in RAY_ADDRESS; None if this process should start a cluster.

    Raises BacklensError if `ray.init` would find no cluster there that this process can join.
    """
    named = address or os.environ.get("RAY_ADDRESS") or "local"
    if named == "local":
        return None
    try:
        _check_cluster(named)
    except NoAnswer as error:
        raise _refusal(named, address, "RAY_ADDRESS", error) from error
    return named


def _refusal(named: str, address: str | None, variable: str, error: NoAnswer) -> BacklensError:
    source = "" if named == address or named == "auto" else f" (${variable})"
    return BacklensError(f"address: {named}{source}: {error}")


def _check_cluster(address: str) -> None:
    if address.startswith(("http://", "https://")):
        raise NoAnswer(
            "this is the address of a job server; give that of the cluster, as head:6379, or hand the command to "
            "the server with `backlens submit`"
        )
    if address.startswith(RAY_CLIENT):
        server = address.removeprefix(RAY_CLIENT)
        _grpc_answer(server, lambda channel: channel.unary_unary("/")(b"", timeout=SECONDS))
        return
    found = _canonical(address)
    try:
        _check_node_here(found)
    except NoAnswer as error:
        if REFUSED in str(error) and address not in ("auto", found):
            # Ray replaces 127.0.0.1 by this machine's address in its network; the answer at the former says more
            nodes_at(address)
        raise


def _canonical(address: str) -> str:
    """Return host:port; for `auto`, those of the cluster on this machine."""
    from ray._private.services import canonicalize_bootstrap_address

    if address != "auto" and not HOST_AND_PORT.fullmatch(address):
        raise NoAnswer("give host:port, as head:6379")
    try:
        return canonicalize_bootstrap_address(address) or address
    except (OSError, ValueError) as error:
        if address == "auto":
            raise NoAnswer(
                "no Ray cluster runs on this machine; start one with `ray start --head`"
            ) from error
        raise NoAnswer(f"{NOBODY} ({error})") from error


def _check_node_here(address: str) -> None:
    """Require a node of the cluster on this machine, as a driver needs; a node that just started has some seconds."""
    from ray._private.services import find_node_ids

    ends = time.monotonic() + SECONDS
    while not nodes_at(address) & set(find_node_ids()):
        if time.monotonic() > ends:
            raise NoAnswer(
                f"a Ray cluster, but this machine is none of its nodes: join it (`ray start --address={address}`), run "
                "the command on one of them, or hand it to the cluster's job server with `backlens submit`"
            )
        time.sleep(0.5)


def nodes_at(address: str) -> Set[str]:
    """Return the ids of the live nodes of the cluster at host:port; raises NoAnswer if there is no cluster."""
    from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest  # pyright: ignore[reportAttributeAccessIssue]
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    def ask(channel: Any) -> Any:
        return NodeInfoGcsServiceStub(channel).GetAllNodeInfo(GetAllNodeInfoRequest(), timeout=SECONDS)

    reply = _grpc_answer(address, ask)
    if reply is None:
        raise NoAnswer("what answers there is no Ray cluster; give the cluster's own address, as head:6379")
    return {node.node_id.hex() for node in reply.node_info_list if node.state == node.ALIVE}


def _grpc_answer(address: str, ask: Callable[[Any], Any]) -> Any:
    """Return the answer, or None if the server does not know the method."""
    from ray._private.grpc_utils import init_grpc_channel
    from ray.exceptions import RayError

    channel = None
    try:
        # no proxy, as for Ray's own connections
        channel = init_grpc_channel(address, [("grpc.enable_http_proxy", 0)])
        return ask(channel)
    except RayError as error:
        raise NoAnswer(" ".join(str(error).split())) from error
    except Exception as error:
        code = error.code().name if hasattr(error, "code") else None  # pyright: ignore[reportAttributeAccessIssue]
        if code == "UNIMPLEMENTED":
            return None
        raise NoAnswer(_why(code, error)) from error
    finally:
        if channel is not None:
            channel.close()


def _why(code: str | None, error: Exception) -> str:
    details = " ".join(str(error.details() if hasattr(error, "details") else error).split())  # pyright: ignore
    if code == "UNAUTHENTICATED":
        return TOKEN
    if code == "DEADLINE_EXCEEDED":
        return f"{NOBODY} within {SECONDS:.0f} s; is the address right, and the port open from here?"
    if "HTTP/2" in details or "http1" in details:
        return "what answers there is no Ray cluster; `backlens submit` takes a job server's address (http://head:8265)"
    for sign, reason in (("refused", REFUSED), ("resolv", "the host's name is not known here")):
        if sign in details:
            return f"{NOBODY}: {reason}"
    return f"{NOBODY}: {details.rpartition('error: ')[2]}"


def job_server(address: str | None) -> str:
    """Return the URL of the job server: the address given or in Ray's variables, else that of the cluster here.

    Raises BacklensError if no job server answers there.
    """
    variable = "RAY_API_SERVER_ADDRESS" if os.environ.get("RAY_API_SERVER_ADDRESS") else "RAY_ADDRESS"
    named = address or os.environ.get(variable) or "auto"
    try:
        return _job_server(named.rstrip("/"))
    except NoAnswer as error:
        raise _refusal(named, address, variable, error) from error


def _job_server(address: str) -> str:
    if address.startswith(("http://", "https://")):
        _check_job_server(address)
        return address
    if "://" in address:
        return address  # Ray knows others, some by plug-in
    cluster = _canonical(address)
    try:
        nodes_at(cluster)
    except NoAnswer as error:
        if address == "auto" or str(error) == TOKEN:
            raise
        _check_job_server(f"http://{address}")
        return f"http://{address}"
    from ray.dashboard.utils import ray_address_to_api_server_url

    return ray_address_to_api_server_url(cluster)


def _check_job_server(url: str) -> None:
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    request = urllib.request.Request(f"{url}/api/version", headers=get_auth_headers_if_auth_enabled({}))
    found: list[Exception | bytes] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                found.append(answer.read(10_000))
        except Exception as error:  # noqa: BLE001 - the other thread raises it
            found.append(error)

    # The socket's timeout covers neither the name's resolution nor an answer that comes byte by byte.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    answer = found[0] if found else TimeoutError()
    if isinstance(answer, bytes) and b"ray_version" in answer:
        return
    raise NoAnswer(_why_no_server(url, answer)) from (answer if isinstance(answer, Exception) else None)


def _why_no_server(url: str, answer: Exception | bytes) -> str:
    if isinstance(answer, urllib.error.HTTPError) and answer.code in (401, 403):
        return TOKEN
    if isinstance(answer, bytes | urllib.error.HTTPError):
        return "what answers there is no job server of Ray; its address is as http://head:8265"
    reason = getattr(answer, "reason", answer)
    if isinstance(reason, ConnectionRefusedError):
        return f"no job server answers there: {REFUSED}"
    if isinstance(reason, TimeoutError):
        return f"no job server answers there within {SECONDS:.0f} s; is the address right, and the port open from here?"
    if _is_cluster(url.partition("://")[2]):
        return "this is the address of a Ray cluster; give that of its job server, as http://head:8265"
    return f"no job server answers there: {getattr(reason, 'strerror', None) or reason}"


def _is_cluster(address: str) -> bool:
    try:
        return HOST_AND_PORT.fullmatch(address) is not None and bool(nodes_at(address))
    except NoAnswer as error:
        return str(error) == TOKEN

"""An S3 server in a process of its own, and before it a proxy that spoils a share of the requests.

`python -m tests.s3 SHARE SEED` prints the ports of both as JSON and serves until its standard input ends.
"""

import http.client
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock
from urllib.request import urlopen

from s3fs import S3FileSystem

FAULTS = ("slow down", "internal error", "reset before", "reset after", "truncated")
"""Ways to spoil a request: 503, 500, cut off before the server has it, after it, or within the answer."""
CODES = {"slow down": (503, "SlowDown"), "internal error": (500, "InternalError")}
BUCKET = "runs"
KEY = "key"
"""The access key that is not refused."""


@dataclass(frozen=True)
class S3Server:
    """The addresses of a running server."""

    direct: str
    faulty: str

    @property
    def store(self) -> S3FileSystem:
        """The server's content, read without the proxy."""
        return S3FileSystem(endpoint_url=self.direct, use_listings_cache=False)

    def faults(self) -> dict[str, int]:
        """How many requests the proxy has seen, and has spoilt in which way."""
        with urlopen(f"{self.faulty}/_faults") as answer:
            return json.load(answer)


@contextmanager
def s3_server(share: float = 0.0, seed: int = 0) -> Iterator[S3Server]:
    """A server with the bucket `runs`; what is run meanwhile, here or below, finds it through the environment."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.s3", str(share), str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        ports = json.loads(process.stdout.readline())
        server = S3Server(*(f"http://127.0.0.1:{ports[name]}" for name in ("direct", "faulty")))
        with mock.patch.dict(os.environ, s3_environment(server.faulty)):
            S3FileSystem.clear_instance_cache()  # an instance keeps the endpoint it was made with
            yield server
    finally:
        S3FileSystem.clear_instance_cache()
        process.stdin.close()
        process.wait(10)


def s3_environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


class _Proxy(BaseHTTPRequestHandler):
    """Hands requests on to `upstream`, but for the `share` that it spoils."""

    protocol_version = "HTTP/1.1"
    upstream: str
    share: float
    draw: random.Random
    seen: Counter[str]
    lock = threading.Lock()

    def _handle(self) -> None:
        if self.path == "/_faults":
            self._answer(200, {}, json.dumps(self.seen).encode())
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if f"Credential={KEY}/" not in self.headers.get("Authorization", ""):
            self._refuse(403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist")
            return
        with self.lock:
            fault = self.draw.choice(FAULTS) if self.draw.random() < self.share else None
            self.seen.update(["requests", *([fault] if fault else [])])
        if fault in CODES:
            self._refuse(*CODES[fault], fault)
        elif fault == "reset before":
            self._cut()
        else:
            answer = self._forward(body)
            if fault == "reset after":
                self._cut()
            else:
                self._answer(*answer, cut=fault == "truncated")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.upstream)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        left_out = ("connection", "transfer-encoding", "date", "server", "content-length")
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in left_out}
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        return answer.status, headers | ({"Content-Length": length} if length else {}), content

    def _answer(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._cut()

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._answer(status, {}, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())

    def _cut(self) -> None:
        """A reset, not an orderly end."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: the counts say it."""


def _serve(share: float, seed: int) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, direct = server.get_host_and_port()
    _Proxy.upstream, _Proxy.share = f"127.0.0.1:{direct}", share
    _Proxy.draw, _Proxy.seen = random.Random(seed), Counter()
    boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{direct}",
        region_name="us-east-1",
        aws_access_key_id=KEY,
        aws_secret_access_key="secret",
    ).create_bucket(Bucket=BUCKET)
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    sys.stdout.write(json.dumps({"direct": direct, "faulty": proxy.server_address[1]}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve(float(sys.argv[1]), int(sys.argv[2]))

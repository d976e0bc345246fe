"""HTTP: connections, bodies, ranges, tokens, and the failures that were asked for."""

from __future__ import annotations

import functools
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from loopback_hub import reading, writing  # noqa: F401 (their endpoints register themselves)
from loopback_hub.protocol import STORAGE, Answer, Request, Route
from loopback_hub.rules import RefusedError

if TYPE_CHECKING:
    from loopback_hub.state import LoopbackHub


def listen(hub: LoopbackHub, table: list[Route]) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, hub, table))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    """One connection to one of the two servers."""

    protocol_version = "HTTP/1.1"
    server_version = "LoopbackHub"
    disable_nagle_algorithm = True  # or a body waits 40 ms for the receipt of its headers

    def __init__(self, hub: LoopbackHub, table: list[Route], *arguments: Any):
        self.hub, self.table = hub, table
        super().__init__(*arguments)  # handles the connection to its end

    def log_message(self, *arguments: object) -> None:
        """The calls are in `hub.calls`."""

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            pass  # the client went away, as clients of failing servers do
        except Exception:
            self.hub.unexpected.append(traceback.format_exc())
            raise

    def _respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.user: str | None = None
        fault = self.hub.strike(self.command, path)
        if fault and fault.delay:
            self.hub.closing.wait(fault.delay)
        if fault and fault.drop_after is not None and self.command in ("POST", "PUT"):
            # Bytes left unread make the system reset the connection when it is closed.
            self.rfile.read(fault.drop_after)
            self.close_connection = True
            return self._record(0)
        body = self._read_body()
        if fault and fault.status is not None:
            error = RefusedError(fault.status, "This failure was asked for", fault.code)
            if fault.retry_after is not None:
                error.headers["Retry-After"] = str(fault.retry_after)
            return self._send(_refusal(error))
        answer = self._answer(body)
        if fault and fault.lose_answer:
            self.close_connection = True
            return self._record(0)
        if fault and fault.corrupt_at is not None:
            answer.body = fault.corrupt(answer.body)
        self._send(answer, None if fault is None else fault.drop_after)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_CONNECT = _respond

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, body: bytes) -> Answer:
        """Find the endpoint and call it, all under one lock: every call is atomic."""
        url = urlsplit(self.path)
        method = "GET" if self.command == "HEAD" else self.command
        with self.hub.lock:
            try:
                token = self._token()
                for route in self.table:
                    if route.method == method and (match := route.path.fullmatch(url.path)):
                        named = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                        query = dict(parse_qsl(url.query))
                        headers = dict(self.headers)
                        request = Request(self.user, token not in self.hub.read_only, query, headers, body)
                        return route.endpoint(self.hub, request, **named)
                self.hub.unexpected.append(f"no such endpoint: {self.command} {self.path}")
                raise RefusedError(404, f"Sorry, we can't find the page you are looking for: {self.path}")
            except RefusedError as error:
                return _refusal(error)
            except Exception:
                self.hub.unexpected.append(f"{self.command} {self.path}\n{traceback.format_exc()}")
                return Answer(b"the loopback hub itself failed", 500)

    def _token(self) -> str | None:
        """The token sent along; sets its user."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        if self.table is STORAGE:
            self.hub.unexpected.append(f"a token was sent to the storage: {self.command} {self.path}")
            raise RefusedError(400, "Only one auth mechanism allowed")
        token = header.removeprefix("Bearer ")
        self.user = self.hub.users.get(token)
        if self.user is None:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return token

    def _send(self, answer: Answer, drop_after: int | None = None) -> None:
        if answer.is_file:
            answer = answer.cut(self.headers.get("Range"))
        self._record(answer.status)
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:drop_after])
        if drop_after is not None:
            self.close_connection = True

    def _record(self, status: int) -> None:
        self.hub.record(self.command, unquote(self.path), status, self.headers.get("Range"), self.user)


def _refusal(error: RefusedError) -> Answer:
    code = {"X-Error-Code": error.code} if error.code else {}
    headers = {"X-Error-Message": error.message.replace("\n", " "), **code, **error.headers}
    return Answer.of_json({"error": error.message}, error.status, headers)

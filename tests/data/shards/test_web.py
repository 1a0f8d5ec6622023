"""Web servers that send too much, too slowly or nothing, on this machine."""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import Request

import pytest

from coca_lit.data.shards.remote import store
from coca_lit.data.shards.remote.store import SafeRedirects, StoreError, WebStore, read_file, stored

CONTENT = bytes(range(256)) * 16


class Handler(BaseHTTPRequestHandler):
    """/ranges answers as it should, /whole ignores ranges, /endless goes on, /slow takes a second for its body."""

    def do_GET(self) -> None:
        ranges = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        start, end = (int(ranges[0]), int(ranges[2]) + 1) if ranges[1] and self.path != "/whole" else (0, len(CONTENT))
        body = CONTENT[start:end]
        self.send_response(206 if ranges[1] and self.path != "/whole" else 200)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(CONTENT)}")
        self.send_header("ETag", "v1")
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/endless":
            self.server.sent = 0  # type: ignore[attr-defined]
            while self.server.sent < 2**26:  # type: ignore[attr-defined]
                self.server.sent += self.wfile.write(bytes(2**16))  # type: ignore[attr-defined]
        for part in range(10):
            self.wfile.write(body[part * len(body) // 10 : (part + 1) * len(body) // 10])
            time.sleep(0.4 if self.path == "/slow" else 0)

    def log_message(self, format: str, *arguments: object) -> None:
        """Not to the terminal."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.handle_error = True, lambda *_: None  # type: ignore[method-assign, assignment]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_ranges(url):
    web = WebStore(5)
    assert stored(web, f"{url}/ranges") == (len(CONTENT), "v1")
    assert web.cat_file(f"{url}/ranges", 300, 700) == CONTENT[300:700]
    assert read_file(f"{url}/whole", len(CONTENT), 0) == CONTENT
    with pytest.raises(StoreError, match="range"):
        read_file(f"{url}/whole", 100, 0)
    with pytest.raises(PermissionError, match="range"):
        web.cat_file(f"{url}/whole", 300, 700)


def test_a_body_without_end_is_left(url, server):
    with pytest.raises(StoreError, match="range"):
        read_file(f"{url}/endless", 100, 0)
    assert server.sent < 2**25


def test_a_transfer_that_goes_on_is_not_cut(url, tmp_path):
    """It takes twice as long as the server may be silent."""
    WebStore(2).get_file(f"{url}/slow", str(tmp_path / "x"), len(CONTENT))
    assert (tmp_path / "x").read_bytes() == CONTENT
    with pytest.raises(ConnectionError, match="100 bytes"):
        WebStore(2).get_file(f"{url}/slow", str(tmp_path / "x"), 100)


def test_a_silent_server_is_left_when_the_patience_is_over_and_silence_is_said(monkeypatch, caplog):
    monkeypatch.setattr(store, "SILENCE", 0.2)
    monkeypatch.setattr(store, "FIRST_WAIT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(StoreError, match=r"data\.store_patience"):
            read_file(f"http://127.0.0.1:{silent.getsockname()[1]}/x", 100, patience=1)
        assert 0.9 < time.monotonic() - began < 60
    assert "does not answer (TimeoutError" in caplog.text


@pytest.mark.parametrize(("patience", "silence"), [(600, 10), (5, 5), (0.1, 1), (0, 10)])
def test_one_attempt_waits_no_longer_than_the_patience(patience, silence):
    """Without patience, as shards are fetched ahead, there is one attempt, which may take the usual time."""
    assert store.ask("https://host/x", patience, lambda web: web.timeout) == silence


PUBLIC, OTHER = "93.184.216.34", "8.8.8.8"
MOVED = ("", 302, "", {})


def test_no_redirect_leads_to_http():
    request = Request(f"https://{PUBLIC}/x.tar")
    found = SafeRedirects().redirect_request(request, *MOVED, f"https://{OTHER}/x.tar")
    assert found.full_url == f"https://{OTHER}/x.tar"
    with pytest.raises(PermissionError, match="https to http"):
        SafeRedirects().redirect_request(request, *MOVED, f"http://{OTHER}/x.tar")


@pytest.mark.parametrize(
    "inside",
    ["127.0.0.1:8080", "localhost", "127.1", "10.0.0.1", "169.254.169.254", "0.0.0.0", "[::1]", "[::ffff:7f00:1]"],
)
def test_no_redirect_leads_from_outside_into_the_private_network(inside):
    step = SafeRedirects().redirect_request(Request(f"https://{PUBLIC}/x.tar"), *MOVED, f"https://{OTHER}/x.tar")
    with pytest.raises(PermissionError, match="private"):  # also at the second step
        SafeRedirects().redirect_request(step, *MOVED, f"https://{inside}/x.tar")
    request = Request(f"https://{inside}/x.tar")
    moved = SafeRedirects().redirect_request(request, *MOVED, "https://192.168.0.1/x.tar")
    assert moved.full_url == "https://192.168.0.1/x.tar"


def test_a_redirect_within_this_machine_is_followed(url, monkeypatch):
    def redirect(handler: Handler) -> None:
        handler.send_response(302)
        handler.send_header("Location", f"{url}/ranges")
        handler.end_headers()

    answer = Handler.do_GET
    monkeypatch.setattr(Handler, "do_GET", lambda self: redirect(self) if self.path == "/moved" else answer(self))
    assert read_file(f"{url}/moved", len(CONTENT), 0) == CONTENT

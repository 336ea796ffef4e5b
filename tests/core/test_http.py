"""Proxies in every form people write them, loopback never among them, and failures in one sentence."""

from __future__ import annotations

import gc
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import httpx2
import pytest

from glmchat import __version__
from glmchat.core.errors import NetworkFailed, Usage
from glmchat.core.http import (
    ProxyRules,
    host_of,
    is_loopback,
    make_client,
    network_error,
    normal_proxy,
    trusted_certificates,
    without_password,
)
from glmchat.core.http_bounds import is_here


class _Echo(BaseHTTPRequestHandler):
    """A web server and, asked for an absolute address, an HTTP proxy: both answer with what they saw."""

    def do_GET(self) -> None:
        seen = f"{self.path} {self.headers.get('user-agent')} {self.headers.get('proxy-authorization')}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(seen)))
        self.end_headers()
        self.wfile.write(seen)

    def log_message(self, *_: object) -> None:
        pass


class _Socks(socketserver.BaseRequestHandler):
    """Just enough of SOCKS5 (RFC 1928): reads where to, then answers as if it were that server."""

    def handle(self) -> None:
        self.request.recv(2 + self.request.recv(2, socket.MSG_PEEK)[1])
        self.request.sendall(b"\x05\x00")
        asked = self.request.recv(512)
        self.request.sendall(b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
        self.request.recv(4096)
        body = b"socks to " + asked[5 : 5 + asked[4]] if asked[3] == 3 else b"socks"
        self.request.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)
        )


def _served(server: socketserver.BaseServer) -> Iterator[int]:
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    _, port, *_ = cast(tuple[str, int], server.server_address)
    yield port
    server.shutdown()
    server.server_close()


@pytest.fixture
def web() -> Iterator[int]:
    yield from _served(ThreadingHTTPServer(("127.0.0.1", 0), _Echo))


@pytest.fixture
def socks() -> Iterator[int]:
    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    yield from _served(Server(("127.0.0.1", 0), _Socks))


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize(
    "form", ["http://127.0.0.1:{}", "127.0.0.1:{}", "'http://127.0.0.1:{}/'", "HTTP://127.0.0.1:{}"]
)
def test_an_http_proxy_is_used_for_hosts_elsewhere(web: int, name: str, form: str) -> None:
    with make_client(environ={name: form.format(web)}) as client:
        assert client.get("http://example.invalid/x").text.startswith("http://example.invalid/x ")


@pytest.mark.parametrize(
    "form", ["socks5://127.0.0.1:{}", "socks://127.0.0.1:{}/", "socks5h://127.0.0.1:{}", "SOCKS://127.0.0.1:{}"]
)
def test_a_socks_proxy_is_used_also_as_gnome_writes_it(socks: int, form: str) -> None:
    with make_client(environ={"ALL_PROXY": form.format(socks)}) as client:
        assert client.get("http://example.invalid/").text == "socks to example.invalid"


def test_a_socks_proxy_without_a_scheme_is_one(socks: int) -> None:
    with make_client(environ={"SOCKS_PROXY": f"127.0.0.1:{socks}"}) as client:
        assert client.get("http://example.invalid/").text.startswith("socks")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.8.9.10", "0.0.0.0"])
def test_loopback_never_goes_through_a_proxy(host: str) -> None:
    rules = ProxyRules.from_environment({"HTTP_PROXY": "http://127.0.0.1:1", "ALL_PROXY": "nonsense proxy"})
    assert is_loopback(host) and rules.choose("http", host) is None


def test_a_local_server_answers_although_the_proxy_is_dead_or_nonsense(web: int) -> None:
    for value in ("http://127.0.0.1:1", "::::", "gopher://x"):
        with make_client(f"http://127.0.0.1:{web}", environ={"HTTP_PROXY": value, "ALL_PROXY": value}) as client:
            assert client.get("/here").text.startswith("/here ")


def test_a_unix_socket_answers_although_a_proxy_is_set(tmp_path: Path) -> None:
    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True

        def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
            return super().get_request()[0], ("unix", 0)

    path = tmp_path / "s"
    server = Server(str(path), _Echo)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    with make_client(uds=str(path), environ={"ALL_PROXY": "http://127.0.0.1:1"}) as client:
        assert client.get("/v1/models").text.startswith("/v1/models ")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("entry", "host", "direct"),
    [
        ("*", "anything.example", True),
        ("example.com", "example.com", True),
        ("example.com", "www.example.com", True),
        (".example.com", "www.example.com", True),
        ("*.example.com", "www.example.com", True),
        ("example.com", "notexample.com", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("fd00::/8", "[fd12::1]", True),
        ("example.com:8080", "example.com", False),
        ("example.com:80", "example.com", True),
        ("other.org, EXAMPLE.com", "Example.COM", True),
        ("", "example.com", False),
    ],
)
def test_no_proxy_means_what_curl_means(entry: str, host: str, direct: bool) -> None:
    rules = ProxyRules.from_environment({"HTTP_PROXY": "http://proxy.example:1", "NO_PROXY": entry})
    assert (rules.choose("http", host) is None) is direct


def test_lower_case_wins_and_an_empty_value_switches_off() -> None:
    both = {"https_proxy": "http://low:1", "HTTPS_PROXY": "http://up:1"}
    assert ProxyRules.from_environment(both).choose("https", "a.example") == "http://low:1"
    assert ProxyRules.from_environment(both | {"https_proxy": ""}).choose("https", "a.example") is None


def test_in_a_cgi_process_a_request_header_is_no_proxy() -> None:
    rules = ProxyRules.from_environment({"HTTP_PROXY": "http://evil:1", "REQUEST_METHOD": "GET"})
    assert rules.choose("http", "a.example") is None


@pytest.mark.parametrize(
    "value",
    ["http://a b", "http://:80", "http://h:99999", "http://h:port", "http://[::1", "ftp://h:1", "http://", "a,b:1"],
)
def test_a_broken_proxy_is_one_clear_error_when_it_is_needed(value: str) -> None:
    with make_client(environ={"ALL_PROXY": value}) as client, pytest.raises(Usage) as caught:
        client.get("http://example.invalid/")
    assert "ALL_PROXY" in caught.value.message and caught.value.exit == 2 and "\n" not in caught.value.message


def test_a_proxys_password_is_sent_and_never_shown(web: int) -> None:
    with make_client(environ={"HTTP_PROXY": f"http://me:pa55@127.0.0.1:{web}"}) as client:
        assert "Basic bWU6cGE1NQ==" in client.get("http://example.invalid/").text
    with pytest.raises(Usage) as caught:
        normal_proxy("http://me:pa55@host:port", "HTTP_PROXY")
    assert "pa55" not in caught.value.message + caught.value.hint
    assert without_password("http://me:pa55@host/x@y") == "http://***@host/x@y"


def test_the_user_agent_names_glmchat(web: int) -> None:
    with make_client(f"http://127.0.0.1:{web}") as client:
        assert f"glmchat/{__version__}" in client.get("/").text


def test_failures_name_the_host_and_keep_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://me:pa55@127.0.0.1:{closed.getsockname()[1]}/x?signature=secret"
        with make_client(timeout=1.0) as client, pytest.raises(httpx2.HTTPError) as caught:
            client.get(url)
    error = network_error(caught.value, url)
    assert isinstance(error, NetworkFailed) and host_of(url) in error.message and error.hint
    assert "pa55" not in error.message and "secret" not in error.message
    monkeypatch.setenv("ALL_PROXY", "http://me:pa55@proxy.example:3128")
    error = network_error(httpx2.ConnectError("refused"), "https://example.org/x")
    assert "proxy.example:3128" in error.message and "pa55" not in error.message and "PROXY" in error.hint


def test_importing_it_loads_no_http_library() -> None:
    code = "import sys, glmchat.core.http; sys.exit('httpx2' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], cwd="/", check=False).returncode == 0


def self_signed(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate that nobody trusts, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "9", "-subj", f"/CN={name}"]
    command += ["-addext", f"subjectAltName=DNS:{name}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of an https server on loopback whose certificate is for another name, and that certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    certificate, key = self_signed(tmp_path, "hub.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"https://127.0.0.1:{server.server_address[1]}/", certificate
    server.shutdown()
    server.server_close()


def failure_of(url: str) -> NetworkFailed:
    with make_client() as client, pytest.raises(httpx2.HTTPError) as caught:
        client.get(url)
    failure = network_error(caught.value, url)
    assert isinstance(failure, NetworkFailed)
    return failure


def test_a_certificate_that_nobody_trusts_names_the_variable_that_helps(
    secure: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    url, certificate = secure
    assert "SSL_CERT_FILE" in failure_of(url).hint
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    assert failure_of(url).hint.startswith("REQUESTS_CA_BUNDLE is not read here")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # now it is trusted, and is another server's
    failure = failure_of(url)
    assert "could not be verified" in failure.message and "another server" in failure.hint


def test_an_expired_certificate_points_at_the_clock() -> None:
    error = httpx2.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired")
    assert "clock" in network_error(error, "https://hub.example").hint


@pytest.mark.parametrize("name", ["no such file", "not a certificate"])
def test_a_file_of_certificates_that_cannot_be_read_is_named_before_anything_is_asked(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "company.pem"
    if name == "not a certificate":
        file.write_text("hello")
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with make_client() as client, pytest.raises(Usage) as caught:
        client.get("https://hub.example/")
    assert "SSL_CERT_FILE" in caught.value.message and str(file) in caught.value.message
    with pytest.raises(Usage):
        trusted_certificates()


@pytest.mark.parametrize("host", ["localhost", "a.localhost.", "[::1]", "::ffff:127.0.0.1", "0.0.0.0", "::"])
def test_a_loopback_host_is_this_machine(host: str) -> None:
    assert is_loopback(host) and is_here(host)


@pytest.mark.parametrize(("host", "here"), [("169.254.169.254", True), ("10.0.0.1", False), ("localhost.com", False)])
def test_other_hosts_are_no_loopback(host: str, here: bool) -> None:
    assert not is_loopback(host) and is_here(host) is here


@pytest.mark.filterwarnings("always::ResourceWarning")
def test_no_socket_stays_open_where_nobody_listens(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """httpcore2 leaves one to the collector of garbage, which says so in whatever runs then."""
    with make_client(uds=str(tmp_path / "nobody.sock")) as client, pytest.raises(httpx2.ConnectError):
        client.get("/")
    gc.collect()
    assert [warning for warning in recwarn if warning.category is ResourceWarning] == []

"""Opens MLflow's UI on the store of a search."""

import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Callable

from slimfront.search.tracking.server import server_command, server_environment
from slimfront.search.tracking.store import connect, find_search, run_route
from slimfront.trainables.errors import UserError
from slimfront.trainables.redaction import without_secrets

_START_TIMEOUT_S = 60.0


def open_ui(
    uri: str, search: str | None, port: int, *, browser: bool, say: Callable[[str], None]
) -> None:
    """Opens the page of `search` (None: the latest). For a store without a server it runs one until
    Ctrl-C.

    Raises:
        UserError: if there is no such search, the store does not answer, or the port is taken.
    """
    run = find_search(connect(uri), search)
    page = run_route(run.info.experiment_id, run.info.run_id)
    if uri.startswith(("http:", "https:")):
        _announce(without_secrets(uri).rstrip("/") + page, browser, say)
        return
    _refuse_taken_port(port)
    # So that the server ends with us, however we are ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with subprocess.Popen(
        server_command(port),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=server_environment(uri),
    ) as server:
        try:
            _wait_until_up(server, f"http://127.0.0.1:{port}")
            _announce(f"http://127.0.0.1:{port}{page}", browser, say)
            say("Ctrl-C ends it.")
            server.communicate()
        except KeyboardInterrupt:
            say("Ended.")
        finally:
            server.terminate()


def _announce(url: str, browser: bool, say: Callable[[str], None]) -> None:
    say(url)
    if browser:
        webbrowser.open(url)


def _refuse_taken_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(f"port {port} is taken; choose another one with --port") from None


def _wait_until_up(server: "subprocess.Popen[bytes]", url: str) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    # No proxy reaches this machine's own server.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        if server.poll() is not None:
            said = (
                (server.stderr.read() if server.stderr else b"")
                .decode(errors="replace")
                .strip()
                .splitlines()
            )
            raise UserError(
                f"the MLflow server ended at once: {said[-1] if said else 'it did not say why'}"
            )
        try:
            with direct.open(f"{url}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise UserError(f"the MLflow server did not answer within {_START_TIMEOUT_S:.0f} s")

"""From an engine directory to a listening server, and its end."""

from __future__ import annotations

import os
import socket

import uvicorn
from fastapi import FastAPI

from fasa_trt.core.errors import FasaError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises FasaError where that is not possible."""
    if not 0 <= port < 2**16:  # getaddrinfo would take it modulo 2^16
        raise FasaError(f"port {port} is not possible", hint="0 to 65535")
    try:
        hints: dict[str, int] = {"type": socket.SOCK_STREAM, "proto": socket.IPPROTO_TCP, "flags": socket.AI_PASSIVE}
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, **hints)[0]
        # Not socket.create_server, which leaves the protocol out: asyncio then leaves Nagle's algorithm on.
        listening = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # a restart need not wait for old connections; on Windows it would share the port
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(2048)
        except BaseException:
            listening.close()
            raise
        return listening
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FasaError(
            f"cannot listen on {host} port {port}: {reason}", hint="choose another --host or --port"
        ) from None


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listening: socket.socket) -> bool:
    host = str(listening.getsockname()[0])
    return host.startswith("127.") or host == "::1"


def run(app: FastAPI, listening: socket.socket, *, shutdown_timeout: int, access_log: bool = False) -> None:
    """Serves until SIGINT or SIGTERM; then takes no more connections and gives answers shutdown_timeout seconds to
    end. The signal is raised again afterwards."""
    uvicorn_server(app, shutdown_timeout=shutdown_timeout, access_log=access_log).run(sockets=[listening])


def uvicorn_server(app: FastAPI, *, shutdown_timeout: int, access_log: bool) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="info" if access_log else "warning",
            access_log=access_log,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=shutdown_timeout,
        )
    )

"""Bind a port, and serve on it until SIGTERM or Ctrl-C."""

import gc
import signal
import socket
import sys

import uvicorn

from dllm.errors import UserError


def bind(host: str, port: int) -> socket.socket:
    """A socket on an address.

    Raises: UserError if the address is taken, or is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends without delay only if the protocol is named; otherwise the first canvas of a stream waits 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(1)  # now, because two sockets may share a port until one listens
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen on {host}, port {port}: {reason.lower()}; choose another --port") from None
    return listening


def serve(app, listening: socket.socket) -> None:
    """Answer requests. On SIGTERM the server takes no more, and answers those that it has taken."""
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    server = make_server(app)

    def end(*_) -> None:
        if not server.started:  # and so has taken nothing; later uvicorn raises the signal again as it ends
            sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    print(f"serving on http://{host}:{port}", file=sys.stderr, flush=True)
    # Nothing loaded so far becomes garbage, and looking through all of it halts every request for tenths of a second.
    gc.collect()
    gc.freeze()
    try:
        server.run(sockets=[listening])
    finally:
        gc.unfreeze()  # otherwise libraries report leaks as the process ends


def make_server(app) -> uvicorn.Server:
    # Idle connections stay open longer than in clients and proxies (5 to 60 s); otherwise these reuse one as it closes.
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=75))

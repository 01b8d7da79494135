"""A port, and the server on it until SIGTERM or Ctrl-C."""

import signal
import socket
import sys

import uvicorn

from dllm.errors import UserError


def bind(host: str, port: int) -> socket.socket:
    """A socket on that address.

    Raises: UserError if it is taken, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends without delay only where the protocol is named; else a stream's first canvas waits 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(1)  # now, as two sockets may share a port until one listens
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen on {host}, port {port}: {reason.lower()}; choose another --port") from None
    return listening


def serve(app, listening: socket.socket) -> None:
    """Answer requests. On SIGTERM no more are taken, and those begun are answered first."""
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it once more when it has ended
    print(f"serving on http://{host}:{port}", file=sys.stderr, flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listening])

"""By which network interface this machine meets the others, where its own name does not say.

Gloo, which ranks agree by on the host, listens at the address that the machine's name stands for. Many systems give
their own name a loopback address (127.0.1.1), at which no other machine can reach it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

_SIOCGIFADDR = 0x8915


def facing(master: str) -> str | None:
    """The interface that reaches `master`, where the name of this machine would not do; None where nothing is to be
    set: it would, GLOO_SOCKET_IFNAME says another, or all ranks are on this machine.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or not _is_loopback(socket.gethostname()) or _is_loopback(master):
        return None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as reached:
            reached.connect((master, 9))  # sends nothing: asks the routes
            own = reached.getsockname()[0]
    except OSError:
        return None
    return next((name for _, name in socket.if_nameindex() if _address(name) == own), None)


def _is_loopback(name: str) -> bool:
    """Whether a name stands for a loopback address, or for none."""
    try:
        return socket.gethostbyname(name).startswith("127.")
    except OSError:
        return True


def _address(interface: str) -> str | None:
    """The IPv4 address of an interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])

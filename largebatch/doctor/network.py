"""Names, addresses, interfaces and ports: can ranks on other hosts connect to those here?"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Mapping

from largebatch.distributed.facilities import try_rendezvous
from largebatch.doctor.finding import Finding, judged

Resolve = Callable[[str], list[str]]
_NAMED = "fix /etc/hosts or the name server; until then use torchrun --local-addr=ADDRESS and GLOO_SOCKET_IFNAME=eth0"


def resolve(name: str) -> list[str]:
    """The addresses of a host name, most wanted first; none if it has none."""
    try:
        entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


def can_bind(address: str) -> bool:
    """Whether a port of this address can be had here."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as made:
            made.bind((address, 0))
    except OSError:
        return False
    return True


def check_host_name(name: str, addresses: list[str], bind: Callable[[str], bool] = can_bind) -> Finding:
    """The machine's own name: torchrun announces it under that name, and gloo listens there."""
    subject = "host name"
    if not addresses:
        return Finding(subject, "warning", f"{name} has no address", f"several hosts could not connect: {_NAMED}")
    seen = f"{name} is {', '.join(addresses)}"
    if not any(bind(address) for address in addresses):
        return Finding(subject, "error", f"{seen}, which is not an address of this machine", _NAMED)
    # A scope (fe80::1%eth0) says nothing of the address.
    local = all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)
    return judged(subject, seen, f"only this machine can reach that: for several hosts {_NAMED}" if local else "")


def check_interfaces(environ: Mapping[str, str], interfaces: list[str]) -> Finding:
    """The interfaces that GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name must exist."""
    known = ", ".join(interfaces) or "none"
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # NCCL also takes lists, prefixes, =exact and ^not; gloo lists.
        wanted = environ.get(variable, "")
        names = [name.lstrip("=") for name in wanted.split(",") if name and not wanted.startswith("^")]
        for name in names:
            exact = variable.startswith("GLOO") or wanted.startswith("=")
            if not any(there == name if exact else there.startswith(name) for there in interfaces):
                remedy = f"this machine has {known}: set {variable} to one of them"
                return Finding("interfaces", "error", f"{variable}={wanted}: no interface {name}", remedy)
    chosen = environ.get("GLOO_SOCKET_IFNAME") or "left to gloo (the host name's)"
    return Finding("interfaces", "ok", f"{known}; chosen: {chosen}")


def check_rendezvous(environ: Mapping[str, str], find: Resolve = resolve) -> Finding:
    """Meets itself over TCP on a free port; and MASTER_ADDR, where it is set, must be known."""
    address = environ.get("MASTER_ADDR")
    if address and not find(address):
        remedy = "set it to the first host's name or address, as this host sees it"
        return Finding("rendezvous", "error", f"MASTER_ADDR={address} has no address", remedy)
    try:
        port = try_rendezvous("127.0.0.1")
    except (RuntimeError, OSError) as error:
        remedy = "no process can open a port here: check the network of the container or machine"
        return Finding("rendezvous", "error", str(error).splitlines()[0], remedy)
    return Finding("rendezvous", "ok", f"connected to itself on free port {port}")

"""Internet addresses: public address checks, host parsing and name resolution."""

import asyncio
import concurrent.futures
import functools
import ipaddress
import socket
import threading
import urllib.parse

import pebble

# Ranges that the IANA special-purpose address registries (RFC 6890) reserve, and addresses of cloud
# providers' metadata services.
_SPECIAL = tuple(map(ipaddress.ip_network, (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24",
    "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/3",  # multicast, reserved, broadcast
    "168.63.129.16/32",  # Azure
    "2001::/23",  # IETF protocol assignments: Teredo, benchmarking, ORCHID, AMT, ..
    "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20",
)))  # fmt: skip
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: IPv4 destinations of IPv6-only hosts
_MAPPED = ipaddress.ip_network("::ffff:0:0/96")
# RFC 5214: the interface identifier embeds an IPv4 address; the mask ignores its u and g bits.
_ISATAP, _ISATAP_BITS = 0x00005EFE, 0xFCFFFFFF


def is_public(address: str) -> bool:
    """Return whether an IP address is global unicast and outside all special-purpose ranges.

    An address that embeds an IPv4 address (mapped, NAT64) is public if the IPv4 address is. 6to4,
    Teredo, SIIT and ISATAP addresses are not used on the web and are never public.
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _MAPPED or ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in _GLOBAL_UNICAST or (int(ip) >> 32) & _ISATAP_BITS == _ISATAP:
            return False
    return not any(ip in network for network in _SPECIAL if network.version == ip.version)


def parse_host(text: str) -> tuple[str, int | None]:
    """Return (host, port or None) of `host`, `host:port` or a URL.

    A URL without a port has the default port of its scheme. The host is normalised for comparison:
    lower case, IDNA, IPv6 addresses compressed and without brackets, no trailing dot.

    Raises:
      ValueError: The text has none of these forms.
    """
    if text.count(":") > 1 and "[" not in text and "://" not in text:
        text = f"[{text}]"  # a bare IPv6 address
    parts = urllib.parse.urlsplit(text if "://" in text else f"//{text}")
    host, port = parts.hostname, parts.port
    if not host:
        raise ValueError(f"{text!r} does not name a host")
    if port is None:
        port = {"http": 80, "https": 443}.get(parts.scheme)
    return normalise_host(host), port


def normalise_host(host: str) -> str:
    """Return a host in the normal form that `parse_host` describes."""
    host = host.strip("[]").rstrip(".").lower()
    try:
        return ipaddress.ip_address(host).compressed
    except ValueError:
        pass
    try:
        return host.encode("idna").decode("ascii")
    except UnicodeError:
        return host


class _Resolver:
    """Name resolver with its own thread pool; concurrent lookups of a name share one thread.

    `getaddrinfo` cannot be cancelled and takes as long as the name servers take. The threads are
    daemons, so the interpreter does not wait for them at exit.

    Args:
      max_threads: Maximum number of concurrent lookups.
    """

    def __init__(self, max_threads: int):
        self._max_threads = max_threads
        self._lock = threading.Lock()
        self._pool: pebble.ThreadPool | None = None
        self._running: dict[tuple[str, int], concurrent.futures.Future] = {}

    async def resolve(self, host: str, port: int) -> list[str]:
        """Return the addresses of a host. Raises OSError, UnicodeError."""
        key = (host, port)
        with self._lock:
            if self._pool is None:
                self._pool = pebble.ThreadPool(self._max_threads)
            future = self._running.get(key)
            if future is None:
                call = functools.partial(_look_up, host, port)
                future = self._running[key] = self._pool.schedule(call)
        future.add_done_callback(functools.partial(self._forget, key))
        # Shielded, since other callers may wait for the same lookup.
        return await asyncio.shield(asyncio.wrap_future(future))

    def _forget(self, key: tuple[str, int], future: concurrent.futures.Future) -> None:
        with self._lock:
            if self._running.get(key) is future:
                del self._running[key]


def _look_up(host: str, port: int) -> list[str]:
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


# Separate pools, so that lookups of configured hosts never wait behind those of names from pages.
trusted_resolver = _Resolver(8)
untrusted_resolver = _Resolver(32)

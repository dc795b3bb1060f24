"""Public addresses, allowed hosts, and name lookups."""

import asyncio
import os
import pathlib
import socket
import subprocess
import sys
import threading

import pytest

from mmsr1_jax.tools import addresses
from mmsr1_jax.tools.addresses import is_public, parse_host
from mmsr1_jax.tools.web import RefusedError, UnreachableError, WebClient


def parse_list(text):
    return text.split()


# Addresses of every block of the IANA special-purpose registries, and addresses that embed a
# private one.
PRIVATE = parse_list("""
0.0.0.0 0.1.2.3 10.1.1.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1
127.255.255.254 169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.170 192.0.0.192
192.0.2.1 192.31.196.1 192.52.193.1 192.88.99.1 192.168.0.1 192.175.48.1 198.18.0.1 198.19.255.255
198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 168.63.129.16
:: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:0:127.0.0.1 ::ffff:0:8.8.8.8
64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1 64:ff9b:1:ffff:ffff:ffff:808:808 100::1 100:0:0:1::1
2001::1 2001:0:7f00:1:: 2001:1::1 2001:2::1 2001:3::1 2001:4:112::1 2001:10::1 2001:20::1
2001:1ff::1
2001:db8::1 2002:7f00:1:: 2002:808:808:: 2620:4f:8000::1 3fff::1 3fff:fff:ffff::1 4000::1 5f00::1
8000::1 fc00::1 fd00:ec2::254 fd20:ce::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1 ff0e::1
2606:4700:0:1:0:5efe:7f00:1 2606:4700:0:1:200:5efe:a00:1 2606:4700:0:1:0:5efe:808:808
""")
PUBLIC = parse_list("""
8.8.8.8 1.1.1.1 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.1 172.15.0.1 172.32.0.1 192.0.1.1
192.167.255.255 198.17.255.255 198.20.0.1 223.255.255.255 ::ffff:8.8.8.8 64:ff9b::808:808
2001:200::1 2001:4860:4860::8888 2003::1 2606:4700::1111 2620:4f:7fff::1 2a00:1450::1 3ffe::1
2606:4700:0:1:1:5efe:7f00:1
""")


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "text", ["", "name", "1.2.3", "0x7f.1", "127.1", "1.2.3.4.5", ":::", "٨.8.8.8"]
)
def test_malformed_addresses_are_not_public(text):
    assert not is_public(text)


@pytest.mark.parametrize("text, host, port", [
    ("localhost", "localhost", None), ("LOCALHOST.:80", "localhost", 80),
    ("http://LocalHost/v1", "localhost", 80), ("https://a.example", "a.example", 443),
    ("http://user:word@a.example:9/x?y", "a.example", 9), ("[::1]:8000", "::1", 8000),
    ("http://[0:0:0:0:0:0:0:1]:8000/", "::1", 8000), ("::1", "::1", None),
    ("fe80::0001", "fe80::1", None), ("http://bücher.example", "xn--bcher-kva.example", 80),
    ("redis://10.0.0.1:6379/0", "10.0.0.1", 6379),
])  # fmt: skip
def test_parse_host_normalises_hosts(text, host, port):
    assert parse_host(text) == (host, port)


@pytest.mark.parametrize("text", ["", "http://", ":80", "a:b", "http://a:99999999/"])
def test_text_without_a_host_is_rejected(text):
    with pytest.raises(ValueError):
        parse_host(text)


def is_refused(web, url):
    """Return whether the address was refused, rather than unreachable."""
    try:
        asyncio.run(web.request("GET", url, accept=()))
    except RefusedError:
        return True
    except UnreachableError:
        return False
    raise AssertionError("the request succeeded")


def test_allowed_host_allows_only_that_host_and_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    client = WebClient(allowed_hosts=[f"http://127.0.0.1:{port}/v1"], timeout=60)
    assert not is_refused(client, f"http://127.0.0.1:{port}/x")
    assert is_refused(client, f"http://127.0.0.1:{port + 1}/x")
    assert is_refused(client, f"http://localhost:{port}/x")  # another name
    ipv6_client = WebClient(allowed_hosts=["http://[0:0::1]:9/"], timeout=60)
    assert not is_refused(ipv6_client, "http://[::1]:9/")
    assert is_refused(ipv6_client, "http://[::1]:10/")
    assert is_refused(ipv6_client, "http://[::ffff:127.0.0.1]:9/")
    default_port_client = WebClient(allowed_hosts=["http://localhost"], timeout=60)
    assert is_refused(default_port_client, "http://localhost:8/")  # allowed on port 80 only


@pytest.fixture
def slow_names(monkeypatch):
    """Lookups of names that end in .slow do not return before the test ends; yields the names."""
    finished, names = threading.Event(), []
    real = socket.getaddrinfo

    def getaddrinfo(host, *rest, **keywords):
        if str(host).endswith(".slow"):
            names.append(host)
            finished.wait()
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return real(host, *rest, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield names
    finished.set()


def test_slow_lookups_do_not_delay_configured_services_or_threads(slow_names):
    web, configured = WebClient(timeout=600), WebClient(allowed_hosts=["localhost:1"], timeout=600)

    async def main():
        names = [f"http://a{i % 50}.slow/" for i in range(200)]
        waiting = [asyncio.ensure_future(web.request("GET", url, accept=())) for url in names]
        await asyncio.sleep(0)
        with pytest.raises(UnreachableError):
            await configured.request("GET", "http://localhost:1/", accept=())
        assert await asyncio.to_thread(len, "abc") == 3
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(main())
    assert len(slow_names) == len(set(slow_names)) <= 50  # each name is looked up once


def test_cancelled_lookup_continues_for_other_callers(monkeypatch):
    answer_lookup = threading.Event()

    def getaddrinfo(host, port, **keywords):
        answer_lookup.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    async def main():
        first = asyncio.ensure_future(addresses.untrusted_resolver.resolve("some.example", 80))
        second = asyncio.ensure_future(addresses.untrusted_resolver.resolve("some.example", 80))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        answer_lookup.set()
        return await second

    assert asyncio.run(main()) == ["192.0.2.7"]


def test_pending_lookup_does_not_block_exit():
    program = """
import asyncio, socket, time
socket.getaddrinfo = lambda *a, **k: time.sleep(10_000)
from mmsr1_jax.tools.web import WebClient, WebError
async def main():
    try:
        await WebClient(timeout=0.2).request("GET", "http://a.example/", accept=())
    except WebError as error:
        print(error)
asyncio.run(main())
"""
    root = pathlib.Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    # The lookup takes hours; the timeout allows for a busy machine.
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env=environment, timeout=120)  # fmt: skip
    assert process.returncode == 0 and "did not respond in time" in process.stdout, process.stderr

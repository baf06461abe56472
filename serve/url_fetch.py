"""Fetching images by URL without letting the caller reach where only the server can: off unless hosts are
named.

Each URL, and each redirect again, must name an allowed host on its scheme's own port; its addresses are
resolved here, must all be global, and the connection goes to the address that was checked, not to a name that
is resolved
again.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import httpx

from serve.bodies import ByteAccount
from serve.errors import ErrorCode, ServeError
from serve.items import ImageItem, Item, UrlItem

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[Address]]]
MAX_REDIRECTS = 3
CONCURRENT_FETCHES = 32  # of all requests together
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_PORTS = {"http": 80, "https": 443}


async def resolve(host: str, port: int) -> list[Address]:
    """All addresses of a host."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, seen through IPv6 forms that wrap an IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address.sixtofour is not None or address.teredo is not None or address in _NAT64:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


@cache
def tls() -> ssl.SSLContext:
    """One for all connections: reading the certificates takes the event loop some 25 ms."""
    return httpx.create_ssl_context(trust_env=False)


@dataclass(frozen=True)
class UrlFetcher:
    """One for all requests, so that they share its slots."""

    hosts: frozenset[str]
    timeout_s: float
    max_bytes: int
    resolve: Resolve = resolve
    is_allowed: Callable[[Address], bool] = is_public
    ports: tuple[int, ...] = (80, 443)
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(CONCURRENT_FETCHES))

    async def fetch(self, url: str, account: ByteAccount) -> bytes:
        """The image's bytes, held in `account` as they arrive. Raises ServeError url_fetch_disabled,
        url_forbidden, url_fetch_failed, image_too_large, queue_full.
        """
        if not self.hosts:
            message = "image_url is off on this server; send the image itself as a data URI"
            raise ServeError(ErrorCode.URL_FETCH_DISABLED, message)
        try:
            async with self.slots, asyncio.timeout(self.timeout_s):
                return await self._follow(url, account)
        except (TimeoutError, httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise ServeError(
                ErrorCode.URL_FETCH_FAILED, "the image could not be fetched from its URL in time"
            ) from error

    async def _follow(self, url: str, account: ByteAccount) -> bytes:
        here = httpx.URL(url)
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._get(here, account)
            if isinstance(answer, bytes):
                return answer
            here = here.join(answer)
        raise ServeError(ErrorCode.URL_FETCH_FAILED, f"the URL redirects more than {MAX_REDIRECTS} times")

    async def _get(self, url: httpx.URL, account: ByteAccount) -> bytes | httpx.URL:
        """The body, or where a redirect leads."""
        address = await self._checked_address(url)
        pinned = url.copy_with(host=str(address), username=None, password=None)
        headers = {"Host": url.netloc.decode("ascii"), "Accept": "image/*", "User-Agent": "clipstack-serve"}
        names = {"sni_hostname": url.raw_host.decode()}
        # A client for each: it would use the connection to one host again for another on the same address.
        async with (
            httpx.AsyncClient(verify=tls(), trust_env=False, timeout=self.timeout_s) as client,
            client.stream("GET", pinned, headers=headers, extensions=names) as response,
        ):
            if response.is_redirect:
                return httpx.URL(response.headers.get("location", ""))
            if response.status_code != httpx.codes.OK:
                raise ServeError(
                    ErrorCode.URL_FETCH_FAILED, f"the URL answers with status {response.status_code}"
                )
            return await self._read(response, account)

    async def _checked_address(self, url: httpx.URL) -> Address:
        port = url.port or _PORTS.get(url.scheme)
        if (
            url.scheme not in _PORTS
            or port not in self.ports
            or url.userinfo
            or url.host.lower() not in self.hosts
        ):
            message = "this server fetches images only over http or https from hosts that its settings name"
            raise ServeError(ErrorCode.URL_FORBIDDEN, message)
        addresses = await self.resolve(url.host, port)
        if not addresses or not all(self.is_allowed(address) for address in addresses):
            raise ServeError(
                ErrorCode.URL_FORBIDDEN, "the URL's host has an address that is not on the public internet"
            )
        return addresses[0]

    async def _read(self, response: httpx.Response, account: ByteAccount) -> bytes:
        body = bytearray()
        async for chunk in response.aiter_raw():
            if len(body) + len(chunk) > self.max_bytes:
                message = f"the image behind the URL has more than {self.max_bytes} bytes"
                raise ServeError(ErrorCode.IMAGE_TOO_LARGE, message)
            account.hold(len(chunk))
            body += chunk
        return bytes(body)


async def fetch_all(
    items: Sequence[Item], fetcher: UrlFetcher, account: ByteAccount, *, param: str
) -> list[Item]:
    """The items with every URL replaced by the image behind it. Raises ServeError naming the entry."""

    async def fetched(index: int, item: Item) -> Item:
        if not isinstance(item, UrlItem):
            return item
        try:
            return ImageItem(await fetcher.fetch(item.url, account))
        except ServeError as error:
            raise error.at(f"{param}[{index}]") from error

    if not any(isinstance(item, UrlItem) for item in items):
        return list(items)
    tasks = [asyncio.ensure_future(fetched(index, item)) for index, item in enumerate(items)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()

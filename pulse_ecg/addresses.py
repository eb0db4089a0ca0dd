"""Which addresses are public, so that a URL of a caller's choosing may lead to them (see :mod:`pulse_ecg.fetch`)."""

from __future__ import annotations

import ipaddress

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Refused on top of what `is_global` refuses; which of these that knows depends on Python's version.
_REFUSED: tuple[_Network, ...] = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",  # RFC 1122: this host
        "100.64.0.0/10",  # RFC 6598: carriers' and clouds' inner networks (100.100.100.200 is Alibaba's metadata)
        "168.63.129.16/32",  # Azure's wire server, a public-looking address inside every Azure network
        "192.0.0.0/24",  # RFC 6890: protocol assignments (192.0.0.192 is Oracle's metadata)
        "192.88.99.0/24",  # RFC 7526: 6to4 relays
        "198.18.0.0/15",  # RFC 2544: benchmarks
        "224.0.0.0/4",  # RFC 5771: multicast
        "240.0.0.0/4",  # RFC 1112: reserved, broadcast
        "2001::/23",  # RFC 2928: Teredo (which embeds IPv4), ORCHIDv2, benchmarks
        "2001:db8::/32",  # RFC 3849: documentation
        "2002::/16",  # RFC 3056: 6to4, embeds any IPv4 address
        "3fff::/20",  # RFC 9637: documentation
    )
)
# The only IPv6 space that is routed (RFC 4291 section 2.4).  Outside it lie all forms that smuggle an inner address:
# mapped ::ffff:0:0/96, compatible ::/96, NAT64 64:ff9b::/96 and 64:ff9b:1::/48, site-local fec0::/10, 5f00::/16.
_IPV6_UNICAST = ipaddress.IPv6Network("2000::/3")


def address_is_public(ip: str | ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address belongs to the public internet and embeds no other address; False for anything in doubt."""
    try:
        address = ipaddress.ip_address(str(ip))
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and (address.scope_id is not None or address not in _IPV6_UNICAST):
        return False
    return address.is_global and not any(address in network for network in _REFUSED)

"""Tokens of a balancer that rewrites addresses, read a second time, so that this and the crate `quic`
check each other. What they are made of is in quic/src/token/nat.rs."""

import ipaddress
import time

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.cmac import CMAC

# The clocks of balancer and server may differ by so many seconds.
SKEW = 2


class NatTokens:
    """The token handler of an aioquic server. It makes no tokens: the balancer does."""

    def __init__(self, sequence, key):
        self.sequence = sequence
        # Every token has a key of its own.
        cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
        self.derivation = cipher.update(b"quic-lb NAT" + bytes(5))
        # Whom the tokens were made for, by address and port.
        self.clients = []

    def validate_token(self, *, address, destination_cid, token, now):
        end = 1 + token[0]
        sequence, nonce, sealed = token[end], token[end + 1 : end + 13], token[end + 13 :]
        associated = token[: end + 13] + bytes([len(destination_cid)]) + destination_cid
        if sequence != self.sequence:
            raise ValueError("another key")
        derived = CMAC(algorithms.AES(self.derivation))
        derived.update(associated)
        try:
            body = AESGCM(derived.finalize()).decrypt(nonce, sealed, associated)
        except InvalidTag as error:
            raise ValueError("not sealed with the key") from error
        if int.from_bytes(body[:8], "big") + SKEW < time.time():
            raise ValueError("expired")
        ip = ipaddress.IPv6Address(body[8:24])
        self.clients.append((str(ip.ipv4_mapped or ip), int.from_bytes(body[24:26], "big")))
        return token[1:end]

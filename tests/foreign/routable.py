"""Routable connection IDs, encoded a second time, from draft-ietf-quic-load-balancers-21, so that
this and the crate `quic` check each other."""

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes


def aes(key, block):
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return encryptor.update(block) + encryptor.finalize()


def encode(config_id, key, server_id, nonce):
    """Section 5: in the clear, one block, or four passes."""
    text = server_id + nonce
    if key is not None:
        text = aes(key, text) if len(text) == 16 else four_passes(key, text)
    return bytes([config_id << 5 | len(text)]) + text


def four_passes(key, text):
    """Section 5.4.2. The middle octet of an odd number is shared: high bits left, low bits right."""
    length, half = len(text), (len(text) + 1) // 2
    left, right = bytearray(text[:half]), bytearray(text[length - half :])
    if length % 2:
        left[-1] &= 0xF0
        right[0] &= 0x0F
    for number in (1, 2, 3, 4):
        source, target = (left, right) if number % 2 else (right, left)
        block = bytes(source).ljust(14, b"\0") + bytes([length, number])
        for at, octet in enumerate(aes(key, block)[:half]):
            target[at] ^= octet
        if length % 2:
            left[-1] &= 0xF0
            right[0] &= 0x0F
    if length % 2:
        return bytes(left[:-1]) + bytes([left[-1] | right[0]]) + bytes(right[1:])
    return bytes(left + right)

"""The aioquic ends of `foreign_aioquic`: a server and a client that speak `exchange`.

The server says `ready PORT` and runs until its input ends. The client does what it is told, checks
what it gets, and ends with an error when anything is wrong.
"""

import argparse
import array
import asyncio
import hashlib
import sys

from aioquic.asyncio import QuicConnectionProtocol, connect, serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import DatagramFrameReceived, HandshakeCompleted
from aioquic.tls import CipherSuite, SessionTicket

ALPN = "quic-lb-echo"
# Octets between two moves or key updates.
EVERY = 200 * 1024


def pattern(length):
    words = array.array("I", range((length + 3) // 4))
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()[:length]


def configuration(arguments, is_client):
    made = QuicConfiguration(
        is_client=is_client, alpn_protocols=[ALPN], max_datagram_frame_size=65536
    )
    if arguments.chacha20:
        made.cipher_suites = [CipherSuite.CHACHA20_POLY1305_SHA256]
    return made


class Protocol(QuicConnectionProtocol):
    """Counts what matters, and returns or collects datagrams."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.resumed = False
        self.datagrams = asyncio.Queue(maxsize=100)

    def quic_event_received(self, event):
        super().quic_event_received(event)
        if isinstance(event, HandshakeCompleted):
            self.resumed = event.session_resumed
        if isinstance(event, DatagramFrameReceived):
            if self._quic.configuration.is_client:
                self.datagrams.put_nowait(event.data)
            else:
                self._quic.send_datagram_frame(event.data)
                self.transmit()

    async def rebind(self):
        """Goes on from another port, as if a NAT had moved."""
        old = self._transport
        loop = asyncio.get_running_loop()
        # Of both families, as the first one was.
        await loop.create_datagram_endpoint(lambda: self, local_addr=("::", 0))
        old.close()

    def connection_lost(self, error):
        """A socket was replaced: the connection goes on."""


# The server


async def answer(reader, writer):
    request = await reader.readline()
    if request.startswith(b"GET "):
        writer.write(pattern(int(request[4:])))
    else:
        digest = hashlib.sha256()
        while piece := await reader.read(1 << 16):
            digest.update(piece)
        writer.write(digest.digest())
    writer.write_eof()


async def run_server(arguments):
    made = configuration(arguments, is_client=False)
    made.load_cert_chain(arguments.certificate, arguments.key)
    tickets = {}
    server = await serve(
        "127.0.0.1",
        0,
        configuration=made,
        create_protocol=Protocol,
        retry=arguments.retry,
        session_ticket_fetcher=tickets.get,
        session_ticket_handler=lambda ticket: tickets.update({ticket.ticket: ticket}),
        stream_handler=lambda *ends: asyncio.ensure_future(answer(*ends)),
    )
    port = server._transport.get_extra_info("sockname")[1]
    print("ready", port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


# The client


async def get(protocol, octets, action):
    reader, writer = await protocol.create_stream()
    writer.write(b"GET %d\n" % octets)
    writer.write_eof()
    digest, received, due = hashlib.sha256(), 0, EVERY
    while piece := await reader.read(1 << 16):
        digest.update(piece)
        received += len(piece)
        if action and received >= due:
            due = received + EVERY
            await action()
    assert received == octets, f"{received} octets instead of {octets}"
    assert digest.digest() == hashlib.sha256(pattern(octets)).digest(), "other content"


async def put(protocol, octets):
    reader, writer = await protocol.create_stream()
    content = pattern(octets)
    writer.write(b"PUT\n" + content)
    writer.write_eof()
    assert await reader.read() == hashlib.sha256(content).digest(), "other content arrived"


async def once(arguments, ticket, tickets):
    host, port = arguments.target.rsplit(":", 1)
    made = configuration(arguments, is_client=True)
    made.load_verify_locations(arguments.certificate)
    made.server_name = "localhost"
    made.session_ticket = ticket
    async with connect(
        host,
        int(port),
        configuration=made,
        create_protocol=Protocol,
        session_ticket_handler=tickets.append,
    ) as protocol:

        async def act():
            if arguments.update_keys:
                protocol.request_key_update()
            if arguments.rebind or arguments.migrate:
                await protocol.rebind()
            if arguments.migrate:
                protocol.change_connection_id()
            await protocol.ping()

        acting = arguments.update_keys or arguments.rebind or arguments.migrate
        await get(protocol, arguments.octets, act if acting else None)
        await put(protocol, arguments.octets)
        if arguments.datagrams:
            for size in (0, 1, 100, 1000):
                protocol._quic.send_datagram_frame(b"\x07" * size)
                protocol.transmit()
                message = await asyncio.wait_for(protocol.datagrams.get(), 60)
                assert message == b"\x07" * size, size
        return protocol.resumed


async def run_client(arguments):
    tickets: list[SessionTicket] = []
    assert not await once(arguments, None, tickets), "resumed nothing"
    if arguments.resume:
        assert tickets, "no ticket came"
        assert await once(arguments, tickets[0], tickets), "not resumed"
    print("done", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    server = commands.add_parser("serve")
    server.add_argument("--key", required=True)
    server.add_argument("--retry", action="store_true")
    server.set_defaults(run=run_server)
    client = commands.add_parser("client")
    client.add_argument("--target", required=True)
    client.add_argument("--octets", type=int, default=1 << 20)
    for flag in ("--update-keys", "--rebind", "--migrate", "--resume", "--datagrams"):
        client.add_argument(flag, action="store_true")
    client.set_defaults(run=run_client)
    for command in (server, client):
        command.add_argument("--certificate", required=True, help="in PEM")
        command.add_argument("--chacha20", action="store_true")
    arguments = parser.parse_args()
    asyncio.run(arguments.run(arguments))


main()

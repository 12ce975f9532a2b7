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
from aioquic.quic.packet import QuicProtocolVersion
from aioquic.tls import CipherSuite, SessionTicket
from tokens import NatTokens

ALPN = "quic-lb-echo"
# Octets between two moves or key updates.
EVERY = 200 * 1024


# Octets in a piece of content; a multiple of 4.
PIECE = 1 << 20


def pattern(length):
    """The content, in pieces."""
    for offset in range(0, length, PIECE):
        words = array.array("I", range(offset // 4, (min(offset + PIECE, length) + 3) // 4))
        if sys.byteorder == "little":
            words.byteswap()
        yield words.tobytes()[: length - offset]


def digest(length):
    whole = hashlib.sha256()
    for piece in pattern(length):
        whole.update(piece)
    return whole.digest()


async def send(writer, length):
    """Writes the content, no faster than it leaves: aioquic's `drain` does not wait."""
    adapter = writer.transport
    for piece in pattern(length):
        writer.write(piece)
        stream = adapter.protocol._quic._streams.get(adapter.stream_id)
        while stream is not None and len(stream.sender._buffer) > 4 * PIECE:
            await asyncio.sleep(0.002)
            assert adapter.protocol._quic._close_event is None, "closed"
    writer.write_eof()


def configuration(arguments, is_client):
    made = QuicConfiguration(
        is_client=is_client, alpn_protocols=[ALPN], max_datagram_frame_size=65536
    )
    if arguments.chacha20:
        made.cipher_suites = [CipherSuite.CHACHA20_POLY1305_SHA256]
    if arguments.version_2:
        made.original_version = QuicProtocolVersion.VERSION_2
        made.supported_versions = [QuicProtocolVersion.VERSION_2]
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
        await send(writer, int(request[4:]))
    else:
        whole = hashlib.sha256()
        while piece := await reader.read(1 << 16):
            whole.update(piece)
        writer.write(whole.digest())
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
    if arguments.nat_key:
        server._retry = NatTokens(1, bytes.fromhex(arguments.nat_key))
    port = server._transport.get_extra_info("sockname")[1]
    print("ready", port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


# The client


async def get(protocol, octets, wanted, action):
    reader, writer = await protocol.create_stream()
    writer.write(b"GET %d\n" % octets)
    writer.write_eof()
    whole, received, due = hashlib.sha256(), 0, EVERY
    while piece := await reader.read(1 << 16):
        whole.update(piece)
        received += len(piece)
        if action and received >= due:
            due = received + EVERY
            await action()
    assert received == octets, f"{received} octets instead of {octets}"
    assert whole.digest() == wanted, "other content"


async def put(protocol, octets, wanted):
    reader, writer = await protocol.create_stream()
    writer.write(b"PUT\n")
    await send(writer, octets)
    assert await reader.read() == wanted, "other content arrived"


async def keep_alive(protocol):
    """A client behind a NAT is only within reach while it speaks."""
    while True:
        await asyncio.sleep(0.3)
        await protocol.ping()


async def once(arguments, wanted, ticket, tickets):
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

        if arguments.keep_alive:
            speaking = asyncio.ensure_future(keep_alive(protocol))
            speaking.add_done_callback(lambda task: task.cancelled() or task.exception())
        acting = arguments.update_keys or arguments.rebind or arguments.migrate
        if not arguments.only_put:
            await get(protocol, arguments.octets, wanted, act if acting else None)
        if not arguments.only_get:
            await put(protocol, arguments.octets, wanted)
        if arguments.datagrams:
            for size in (0, 1, 100, 1000):
                protocol._quic.send_datagram_frame(b"\x07" * size)
                protocol.transmit()
                message = await asyncio.wait_for(protocol.datagrams.get(), 60)
                assert message == b"\x07" * size, size
        if arguments.keep_alive:
            speaking.cancel()
        return protocol.resumed


async def run_client(arguments):
    tickets: list[SessionTicket] = []
    # Before there is a connection: nothing is heard of us while this takes its time.
    wanted = digest(arguments.octets)
    assert not await once(arguments, wanted, None, tickets), "resumed nothing"
    if arguments.resume:
        assert tickets, "no ticket came"
        assert await once(arguments, wanted, tickets[0], tickets), "not resumed"
    print("done", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    server = commands.add_parser("serve")
    server.add_argument("--key", required=True)
    server.add_argument("--retry", action="store_true")
    server.add_argument("--nat-key", help="of a balancer's tokens, which have sequence number 1")
    server.set_defaults(run=run_server)
    client = commands.add_parser("client")
    client.add_argument("--target", required=True)
    client.add_argument("--octets", type=int, default=1 << 20)
    for flag in (
        "--update-keys",
        "--rebind",
        "--migrate",
        "--resume",
        "--datagrams",
        "--keep-alive",
        "--only-get",
        "--only-put",
    ):
        client.add_argument(flag, action="store_true")
    client.set_defaults(run=run_client)
    for command in (server, client):
        command.add_argument("--certificate", required=True, help="in PEM")
        command.add_argument("--chacha20", action="store_true")
        command.add_argument("--version-2", action="store_true", help="and no other")
    arguments = parser.parse_args()
    asyncio.run(arguments.run(arguments))


main()

"""The aioquic ends of the namespace suite, over versions 1 and 2; `quic-peer` is the same for quinn.

Both say `ready` when they are, end at SIGTERM, and then print what happened as one line of JSON.
Clients also say `seen C N` when the server of connection C has seen its Nth address.

Servers issue routable connection IDs if they are given a server ID. They resume sessions of each
other, and take 0-RTT. With `--token-key` they leave address validation to the balancer, read its tokens and
report whom they were made for. With `--record` they report the digests of all datagrams, so that it can be
told whether any was changed on its way.
"""

import argparse
import asyncio
import hashlib
import json
import os
import signal
import ssl
import struct
import sys
from functools import lru_cache

import aioquic.asyncio.server
from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection, QuicConnectionId
from aioquic.quic.events import ConnectionTerminated
from aioquic.quic.packet import QuicProtocolVersion

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../foreign"))
from common import TOKEN_SEQUENCE  # noqa: E402
from routable import encode  # noqa: E402
from tokens import NatTokens  # noqa: E402

ALPN = "quic-lb-echo"
# Far longer than any answer takes; without it a lost connection would be found out much later.
ANSWER_TIMEOUT = 60
# With this the stateless resets of our quinn clients end in 16 octets.
RESET_MARK = b"\x00A RESET"


def say(line):
    print(line, flush=True)


@lru_cache(maxsize=4)
def pattern(length):
    words = (length + 3) // 4
    return struct.pack(f">{words}I", *range(words))[:length]


# Servers


class Server(QuicServer):
    """One server: it knows what all of them issued, and counts what arrives."""

    issued = {}
    current = None
    tickets = {}
    record = False

    def __init__(self, spec, certificate_file, key_file, token_key):
        self.name = spec["name"]
        self.scheme = spec.get("scheme")
        length = 8
        if self.scheme:
            length = 1 + len(self.scheme["server_id"]) // 2 + self.scheme["nonce_length"]
        configuration = QuicConfiguration(
            is_client=False, alpn_protocols=[ALPN], connection_id_length=length
        )
        configuration.load_cert_chain(certificate_file, key_file)
        super().__init__(
            configuration=configuration,
            create_protocol=self.protocol,
            session_ticket_fetcher=Server.tickets.get,
            session_ticket_handler=self.keep,
        )
        if token_key:
            self._retry = NatTokens(TOKEN_SEQUENCE, token_key)
        self.versions = set()
        self.report = {
            "name": self.name,
            "connections": 0,
            "lost": [],
            "own": 0,
            "opening": 0,
            "resets": 0,
            "unknown": 0,
            "misdelivered": 0,
        }

    def final_report(self):
        tokens = dict(token_clients=self._retry.clients) if self._retry else {}
        return dict(self.report, versions=sorted(self.versions), **tokens)

    @staticmethod
    def keep(ticket):
        Server.tickets[ticket.ticket] = ticket

    def connection_made(self, transport):
        if Server.record:
            self.report.update(sent=[], received=[])
            transport = Recorder(transport, self.report["sent"])
        super().connection_made(transport)

    def new_cid(self):
        if self.scheme:
            key = self.scheme.get("key")
            cid = encode(
                self.scheme["config_id"],
                bytes.fromhex(key) if key else None,
                bytes.fromhex(self.scheme["server_id"]),
                os.urandom(self.scheme["nonce_length"]),
            )
        else:
            cid = os.urandom(8)
        assert cid not in Server.issued, "a connection ID has been issued twice"
        Server.issued[cid] = self.name
        return cid

    def protocol(self, connection, stream_handler=None):
        self.report["connections"] += 1
        return ServerProtocol(connection, self)

    def datagram_received(self, data, addr):
        if Server.record:
            self.report["received"].append(hashlib.sha256(data).hexdigest())
        self.enter(data)
        # QuicServer makes connections by their class's name; this tells them whose they are.
        Server.current = self
        super().datagram_received(data, addr)

    def enter(self, data):
        is_long = data[0] & 0x80
        if is_long:
            self.versions.add(int.from_bytes(data[1:5], "big"))
        length = data[5] if is_long else self._configuration.connection_id_length
        start = 6 if is_long else 1
        owner = Server.issued.get(data[start : start + length])
        if owner == self.name:
            self.report["own"] += 1
        elif owner is not None:
            self.report["misdelivered"] += 1
        elif is_long:
            self.report["opening"] += 1
        elif data[-16:].startswith(RESET_MARK):
            self.report["resets"] += 1
        else:
            self.report["unknown"] += 1


class Recorder:
    """A transport that keeps the digests of what it sends."""

    def __init__(self, transport, sent):
        self.transport = transport
        self.sent = sent

    def sendto(self, data, address=None):
        self.sent.append(hashlib.sha256(data).hexdigest())
        self.transport.sendto(data, address)

    def __getattr__(self, name):
        return getattr(self.transport, name)


class ServerConnection(QuicConnection):
    """A connection whose IDs come from its server."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.server = Server.current
        self._host_cids[0].cid = self.server.new_cid()
        self.host_cid = self._host_cids[0].cid
        self._local_initial_source_connection_id = self.host_cid

    def _replenish_connection_ids(self):
        while len(self._host_cids) < min(8, self._remote_active_connection_id_limit):
            self._host_cids.append(
                QuicConnectionId(
                    cid=self.server.new_cid(),
                    sequence_number=self._host_cid_seq,
                    stateless_reset_token=os.urandom(16),
                )
            )
            self._host_cid_seq += 1


class ServerProtocol(QuicConnectionProtocol):
    def __init__(self, connection, server):
        super().__init__(connection, self.on_stream)
        self.server = server

    def on_stream(self, reader, writer):
        asyncio.get_running_loop().create_task(self.answer(reader, writer))

    async def answer(self, reader, writer):
        request = await reader.read()
        if request.startswith(b"GET "):
            writer.write(pattern(int(request[4:])))
        elif request.startswith(b"WHO"):
            writer.write(self.server.name.encode())
        elif request.startswith(b"FROM"):
            writer.write(str(self._quic._network_paths[0].addr[:2]).encode())
        else:
            writer.write(request)
        writer.write_eof()

    def quic_event_received(self, event):
        super().quic_event_received(event)
        if isinstance(event, ConnectionTerminated) and event.error_code != 0:
            self.server.report["lost"].append(event.reason_phrase or str(event.error_code))


async def serve(arguments, stop):
    aioquic.asyncio.server.QuicConnection = ServerConnection
    Server.record = arguments.record
    token_key = arguments.token_key and bytes.fromhex(arguments.token_key)
    servers = []
    for spec in json.loads(arguments.servers):
        _, server = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda spec=spec: Server(spec, arguments.certificate, arguments.key, token_key),
            local_addr=(spec["host"], spec["port"]),
        )
        servers.append(server)
    say("ready")
    await stop.wait()
    return [server.final_report() for server in servers]


# Clients


async def ask(connection, question):
    reader, writer = await connection.create_stream()
    writer.write(question)
    writer.write_eof()
    return await asyncio.wait_for(reader.read(), ANSWER_TIMEOUT)


async def watch(nth, connection, addresses):
    while True:
        address = await ask(connection, b"FROM")
        if address and address not in addresses:
            addresses.add(address)
            say(f"seen {nth} {len(addresses)}")
        await asyncio.sleep(0.02)


async def keep_alive(connection):
    """Says something now and then, also while only listening: a server cannot reach a client behind
    a new binding of a NAT until it has heard of it."""
    while True:
        await asyncio.sleep(0.3)
        connection._quic.send_ping(0)
        connection.transmit()


async def download_until(nth, connection, octets, stop):
    digest = hashlib.sha256(pattern(octets)).digest()
    downloads, addresses, lost = 0, set(), None
    watching = asyncio.create_task(watch(nth, connection, addresses))
    keeping = asyncio.create_task(keep_alive(connection))
    while lost is None and not stop.is_set():
        try:
            content = await ask(connection, b"GET %d\n" % octets)
        except asyncio.TimeoutError:
            lost = "no answer"
        else:
            if hashlib.sha256(content).digest() == digest:
                downloads += 1
            else:
                lost = f"{len(content)} octets, and not those"
        if lost is None and watching.done():
            lost = str(watching.exception())
    watching.cancel()
    keeping.cancel()
    return {
        "downloads": downloads,
        "octets": downloads * octets,
        "rebinds": max(len(addresses) - 1, 0),
        "lost": lost,
    }


async def fetch(arguments, stop):
    host, port = arguments.target.rsplit(":", 1)

    async def one(nth, connected):
        configuration = QuicConfiguration(
            alpn_protocols=[ALPN], verify_mode=ssl.CERT_NONE, server_name="localhost"
        )
        if arguments.version_2:
            configuration.original_version = QuicProtocolVersion.VERSION_2
            configuration.supported_versions = [QuicProtocolVersion.VERSION_2]
        async with connect(host.strip("[]"), int(port), configuration=configuration) as connection:
            connected.release()
            return await download_until(nth, connection, arguments.octets, stop)

    connected = asyncio.Semaphore(0)
    tasks = [asyncio.create_task(one(nth, connected)) for nth in range(arguments.connections)]
    for _ in tasks:
        await asyncio.wait_for(connected.acquire(), ANSWER_TIMEOUT)
    say("ready")
    return await asyncio.gather(*tasks)


async def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("serve")
    command.add_argument("--servers", required=True, help="JSON: name, host, port, scheme of each")
    command.add_argument("--certificate", required=True, help="in PEM")
    command.add_argument("--key", required=True, help="of the certificate, in PEM")
    command.add_argument("--token-key", help="take no client but with a token made with this key")
    command.add_argument("--record", action="store_true")
    command.set_defaults(run=serve)
    command = commands.add_parser("fetch")
    command.add_argument("--target", required=True)
    command.add_argument("--connections", type=int, default=1)
    command.add_argument("--octets", type=int, default=1 << 20)
    command.add_argument("--version-2", action="store_true", help="and no other")
    command.set_defaults(run=fetch)
    arguments = parser.parse_args()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    say(json.dumps(await arguments.run(arguments, stop)))


asyncio.run(main())

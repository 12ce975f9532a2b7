"""HTTP/3 and other clients of the suite of peers: each asks, checks, prints what it saw as one line of
JSON, and ends with an error if anything is wrong.

`http3` works with aioquic and with qh3, which has the same interface; `curl` is curl_cffi; `echo`
speaks to the aioquic servers of `netns/peer.py` and can use version 2 and 0-RTT.
"""

import argparse
import array
import asyncio
import hashlib
import importlib
import json
import sys
import time

VERSIONS = {"1": 0x00000001, "2": 0x6B3343CF}


def pattern(length):
    words = array.array("I", range((length + 3) // 4))
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()[:length]


def plan(arguments, get):
    """The requests of all HTTP/3 clients, as steps: `get` makes an awaitable or an answer."""
    before = json.loads((yield get("/whoami")))
    wanted = pattern(arguments.octets)
    for _ in range(arguments.requests):
        content = yield get(f"/bytes/{arguments.octets}")
        assert content == wanted, f"{len(content)} octets, and not those"
    after = json.loads((yield get("/whoami")))
    return {"before": before, "after": after}


async def at_each(arguments, ask):
    """What each target answered, or why it did not, all at once."""

    async def outcome(target):
        try:
            return await asyncio.wait_for(ask(arguments, target), arguments.within)
        except Exception as error:
            if len(arguments.target) == 1:
                raise
            return {"error": repr(error)}

    outcomes = await asyncio.gather(*map(outcome, arguments.target))
    print(json.dumps(outcomes if len(outcomes) > 1 else outcomes[0]), flush=True)


# aioquic and qh3


async def keep_alive(client):
    """A client behind a NAT is only within reach while it speaks."""
    while True:
        await asyncio.sleep(0.3)
        await client.ping()


async def http3(arguments):
    await at_each(arguments, http3_at)


async def http3_at(arguments, target):
    stack = arguments.stack
    load = lambda name: importlib.import_module(f"{stack}.{name}")
    connect, protocol = load("asyncio.client").connect, load("asyncio.protocol")
    h3, events = load("h3.connection"), load("h3.events")
    host, port = target.rsplit(":", 1)
    ended = []

    class Client(protocol.QuicConnectionProtocol):
        def __init__(self, *positional, **named):
            super().__init__(*positional, **named)
            self.http, self.answers, self.bodies = None, {}, {}

        def quic_event_received(self, event):
            super().quic_event_received(event)
            if hasattr(event, "error_code") and hasattr(event, "frame_type"):
                ended.append(ConnectionError(f"ended: {event.error_code:#x} {event.reason_phrase}"))
                for answer in self.answers.values():
                    answer.done() or answer.set_exception(ended[0])
            for answer in self.http.handle_event(event) if self.http else ():
                stream = getattr(answer, "stream_id", None)
                if stream not in self.answers:
                    continue
                if isinstance(answer, events.HeadersReceived):
                    assert (b":status", b"200") in answer.headers, answer.headers
                if isinstance(answer, events.DataReceived):
                    self.bodies[stream] += answer.data
                if answer.stream_ended:
                    self.answers.pop(stream).set_result(bytes(self.bodies.pop(stream)))

        async def get(self, path):
            stream = self._quic.get_next_available_stream_id()
            authority = target.encode()
            headers = [(b":method", b"GET"), (b":scheme", b"https")]
            headers += [(b":authority", authority), (b":path", path.encode())]
            self.http.send_headers(stream, headers, end_stream=True)
            self.bodies[stream] = bytearray()
            answer = self.answers[stream] = asyncio.get_running_loop().create_future()
            self.transmit()
            return await asyncio.wait_for(answer, 60)

        async def move(self):
            """Goes on from another port with another connection ID."""
            old = self._transport
            loop = asyncio.get_running_loop()
            family = old.get_extra_info("socket").family
            local = "::" if family.name == "AF_INET6" else "0.0.0.0"
            await loop.create_datagram_endpoint(lambda: self, local_addr=(local, 0))
            old.close()
            self.change_connection_id()

        def connection_lost(self, error):
            """A socket was replaced: the connection goes on."""

    made = load("quic.configuration").QuicConfiguration(alpn_protocols=["h3"])
    made.load_verify_locations(arguments.certificate)
    made.server_name = "localhost"
    try:
        async with connect(host, int(port), configuration=made, create_protocol=Client) as client:
            client.http = h3.H3Connection(client._quic)
            client.transmit()
            speaking = asyncio.ensure_future(keep_alive(client))
            speaking.add_done_callback(lambda task: task.cancelled() or task.exception())
            steps = plan(arguments, client.get)
            answer = None
            try:
                while True:
                    answer = await steps.send(answer)
                    await asyncio.sleep(arguments.pause / 1000)
                    if arguments.migrate:
                        await client.move()
            except StopIteration as last:
                return last.value
            finally:
                speaking.cancel()
    except ConnectionError:
        raise ended[0] if ended else ConnectionError("not connected") from None


# curl


async def curl(arguments):
    await at_each(arguments, lambda *options: asyncio.to_thread(curl_at, *options))


def curl_at(arguments, target):
    from curl_cffi import CurlHttpVersion, CurlOpt, requests

    session = requests.Session(
        impersonate=arguments.imitate,
        http_version=CurlHttpVersion.V3ONLY,
        verify=arguments.certificate,
        # Nothing listens at IPv6's address of the same name.
        curl_options={CurlOpt.RESOLVE: [f"localhost:{target.rsplit(':', 1)[1]}:127.0.0.1"]},
    )

    def get(path):
        url = f"https://localhost:{target.rsplit(':', 1)[1]}{path}"
        answer = session.get(url, timeout=arguments.within)
        assert answer.status_code == 200, answer.status_code
        return answer.content

    steps, answer = plan(arguments, get), None
    try:
        while True:
            answer = steps.send(answer)
            time.sleep(arguments.pause / 1000)
    except StopIteration as last:
        return last.value
    finally:
        session.close()


# Version 2 and 0-RTT, with aioquic


class Recorder:
    """A transport that keeps what it sends."""

    def __init__(self, transport, sent):
        self.transport, self.sent = transport, sent

    def sendto(self, data, address=None):
        self.sent.append(bytes(data))
        self.transport.sendto(data, address)

    def __getattr__(self, name):
        return getattr(self.transport, name)


async def echo(arguments):
    from aioquic.asyncio import QuicConnectionProtocol, connect
    from aioquic.quic.configuration import QuicConfiguration

    host, port = arguments.target.rsplit(":", 1)
    sent, received, tickets = [], [], []

    class Client(QuicConnectionProtocol):
        def connection_made(self, transport):
            super().connection_made(Recorder(transport, sent))

        def datagram_received(self, data, address):
            received.append(bytes(data))
            super().datagram_received(data, address)

    async def fetch(ticket):
        made = QuicConfiguration(alpn_protocols=["quic-lb-echo"], server_name="localhost")
        made.load_verify_locations(arguments.certificate)
        version = VERSIONS[arguments.version]
        made.original_version, made.supported_versions = version, [version]
        made.session_ticket = ticket
        early = ticket is not None
        async with connect(
            host,
            int(port),
            configuration=made,
            create_protocol=Client,
            session_ticket_handler=tickets.append,
            wait_connected=not early,
        ) as client:
            reader, writer = await client.create_stream()
            writer.write(b"GET %d\n" % arguments.octets)
            writer.write_eof()
            content = await asyncio.wait_for(reader.read(), 60)
            assert content == pattern(arguments.octets), f"{len(content)} octets, and not those"
            assert not early or client._quic.tls.early_data_accepted, "0-RTT was not accepted"
            assert client._quic._version == version

    await fetch(None)
    if arguments.early:
        assert tickets, "no ticket came"
        await fetch(tickets[0])
    # Coalesced packets count by the first in their datagram; that is enough to know that some are.
    version = VERSIONS[arguments.version].to_bytes(4, "big")
    longs = [data for data in sent + received if data[0] & 0x80]
    assert longs and all(data[1:5] == version for data in longs), "another version"
    digests = lambda datagrams: [hashlib.sha256(data).hexdigest() for data in datagrams]
    print(json.dumps({"sent": digests(sent), "received": digests(received)}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, run in (("http3", http3), ("curl", curl), ("echo", echo)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--certificate", required=True, help="in PEM")
        command.add_argument("--octets", type=int, default=100_000)
    commands.choices["echo"].add_argument("--target", required=True)
    for name in ("http3", "curl"):
        command = commands.choices[name]
        command.add_argument("--target", required=True, nargs="+", help="a connection to each, at once")
        command.add_argument("--within", type=float, default=60, help="seconds for each")
        command.add_argument("--requests", type=int, default=1)
        command.add_argument("--pause", type=int, default=0, help="milliseconds after each")
        command.add_argument("--migrate", action="store_true")
    commands.choices["http3"].add_argument("--stack", default="aioquic")
    commands.choices["curl"].add_argument("--imitate", default="chrome", help="which browser")
    commands.choices["echo"].add_argument("--version", choices=VERSIONS, default="1")
    commands.choices["echo"].add_argument("--early", action="store_true")
    arguments = parser.parse_args()
    asyncio.run(arguments.run(arguments))


main()

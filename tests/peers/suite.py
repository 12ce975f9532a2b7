"""Peers that others wrote, through the balancer: clients to our origins, and an aioquic client to
aioquic servers. Everything runs on loopback; between client and balancer stands a NAT that moves.

    client ──► NAT (quic-nat) ──► balancer (quic-lb) ──► origins (backend-sim) or aioquic

A NAT moves when it is told to, or amid each client's handshake; then it may send to two balancers in turn.
Each case of each peer is checked, and the table of results belongs into docs/peers.md, between two
marks: `--write` puts it there, otherwise the two are compared. Cases of a peer that is not installed
are skipped, and are not compared. Started by `run`, which see.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "../foreign"))
import chromium  # noqa: E402
from common import (  # noqa: E402
    KEY, START, Failure, Missing, Suite, configuration, expect, main, python_servers, run, total,
    validation, write_certificate,
)  # fmt: skip

TABLE = os.path.join(HERE, "../../docs/peers.md")
BEGIN, END = "<!-- peers: made by tests/peers/run -->", "<!-- peers: end -->"
# Config IDs of the pools; the servers of one have no routable connection IDs.
POOLS = {"web": 0, "plain": None, "aioquic": 3}
# The clients' requests, and how often the NAT moves meanwhile.
REQUESTS, PAUSE_MS, MOVE_SECONDS = 20, 150, 0.4
# Moves that a server has to have seen in such a case.
ENOUGH_MOVES = 4

# Where the NAT moves amid handshakes: before which datagram of the client for the first time, after how
# many more each time, and how often. A client may take so many seconds.
FIRST_MOVES, NEXT_MOVE, MOVES, WITHIN = range(2, 9), 6, 10, 30
# What such a client fetches: enough for all moves. Of which pools, and through how many balancers in turn.
AMID_REQUESTS, AMID_OCTETS = 40, 10_000
AMID = {
    "amid": ("web", 1),
    "amid2": ("web", 2),
    "plain": ("plain", 1),
    "plain2": ("plain", 2),
}

# Of these, at most so many may be lost where a NAT loses answers too.
DEAF_LOSSES = 2

# Of the balancers' ports.
PREFIXES = ("", "retry-", "second-")

COLUMNS = {
    "http3": "HTTP/3",
    "rebind": "NAT rebinds",
    "migrate": "migrates",
    "retry": "Retry by the balancer",
    "v2": "version 2",
    "early": "0-RTT",
    "amid": "NAT rebinds amid the handshake",
    "amid2": "amid, two balancers",
    "plain": "amid, no routable IDs",
    "plain2": "amid, no routable IDs, two balancers",
}


def free_port():
    """A port that is free for both UDP and TCP, and stays so: none of those that the kernel gives to sockets that do not ask."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        end = int(file.read().split()[0])
    for _ in range(1000):
        address = ("127.0.0.1", random.randrange(max(end - 20_000, 1024), end))
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as one, socket.socket(
            socket.AF_INET, socket.SOCK_DGRAM
        ) as other:
            with contextlib.suppress(OSError):
                one.bind(address)
                other.bind(address)
                return address[1]
    raise Failure("no port is free")


class Nat:
    """A NAT that moves while it is needed, unless told to stay; or several that know when to move."""

    def __init__(self, *command, moves):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        word, *ports = self.process.stdout.readline().split()
        assert word == "ready"
        self.ports = [int(port) for port in ports]
        self.port = self.ports[0]
        self.over = threading.Event()
        self.mover = threading.Thread(target=self.move) if moves else None

    def __enter__(self):
        if self.mover:
            self.mover.start()
        return self

    def move(self):
        while not self.over.wait(MOVE_SECONDS):
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def __exit__(self, *_):
        self.over.set()
        if self.mover:
            self.mover.join()
        self.process.stdin.close()
        # Of each, how many clients it had, and how often it moved.
        self.said = json.loads(self.process.stdout.read())
        self.process.wait(START)


class Peers(Suite):
    def __init__(self, arguments, folder):
        super().__init__(arguments, folder)
        self.results = {}

    # Servers and balancers

    def write_configuration(self):
        self.pools, self.ports = {}, {}
        for pool, config_id in POOLS.items():
            backends = {f"{pool}-{nth}": ("127.0.0.1", free_port()) for nth in (1, 2, 3)}
            scheme = None
            if config_id is not None:
                scheme = dict(config_id=config_id, server_id_length=2, nonce_length=6, key=KEY)
            self.pools[pool] = dict(scheme=scheme, backends=backends)
        self.write_one("lb.yaml", "", "off")
        # The same site behind other balancers, which ask every client for its address.
        self.write_one("retry.yaml", "retry-", "always")
        self.write_one("second.yaml", "second-", "always")

    def write_one(self, file, prefix, mode):
        pools = {}
        for name, pool in self.pools.items():
            port = self.ports[prefix + name] = free_port()
            pools[name] = dict(pool, listen=("127.0.0.1", port), retry=mode)
        port = self.ports[prefix + "admin"] = free_port()
        with open(self.path(file), "w") as out:
            out.write(configuration(pools, f"127.0.0.1:{port}", *validation()))

    def start_site(self):
        self.public_key = write_certificate(self.folder)
        self.write_configuration()
        os.mkdir(self.path("root"))
        shutil.copy(chromium.PAGE, self.path("root"))
        self.metrics = []
        chromium.write_script(self.path("root"), AMID_REQUESTS * AMID_OCTETS)
        for name in [*self.pools["web"]["backends"], *self.pools["plain"]["backends"]]:
            self.metrics.append(free_port())
            self.start(
                self.binary("backend-sim"), "serve",
                "--config", self.path("lb.yaml"), "--backend", name,
                "--cert", self.path("cert.pem"), "--key", self.path("key.pem"),
                "--root", self.path("root"), "--metrics", f"127.0.0.1:{self.metrics[-1]}",
            )  # fmt: skip
        for file in ("lb.yaml", "retry.yaml", "second.yaml"):
            self.start(self.binary("quic-lb"), "run", "--config", self.path(file))
        for port in [*(self.ports[prefix + "admin"] for prefix in PREFIXES), *self.metrics]:
            self.wait_for(port)
        # The first handshake of a process takes so long that clients repeat themselves.
        first, _ = self.in_rust("quinn")
        for pool in ("web", "plain"):
            for address in self.pools[pool]["backends"].values():
                first("%s:%d" % address, "http3")

    def wait_for(self, port):
        deadline = time.monotonic() + START
        while True:
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
            expect(time.monotonic() < deadline, f"nothing listens on port {port}")
            time.sleep(0.1)

    def wait_for_tcp(self, port):
        deadline = time.monotonic() + START
        while True:
            with contextlib.suppress(OSError):
                return socket.create_connection(("127.0.0.1", port), timeout=5).close()
            expect(time.monotonic() < deadline, f"nothing listens on port {port}")
            time.sleep(0.1)

    def binary(self, name):
        return os.path.join(self.arguments.binaries, name)

    def nat(self, pool, moves):
        target = f"127.0.0.1:{self.ports[pool]}"
        return Nat(self.binary("quic-nat"), "--target", target, moves=moves)

    # Clients of our origins. Each gives what `/whoami` said at first and in the end.

    def python(self, module, *command):
        self.python_module(module)
        script = os.path.join(HERE, "client.py")
        return json.loads(run(sys.executable, script, *command, "--certificate", self.path("cert.pem")))

    def requests(self, case):
        if case in AMID:
            return ["--requests", str(AMID_REQUESTS), "--octets", str(AMID_OCTETS)]
        steps = [] if case in ("http3", "retry") else ["--requests", str(REQUESTS), "--pause", str(PAUSE_MS)]
        return steps + (["--migrate"] if case == "migrate" else [])

    def in_python(self, module, *command):
        def one(target, case):
            return self.python(module, *command, "--target", target, *self.requests(case))

        def several(targets, case):
            more = ("--within", str(WITHIN), *self.requests(case))
            outcomes = self.python(module, *command, "--target", *targets, *more)
            return [outcome.get("error") for outcome in outcomes]

        return one, several

    def in_rust(self, stack):
        command = (self.binary("quic-peer"), "http3", "--stack", stack)

        def one(target, case):
            more = ("--certificate", self.path("cert.der"), *self.requests(case))
            return json.loads(run(*command, "--target", target, *more))

        def several(targets, case):
            def error(target):
                try:
                    one(target, case)
                except (Failure, subprocess.TimeoutExpired) as error:
                    return str(error)

            with ThreadPoolExecutor(len(targets)) as pool:
                return list(pool.map(error, targets))

        return one, several

    def chromium_visits(self, targets, case):
        ports = [int(target.rsplit(":", 1)[1]) for target in targets]
        files = [self.path(f"visit-{ports[0]}{ending}") for ending in ("", ".html")]
        visited = chromium.visited(run(*chromium.visit("127.0.0.1", ports, self.public_key, *files)))
        return [None if port in visited else "nothing came" for port in ports]

    def caddy(self, targets, case):
        """Caddy's reverse proxy asks for us, on a connection of its own to each target."""
        if not self.arguments.caddy:
            raise Missing("Caddy could not be had")
        fronts = [free_port() for _ in targets]
        lines = ["{", "admin off", "auto_https off", "}"]
        for front, target in zip(fronts, targets, strict=True):
            transport = "versions 3", "tls_insecure_skip_verify", "tls_server_name localhost"
            lines += [f"http://127.0.0.1:{front} {{", f"reverse_proxy https://{target} {{"]
            lines += ["transport http {", *transport, "}", "}", "}"]
        with open(self.path("Caddyfile"), "w") as out:
            out.write("\n".join(lines) + "\n")
        options = ("--adapter", "caddyfile", "--config", self.path("Caddyfile"))
        process = self.start(self.arguments.caddy, "run", *options)

        def error(front):
            try:
                for _ in range(AMID_REQUESTS):
                    url = f"http://127.0.0.1:{front}/bytes/{AMID_OCTETS}"
                    with urllib.request.urlopen(url, timeout=WITHIN) as answer:
                        assert len(answer.read()) == AMID_OCTETS
            except (OSError, AssertionError, http.client.HTTPException) as error:
                causes = re.findall(r'"error":"([^"]*)"', process.logged())
                return f"{error!r}: {', '.join(causes)}"

        try:
            for front in fronts:
                self.wait_for_tcp(front)
            with ThreadPoolExecutor(len(fronts)) as pool:
                return list(pool.map(error, fronts))
        finally:
            process.kill()

    def chromium(self, target, case):
        host, port = target.rsplit(":", 1)
        picture, profile = self.path(f"{case}.png"), self.path("chromium-" + case)
        result = chromium.result(run(*chromium.command(host, port, self.public_key, profile, picture)))
        os.makedirs(self.arguments.pictures, exist_ok=True)
        shutil.copy(picture, self.arguments.pictures)
        chromium.check_picture(picture)
        return result

    def origin_case(self, client, case):
        pool = "retry-web" if case == "retry" else "web"
        sent = self.retries()
        with self.nat(pool, moves=case == "rebind") as nat:
            result = client(f"127.0.0.1:{nat.port}", case)
        expect((self.retries() > sent) == (case == "retry"), "Retries that were not due, or none")
        before, after = result["before"], result["after"]
        told = before["true_client"]
        expect((told is not None) == (case == "retry"), f"the token of no Retry told of {told}")
        expect(told != before["client"], f"{told} is what the server sees of the balancer")
        expect(before["backend"] == after["backend"], f"{before['backend']}, then {after['backend']}")
        moves = after["path_changes"] - before["path_changes"]
        quiet = case in ("http3", "retry")
        expect(quiet or moves >= ENOUGH_MOVES, f"the server has seen {moves} moves")
        expect(not quiet or moves == 0, f"the server has seen {moves} moves")

    def retries(self):
        """Retries that the balancers have sent."""
        return self.balancers("quic_lb_retry_sent_total")

    def balancers(self, metric, **labels):
        """The sum of a metric of the balancers."""
        scrapes = [self.wait_for(self.ports[prefix + "admin"]) for prefix in PREFIXES]
        return sum(total(scrape, metric, **labels) for scrape in scrapes)

    def amid_case(self, clients, case):
        """NATs move amid handshakes in which clients prove their address, each before another datagram for
        the first time, and then again and again. No connection is lost, and no token refused; what is lost
        once is tried again, since a busy machine keeps clients waiting. Behind deaf NATs, which lose answers
        too, few are lost."""
        notes = []
        for attempt in range(2):
            refused = self.refusals()
            lost = self.lost_amid(clients, case, [])
            refused = self.refusals() - refused
            if not lost and not refused:
                break
            notes.append(f"lost {lost}, {refused} tokens refused")
        else:
            raise Failure("twice: " + "; ".join(notes))
        if clients in self.speaking:
            lost = self.lost_amid(clients, case, ["--deaf"])
            expect(len(lost) <= DEAF_LOSSES, f"behind a deaf NAT: lost {lost}")
            if lost:
                notes.append("behind a deaf NAT: lost before " + ", ".join(map(str, lost)))
        return "; ".join(notes) or None

    def lost_amid(self, clients, case, options):
        """Before which datagrams the moves began that lost a connection, and why."""
        pool, balancers = AMID[case]
        command = [self.binary("quic-nat"), *options, "--every", str(NEXT_MOVE), "--times", str(MOVES)]
        for prefix in PREFIXES[1 : 1 + balancers]:
            command += ["--target", f"127.0.0.1:{self.ports[prefix + pool]}"]
        for nth in FIRST_MOVES:
            command += ["--before", str(nth)]
        with Nat(*command, moves=False) as nats:
            errors = clients([f"127.0.0.1:{port}" for port in nats.ports], case)
        lost = {}
        for nth, error, (addresses, moves) in zip(FIRST_MOVES, errors, nats.said, strict=True):
            if error or addresses > 1:
                lost[nth] = error or "tried again"
            else:
                expect(moves == MOVES, f"the NAT has moved {moves} times")
        return lost

    def refusals(self):
        """Initials that were refused for their tokens, whether their senders were told so or not."""
        told = self.balancers("quic_lb_datagrams_replied_total", kind="invalid_token")
        return told + self.balancers("quic_lb_datagrams_dropped_total", reason="invalid_token")

    # An aioquic client and aioquic servers: what passes is what was sent.

    def aioquic_case(self, _, case):
        self.python_module("aioquic")
        options = dict(v2=["--version", "2"], early=["--early"], both=["--version", "2", "--early"])
        servers = json.dumps(list(python_servers(self.pools["aioquic"])))
        command = (os.path.join(HERE, "../netns/peer.py"), "serve", "--servers", servers)
        certificate = ("--certificate", self.path("cert.pem"), "--key", self.path("key.pem"))
        server = self.start(sys.executable, *command, *certificate, "--record")
        server.wait_for("ready")
        with self.nat("aioquic", moves=False) as nat:
            client = json.loads(run(
                sys.executable, os.path.join(HERE, "client.py"), "echo", *options[case],
                "--target", f"127.0.0.1:{nat.port}", "--certificate", self.path("cert.pem"),
            ))  # fmt: skip
        reports = server.end()
        expect(sum(report["misdelivered"] + report["unknown"] for report in reports) == 0, "astray")
        sent = {digest for report in reports for digest in report["sent"]}
        received = {digest for report in reports for digest in report["received"]}
        expect(received and received <= set(client["sent"]), "a datagram was changed on its way")
        expect(set(client["received"]) <= sent, "a datagram was changed on its way back")

    def python_module(self, module):
        try:
            run(sys.executable, "-c", f"import {module}")
        except Failure:
            raise Missing(f"{module} could not be installed") from None

    # All of it

    def rows(self):
        ours, amid, all_of_it = "our origins", tuple(AMID), ("http3", "rebind", "migrate", "retry")
        no_migration = ("http3", "rebind", "retry")
        python, rust = self.in_python, self.in_rust
        aioquic, quinn, qh3 = (
            python("aioquic", "http3"), rust("quinn"), python("qh3", "http3", "--stack", "qh3")
        )  # fmt: skip
        # Those that speak while they wait. Any other cannot be reached, and does not know, when the last that
        # it had to say went out just before a deaf NAT moved.
        self.speaking = {several for _, several in (aioquic, quinn, qh3)}
        yield "aioquic 1.7", ours, aioquic, all_of_it + amid
        yield "quinn", ours, quinn, all_of_it + amid
        yield "s2n-quic", ours, rust("s2n-quic"), no_migration + amid
        yield "qh3", ours, qh3, all_of_it + amid
        yield "curl_cffi", ours, python("curl_cffi", "curl"), no_migration + amid
        # As Firefox it does not speak HTTP/3 with these origins, through nothing either.
        safari = python("curl_cffi", "curl", "--imitate", "safari")
        yield "curl_cffi as Safari", ours, safari, amid
        yield "Chromium", ours, (self.chromium, self.chromium_visits), no_migration + amid
        yield "Caddy (quic-go)", ours, (None, self.caddy), amid
        yield "aioquic 1.7", "aioquic with routable IDs", None, ("v2", "early")

    def run(self):
        self.start_site()
        for peer, server, client, cases in self.rows():
            for case in cases:
                check, client_of_case = self.aioquic_case, None
                if client:
                    one, several = client
                    check, client_of_case = (
                        (self.amid_case, several) if case in AMID else (self.origin_case, one)
                    )
                title = f"{peer} to {server}: {COLUMNS[case]}"
                passed = self.check(title, check, client_of_case, case)
                self.results[peer, server, case] = {True: "✓", False: "✗", None: "skipped"}[passed]
        scrapes = [self.wait_for(port) for port in self.metrics]
        astray = sum(total(scrape, "backend_sim_misrouted_datagrams_total") for scrape in scrapes)
        if astray:
            self.failed.append("misrouted")
            print(f"FAILED: {astray:.0f} datagrams at a wrong origin")

    # The table

    def table(self):
        lines = ["| client | servers | " + " | ".join(COLUMNS.values()) + " |"]
        lines += ["| --- | --- |" + " --- |" * len(COLUMNS)]
        for peer, server, *_, cases in self.rows():
            cells = [self.results.get((peer, server, case), "") for case in COLUMNS]
            lines += [f"| {peer} | {server} | " + " | ".join(cells) + " |"]
        return lines

    def conclude(self):
        """Writes the table, or compares: what was skipped here may be anything there."""
        if self.arguments.only:
            return
        with open(TABLE) as file:
            text = file.read()
        before, rest = text.split(BEGIN + "\n")
        old, after = rest.split(END)
        new = self.table()
        if self.arguments.write:
            with open(TABLE, "w") as file:
                file.write(before + BEGIN + "\n" + "\n".join(new) + "\n" + END + after)
            return
        cells = lambda lines: [[cell.strip() for cell in line.split("|")] for line in lines]
        rows = list(zip(cells(old.strip().splitlines()), cells(new), strict=False))
        same = len(old.strip().splitlines()) == len(new) and all(
            len(a) == len(b) and all(y in (x, "skipped") for x, y in zip(a, b)) for a, b in rows
        )
        if not same:
            self.failed.append("table")
            print("FAILED: docs/peers.md has another table; tests/peers/run --write", flush=True)
            print("\n".join(new), flush=True)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--binaries", required=True, help="the folder of the programs under test")
parser.add_argument("--caddy", help="Caddy's program, if there is one")
parser.add_argument("--pictures", required=True, help="where screenshots go")
parser.add_argument("--write", action="store_true", help="write the table")
main(Peers, parser)

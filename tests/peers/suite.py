"""Peers that others wrote, through the balancer: clients to our origins, and an aioquic client to
aioquic servers. Everything runs on loopback; between client and balancer stands a NAT that moves.

    client ──► NAT (quic-nat) ──► balancer (quic-lb) ──► origins (backend-sim) or aioquic

Each case of each peer is checked, and the table of results belongs into docs/peers.md, between two
marks: `--write` puts it there, otherwise the two are compared. Cases of a peer that is not installed
are skipped, and are not compared. Started by `run`, which see.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "../foreign"))
import chromium  # noqa: E402
from common import (  # noqa: E402
    KEY, START, Failure, Missing, Suite, configuration, expect, main, python_servers, run, total,
    validation, write_certificate,
)  # fmt: skip

TABLE = os.path.join(HERE, "../../docs/peers.md")
BEGIN, END = "<!-- peers: made by tests/peers/run -->", "<!-- peers: end -->"
# Config IDs of the pools.
POOLS = {"web": 0, "aioquic": 3}
# The clients' requests, and how often the NAT moves meanwhile.
REQUESTS, PAUSE_MS, MOVE_SECONDS = 20, 150, 0.4
# Moves that a server has to have seen in such a case.
ENOUGH_MOVES = 4

COLUMNS = {
    "http3": "HTTP/3",
    "rebind": "NAT rebinds",
    "migrate": "migrates",
    "retry": "Retry by the balancer",
    "v2": "version 2",
    "early": "0-RTT",
}


def free_port():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        return udp.getsockname()[1]


class Nat:
    """A NAT that moves while it is needed, unless told to stay."""

    def __init__(self, binary, target, moves):
        command = [binary, "--target", target]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        word, port = self.process.stdout.readline().split()
        assert word == "ready"
        self.port = int(port)
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
            scheme = dict(config_id=config_id, server_id_length=2, nonce_length=6, key=KEY)
            self.pools[pool] = dict(scheme=scheme, backends=backends)
        self.write_one("lb.yaml", "", "off")
        # The same site behind another balancer, which asks every client for its address.
        self.write_one("retry.yaml", "retry-", "always")

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
        for name in self.pools["web"]["backends"]:
            self.metrics.append(free_port())
            self.start(
                self.binary("backend-sim"), "serve",
                "--config", self.path("lb.yaml"), "--backend", name,
                "--cert", self.path("cert.pem"), "--key", self.path("key.pem"),
                "--root", self.path("root"), "--metrics", f"127.0.0.1:{self.metrics[-1]}",
            )  # fmt: skip
        for file in ("lb.yaml", "retry.yaml"):
            self.start(self.binary("quic-lb"), "run", "--config", self.path(file))
        for port in [self.ports["admin"], self.ports["retry-admin"], *self.metrics]:
            self.wait_for(port)

    def wait_for(self, port):
        deadline = time.monotonic() + START
        while True:
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
            expect(time.monotonic() < deadline, f"nothing listens on port {port}")
            time.sleep(0.1)

    def binary(self, name):
        return os.path.join(self.arguments.binaries, name)

    def nat(self, pool, moves):
        return Nat(self.binary("quic-nat"), f"127.0.0.1:{self.ports[pool]}", moves)

    # Clients of our origins. Each gives what `/whoami` said at first and in the end.

    def python(self, module, *command):
        self.python_module(module)
        script = os.path.join(HERE, "client.py")
        return json.loads(run(sys.executable, script, *command, "--certificate", self.path("cert.pem")))

    def requests(self, case):
        steps = [] if case in ("http3", "retry") else ["--requests", str(REQUESTS), "--pause", str(PAUSE_MS)]
        return steps + (["--migrate"] if case == "migrate" else [])

    def aioquic(self, target, case):
        return self.python("aioquic", "http3", "--target", target, *self.requests(case))

    def qh3(self, target, case):
        return self.python("qh3", "http3", "--stack", "qh3", "--target", target, *self.requests(case))

    def curl(self, target, case):
        return self.python("curl_cffi", "curl", "--target", target, *self.requests(case))

    def quinn(self, target, case, stack="quinn"):
        command = (self.binary("quic-peer"), "http3", "--stack", stack, "--target", target)
        return json.loads(run(*command, "--certificate", self.path("cert.der"), *self.requests(case)))

    def s2n_quic(self, target, case):
        return self.quinn(target, case, "s2n-quic")

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
        scrapes = [self.wait_for(self.ports[name]) for name in ("admin", "retry-admin")]
        return sum(total(scrape, "quic_lb_retry_sent_total") for scrape in scrapes)

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
        yield "aioquic 1.7", "our origins", self.origin_case, self.aioquic, ("http3", "rebind", "migrate", "retry")
        yield "quinn", "our origins", self.origin_case, self.quinn, ("http3", "rebind", "migrate", "retry")
        yield "s2n-quic", "our origins", self.origin_case, self.s2n_quic, ("http3", "rebind", "retry")
        yield "qh3", "our origins", self.origin_case, self.qh3, ("http3", "rebind", "migrate", "retry")
        yield "curl_cffi", "our origins", self.origin_case, self.curl, ("http3", "rebind", "retry")
        yield "Chromium", "our origins", self.origin_case, self.chromium, ("http3", "rebind", "retry")
        yield "aioquic 1.7", "aioquic with routable IDs", self.aioquic_case, None, ("v2", "early")

    def run(self):
        self.start_site()
        for peer, server, check, client, cases in self.rows():
            for case in cases:
                title = f"{peer} to {server}: {COLUMNS[case]}"
                passed = self.check(title, check, client, case)
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
parser.add_argument("--pictures", required=True, help="where screenshots go")
parser.add_argument("--write", action="store_true", help="write the table")
main(Peers, parser)

"""Clients behind real NATs, the balancer, servers: each in a network namespace of its own.

              .--- nat1 ---.
    client ---|            |--- balancer --- servers
              '--- nat2 ---'       |
                               attacker

Each NAT masquerades into a small range of ports at random, and forgets its bindings when told to.
The client has an uplink through each. The attacker forges its senders. Started by `run`, which see.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "../foreign"))
import chromium  # noqa: E402
from common import (  # noqa: E402
    END, KEY, START, Failure, Suite, configuration, expect, main, python_servers, run, total, validation,
    write_certificate,
)  # fmt: skip

# How often each connection is moved while it downloads.
MOVES = 12
# Clients that prove their address: how many requests they make, how often they are moved meanwhile,
# and how many moves their server has to have seen.
VALIDATED_REQUESTS, MOVE_SECONDS, ENOUGH_MOVES = 40, 0.7, 5
# The same for Chromium, whose page reports on some of the time alone.
ENOUGH_MOVES_OF_PAGE = 3
# How long a server may take to see a move before there is another: a NAT may give a connection the
# port that it had.
MOVE = 3
# In milliseconds: a client whose first flight gets no answer repeats it after a second.
WITHIN_A_TIMEOUT = 900
VERSION_2 = 0x6B3343CF
# What the attacker sends, how many in a second and for how many seconds, and how many handshakes there
# have to have been meanwhile.
FLOODS, FLOOD_RATE, FLOOD_SECONDS, ENOUGH_HANDSHAKES = ("initials", "mixed"), 3000, 6, 50
# What blind senders send, each of them twice: short headers with the connection ID of a connection that
# has ended, and versions that nobody knows; how many in a second and for how many seconds, how often
# NATs rebind meanwhile, and which part of the handshakes has to succeed. (ten times the rate that held
# every port of a backend)
BLIND, BLIND_RATE, BLIND_SECONDS, REBIND_SECONDS, SUCCEED = ("short", "versions"), 3100, 8, 1, 0.95
# New connections in a second while a server is silent, how long it is, and from when on no new connection
# may fail: without checks, and with checks every second.
NEW_CONNECTIONS, SILENT_SECONDS, WITHOUT_CHECKS, WITH_CHECKS = 50, 12, 3.0, 2.5
# How often the balancer is replaced, how many seconds apart, and for how long nobody may hear anything meanwhile; its
# server says something ten times a second.
UPGRADES, UPGRADE_SECONDS, LONGEST_SILENCE = 20, 1, 0.25
# linux/ptrace.h, linux/wait.h.
PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT, WALL = 17, 0x4206, 0x4207, 0x40000000
# Forged senders are of this network (RFC 2544); no host has such an address.
FORGED = "198.18.0.0/15"
# What is downloaded over a link that narrows meanwhile: as fast as this, from as wide to as narrow as this, in octets.
DOWNLOAD, LINK_RATE, WIDE, NARROW = 20 << 20, "40mbit", 1500, 1280
# What the balancer's memory may grow by under a flood: its flows have a limit, and little else is kept.
FLOOD_OCTETS = 32 << 20

NAT = """
table ip nat {
  chain out {
    type nat hook postrouting priority srcnat;
    oifname "out" meta l4proto udp masquerade to :20000-20999 fully-random
  }
}
table ip6 nat {
  chain out {
    type nat hook postrouting priority srcnat;
    oifname "out" meta l4proto udp masquerade to :20000-20999 fully-random
  }
}
"""

# What the NATs make of a client's address and port.
NAT_OUTSIDE, NAT_PORTS = ("10.11.0.2", "10.12.0.2"), range(20000, 21000)
# The balancer's address that clients know. It is on no link of theirs.
VIP4, VIP6 = "10.99.0.1", "fd99::1"
SERVERS4, SERVERS6 = "10.20.0.2", "fd20::2"
# A server on a host of its own, whose link can be taken down.
LONE = "10.40.0.2"
ADMIN = "127.0.0.1:9090"
ADAPTIVE = '  adaptive: { hold: "2s" }'

# pool: quic_lb configuration, port of the listener, backends. Listeners are on the unspecified
# address, so that answers have to leave from the address that was asked.
POOLS = {
    "web": dict(
        scheme=dict(config_id=0, server_id_length=2, nonce_length=6, key=KEY),
        listen=("0.0.0.0", 4433),
        backends={f"web-{n}": (SERVERS4, 5000 + n) for n in (1, 2, 3)},
    ),
    "web6": dict(
        scheme=dict(config_id=1, server_id_length=3, nonce_length=13, key=KEY),
        listen=("[::]", 4433),
        backends={f"web6-{n}": (f"[{SERVERS6}]", 5000 + n) for n in (1, 2, 3)},
    ),
    "opaque": dict(
        scheme=None,
        listen=("0.0.0.0", 4434),
        backends={f"opaque-{n}": (SERVERS4, 5100 + n) for n in (1, 2, 3)},
    ),
    "aioquic": dict(
        scheme=dict(config_id=3, server_id_length=3, nonce_length=6, key=KEY),
        listen=("0.0.0.0", 4435),
        backends={f"aioquic-{n}": (SERVERS4, 5200 + n) for n in (1, 2, 3)},
    ),
    "aioquic-opaque": dict(
        scheme=None,
        listen=("[::]", 4436),
        backends={f"aioquic-opaque-{n}": (SERVERS4, 5300 + n) for n in (1, 2, 3)},
    ),
    # aioquic again, which leaves address validation to the balancer and reads its tokens.
    "aioquic-tokens": dict(
        scheme=dict(config_id=5, server_id_length=2, nonce_length=8, key=KEY),
        listen=("0.0.0.0", 4438),
        backends={f"aioquic-tokens-{n}": (SERVERS4, 5500 + n) for n in (1, 2, 3)},
        retry="always",
    ),
    # Our own servers, which honour the balancer's tokens; it asks all their clients for one.
    "origin": dict(
        scheme=dict(config_id=4, server_id_length=2, nonce_length=6, key=KEY),
        listen=("0.0.0.0", 4437),
        backends={f"origin-{n}": (SERVERS4, 5400 + n) for n in (1, 2, 3)},
        retry="always",
    ),
    # The same, whose clients are never asked.
    "plain": dict(
        scheme=dict(config_id=2, server_id_length=2, nonce_length=6, key=KEY),
        listen=("0.0.0.0", 4440),
        backends={f"plain-{n}": (SERVERS4, 5700 + n) for n in (1, 2)},
    ),
    # The same, asked when there are too many.
    "defended": dict(
        scheme=dict(config_id=6, server_id_length=2, nonce_length=6, key=KEY),
        listen=("0.0.0.0", 4439),
        backends={f"defended-{n}": (SERVERS4, 5600 + n) for n in (1, 2)},
        retry="adaptive",
        honours_tokens="probe",
    ),
    # One of two servers falls silent. Traffic alone shows it, or checks do.
    "watched": dict(
        scheme=dict(config_id=0, server_id_length=2, nonce_length=6, key=KEY),
        listen=("0.0.0.0", 4441),
        backends={"watched-1": (SERVERS4, 5801), "watched-2": (LONE, 5802)},
    ),
    "checked": dict(
        scheme=dict(config_id=1, server_id_length=2, nonce_length=6, key=KEY),
        listen=("0.0.0.0", 4442),
        backends={"checked-1": (SERVERS4, 5901), "checked-2": (LONE, 5902)},
        health_check='{ kind: quic, alpn: h3, certificate: ignored, interval: "1s", timeout: "500ms" }',
    ),
}


# The namespaces


class Network:
    """The namespaces and what connects them."""

    def __init__(self):
        self.prefix = f"qlb{os.getpid()}-"
        self.made = []
        self.uplink = 1

    def name(self, role):
        return self.prefix + role

    def run(self, role, *command, **arguments):
        return run("ip", "netns", "exec", self.name(role), *command, **arguments)

    def build(self):
        for role in ("client", "nat1", "nat2", "balancer", "servers", "lone", "attacker"):
            run("ip", "netns", "add", self.name(role))
            self.made.append(role)
            self.run(role, "ip", "link", "set", "lo", "up")
            for setting in (
                "net.ipv4.ip_forward=1",
                "net.ipv6.conf.all.forwarding=1",
                "net.ipv6.conf.default.accept_dad=0",
                "net.ipv4.conf.all.rp_filter=0",
                "net.ipv4.conf.default.rp_filter=0",
            ):
                self.run(role, "sysctl", "-qw", setting)
        for n in (1, 2):
            nat = f"nat{n}"
            self.link("client", f"up{n}", f"10.{n}.0.2", nat, "in", f"10.{n}.0.1")
            self.link(nat, "out", f"10.1{n}.0.2", "balancer", f"down{n}", f"10.1{n}.0.1")
            self.run(nat, "ip", "route", "add", "default", "via", f"10.1{n}.0.1")
            self.run(nat, "ip", "-6", "route", "add", "default", "via", f"fd00:1{n}::1")
            self.run(nat, "nft", "-f", "-", stdin=NAT)
        self.link("balancer", "fleet", "10.20.0.1", "servers", "lan", SERVERS4)
        self.run("balancer", "ip", "addr", "add", "fd20::1/64", "dev", "fleet", "nodad")
        self.run("servers", "ip", "addr", "add", f"{SERVERS6}/64", "dev", "lan", "nodad")
        self.link("balancer", "aside", "10.40.0.1", "lone", "lan", LONE)
        self.link("attacker", "wan", "10.30.0.2", "balancer", "wild", "10.30.0.1")
        self.run("attacker", "ip", "route", "add", "default", "via", "10.30.0.1")
        # What is answered to forged senders ends with the attacker.
        self.run("balancer", "ip", "route", "add", FORGED, "via", "10.30.0.2")
        self.run("attacker", "sysctl", "-qw", "net.ipv4.ip_forward=0")
        self.run("balancer", "ip", "addr", "add", f"{VIP4}/32", "dev", "lo")
        self.run("balancer", "ip", "addr", "add", f"{VIP6}/128", "dev", "lo", "nodad")
        self.use_uplink(1)

    def link(self, one, one_name, one_address, other, other_name, other_address):
        a, b = self.name(one), self.name(other)
        peer = ("peer", "name", other_name, "netns", b)
        run("ip", "link", "add", one_name, "netns", a, "type", "veth", *peer)
        ends = ((one, one_name, one_address), (other, other_name, other_address))
        for role, device, address in ends:
            # 10.7.0.1 has fd00:7::1 beside it.
            _, net, _, host = address.split(".")
            self.run(role, "ip", "addr", "add", f"{address}/24", "dev", device)
            v6 = f"fd00:{net}::{host}/64"
            self.run(role, "ip", "addr", "add", v6, "dev", device, "nodad")
            self.run(role, "ip", "link", "set", device, "up")

    def use_uplink(self, n):
        self.uplink = n
        for family, gateway in (("-4", f"10.{n}.0.1"), ("-6", f"fd00:{n}::1")):
            route = ("default", "via", gateway, "dev", f"up{n}")
            self.run("client", "ip", family, "route", "replace", *route)

    def rebind(self):
        """Both NATs forget which outside port stands for whom."""
        for nat in ("nat1", "nat2"):
            for family in ("ipv4", "ipv6"):
                # It fails when there was nothing to forget.
                self.run(nat, "conntrack", "-D", "-f", family, "-p", "udp", check=False)

    def change_uplink(self):
        """The client goes on over its other uplink, whose NAT does not know it."""
        self.use_uplink(3 - self.uplink)
        self.rebind()

    def remove(self):
        for role in self.made:
            run("ip", "netns", "del", self.name(role), check=False)


class Namespaces(Suite):
    def __init__(self, arguments, folder):
        super().__init__(arguments, folder)
        self.network = Network()
        self.origin_metrics = []
        self.processes_of = {}
        # The process that has taken over from the first balancer, by its number.
        self.balancer_now = None

    def start(self, role, *command):
        return super().start("ip", "netns", "exec", self.network.name(role), *command)

    # Servers and balancer

    def start_balancer(self):
        with open(self.path("quic-lb.yaml"), "w") as file:
            more = ["limits: { flows: 4000 }", 'timeouts: { drain: "1s" }', *validation(ADAPTIVE)]
            file.write(configuration(POOLS, ADMIN, *more))
        command = ("run", "--config", self.path("quic-lb.yaml"))
        self.balancer = self.start("balancer", self.arguments.balancer, *command)
        deadline = time.monotonic() + START
        while "readyz" not in self.admin("/readyz", "-w", "readyz"):
            expect(self.balancer.process.poll() is None, self.balancer.logged())
            expect(time.monotonic() < deadline, "the balancer does not become ready")
            time.sleep(0.1)

    def start_quinn(self):
        files = ("--config", self.path("quic-lb.yaml"), "--certificate", self.path("quinn.der"))
        pools = [word for pool in ("web", "web6", "opaque") for word in ("--pool", pool)]
        self.servers = self.start("servers", self.arguments.peer, "serve", *files, *pools)
        self.servers.wait_for("ready")

    def start_aioquic(self, pools, *options):
        servers = json.dumps([spec for pool in pools for spec in python_servers(POOLS[pool])])
        files = ("--certificate", self.path("cert.pem"), "--key", self.path("key.pem"))
        command = (os.path.join(HERE, "peer.py"), "serve", "--servers", servers, *files, *options)
        process = self.start("servers", self.arguments.python, *command)
        process.wait_for("ready")
        return process

    def start_origins(self):
        os.mkdir(self.path("root"))
        shutil.copy(chromium.PAGE, self.path("root"))
        pools = ("origin", "plain", "defended", "watched", "checked")
        backends = [backend for pool in pools for backend in POOLS[pool]["backends"].items()]
        for nth, (name, (host, _)) in enumerate(backends):
            metrics, role = f"127.0.0.1:{9100 + nth}", "lone" if host == LONE else "servers"
            self.origin_metrics.append((role, metrics))
            certificate = ("--cert", self.path("cert.pem"), "--key", self.path("key.pem"))
            files = ("--config", self.path("quic-lb.yaml"), *certificate, "--root", self.path("root"))
            command = ("serve", *files, "--backend", name, "--metrics", metrics)
            origin = self.processes_of[name] = self.start(role, self.arguments.origin, *command)
            deadline, ready = time.monotonic() + START, ("curl", "-sf", f"http://{metrics}/metrics")
            while not self.network.run(role, *ready, check=False):
                expect(origin.process.poll() is None, origin.logged())
                expect(time.monotonic() < deadline, f"{name} does not become ready")
                time.sleep(0.1)

    def admin(self, path, *options):
        url = f"http://{ADMIN}{path}"
        return self.network.run("balancer", "curl", "-sf", *options, url, check=False)

    def count(self, name, **labels):
        return total(self.admin("/metrics"), f"quic_lb_{name}", **labels)

    def by(self, name, label, **labels):
        """The samples of a metric that are not zero, by one of its labels."""
        scrape = self.admin("/metrics")
        values = set(re.findall(rf'^quic_lb_{name}{{.*{label}="(\w+)"', scrape, re.M))
        counts = {its: total(scrape, f"quic_lb_{name}", **labels, **{label: its}) for its in values}
        return {its: count for its, count in sorted(counts.items()) if count}

    def memory(self):
        """Resident octets of the balancer."""
        return total(self.admin("/metrics"), "process_resident_memory_bytes")

    def origins(self, name):
        """The sum of a metric of all origins."""
        scrape = lambda role, address: self.network.run(role, "curl", "-sf", f"http://{address}/metrics")
        return sum(total(scrape(*where), f"backend_sim_{name}") for where in self.origin_metrics)

    def rules(self, listener):
        scrape, count = self.admin("/metrics"), "quic_lb_datagrams_forwarded_total"
        rules = ("cid", "four_tuple_scid", "dcid", "four_tuple", "fallback")
        return {rule: total(scrape, count, listener=listener, rule=rule) for rule in rules}

    # Scenarios

    def downloads(self, stack, pool, move, by_rule, *options, connections=3):
        """Connections download while they are moved again and again."""
        listener = f"to-{pool}"
        host, port = POOLS[pool]["listen"]
        target = f"[{VIP6}]:{port}" if host == "[::]" else f"{VIP4}:{port}"
        before = self.rules(listener)
        client = self.client(stack, target, pool, connections, *options)
        try:
            client.wait_for("ready")
            # Each connection has one address to begin with and gets one with each move.
            self.wait_until_seen(client, connections, 1, lambda: None)
            for nth in range(MOVES):
                move()
                self.wait_until_seen(client, connections, nth + 2, move)
            during = self.rules(listener)
            reports = client.end()
        finally:
            client.kill()
        expect(len(reports) == connections, "reports are missing")
        for report in reports:
            expect(report["lost"] is None, f"a connection was lost: {report}")
            expect(report["downloads"] > 0, f"nothing was downloaded: {report}")
            expect(report["rebinds"] >= 10, f"not moved often enough: {report}")
        fired = {rule: during[rule] - before[rule] for rule in during}
        expect(fired[by_rule] > 0, f"rule {by_rule} did not fire: {fired}")
        moves = sum(report["rebinds"] for report in reports)
        octets = sum(report["octets"] for report in reports)
        return f"{connections} connections, {moves} moves, {octets >> 20} MiB, rules {fired}"

    def narrowed(self, pool):
        """A router's link to the client narrows in the midst of a download: nothing that the server sends then gets
        through, whole batches of it not even in part."""
        router = lambda *command, **options: self.network.run("nat1", *command, **options)
        width = lambda octets: router("ip", "link", "set", "in", "mtu", str(octets))
        passed = lambda: int(router("cat", "/sys/class/net/in/statistics/tx_bytes"))
        expect(self.network.uplink == 1, "the uplink is another one")
        router(*f"tc qdisc add dev in root tbf rate {LINK_RATE} burst 64k limit 400k".split())
        target = f"{VIP4}:{POOLS[pool]['listen'][1]}"
        files = ("--target", target, "--certificate", self.path("cert.der"), "--octets", str(DOWNLOAD))
        client = self.start("client", self.arguments.peer, "http3", *files)
        try:
            before, deadline = passed(), time.monotonic() + START
            while passed() - before < DOWNLOAD // 4:
                expect(time.monotonic() < deadline, "nothing is downloaded")
                time.sleep(0.02)
            width(NARROW)
            there = passed() - before
            began = time.monotonic()
            expect(there < DOWNLOAD // 2, f"{there} octets were through before the link narrowed")
            client.report()
            return f"{DOWNLOAD >> 20} MiB; {(DOWNLOAD - there) >> 20} of them in {time.monotonic() - began:.1f} s over the narrow link"
        finally:
            client.kill()
            width(WIDE)
            router("tc", "qdisc", "del", "dev", "in", "root", check=False)

    def version_2(self, move):
        """aioquic at both ends, over version 2: its servers take the balancer's word for addresses."""
        pool, connections = "aioquic-tokens", 3
        sent = self.count("retry_sent_total")
        valid = self.count("retry_tokens_total", result="valid")
        server = self.start_aioquic([pool], "--token-key", KEY)
        note = self.downloads("aioquic", pool, move, "cid", "--version-2", connections=connections)
        retries = self.count("retry_sent_total") - sent
        valid = self.count("retry_tokens_total", result="valid") - valid
        expect(retries >= connections and valid >= connections, f"{retries} Retries, {valid} tokens")
        reports = self.arrived(server)
        versions = {version for report in reports for version in report["versions"]}
        expect(versions == {VERSION_2}, f"versions {versions}")
        clients = [tuple(client) for report in reports for client in report["token_clients"]]
        expect(len(set(clients)) == connections, f"tokens of {clients}")
        for host, port in clients:
            expect(host in NAT_OUTSIDE and port in NAT_PORTS, f"no NAT is at {host} port {port}")
        return f"{retries} Retries, tokens of {sorted(set(clients))}, {note}"

    def validated(self, stack, move):
        """A client has to prove its address, keeps its connection while it is moved, and its server
        knows from the token where it was at first."""
        port = POOLS["origin"]["listen"][1]
        common = ("http3", "--stack", stack, "--target", f"{VIP4}:{port}")
        common += ("--requests", str(VALIDATED_REQUESTS), "--pause", "150", "--certificate")
        if stack == "aioquic":
            script = os.path.join(HERE, "../peers/client.py")
            command = (self.arguments.python, script, *common, self.path("cert.pem"))
        else:
            command = (self.arguments.peer, *common, self.path("cert.der"))
        report = lambda output: json.loads(output[-1])
        return self.moved(command, move, report, ENOUGH_MOVES)

    def browsed(self, move):
        """The same with Chromium, which loads a page that asks and downloads."""
        picture, port = self.path("page.png"), POOLS["origin"]["listen"][1]
        command = chromium.command(VIP4, port, self.public_key, self.path("chromium"), picture)
        report = lambda output: chromium.result("\n".join(output))
        note = self.moved(command, move, report, ENOUGH_MOVES_OF_PAGE)
        chromium.check_picture(picture)
        return note

    def moved(self, command, move, report, enough):
        """Moves a client until it ends, and looks at what it reports. A token is good for the port that
        asked, so that the first move comes after the handshake."""
        sent, answered = self.count("retry_sent_total"), self.origins("requests_total")
        client, deadline, output = self.start("client", *command), time.monotonic() + END, []
        try:
            while (line := client.next_line(time.monotonic() + MOVE_SECONDS)) is not None:
                expect(time.monotonic() < deadline, "the client does not end")
                if line:
                    output.append(line)
                elif self.origins("requests_total") > answered:
                    move()
        finally:
            client.kill()
        expect(output, f"the client failed: {client.logged()}")
        reported = report(output)
        before, after = reported["before"], reported["after"]
        expect(before["backend"] == after["backend"], f"{before['backend']}, then {after['backend']}")
        moves = after["path_changes"] - before["path_changes"]
        expect(moves >= enough, f"the server has seen {moves} moves")
        told, _, port = (before["true_client"] or ":0").rpartition(":")
        expect(told in NAT_OUTSIDE and int(port) in NAT_PORTS, f"no NAT is at {told} port {port}")
        retries = self.count("retry_sent_total") - sent
        expect(retries > 0, "no Retry was sent")
        return f"{retries} Retries, {moves} moves, first seen at {before['client']} for {told}:{port}"

    def flooded(self):
        """While forged senders flood the balancer, which begins to ask for addresses by itself, clients
        behind a NAT keep what they have, and every handshake of theirs succeeds in time."""
        listener, target = "to-defended", f"{VIP4}:{POOLS['defended']['listen'][1]}"
        files = ("--target", target, "--certificate", self.path("cert.der"))
        sent, results = self.count("retry_sent_total"), self.token_results()
        client, floods = self.start("client", self.arguments.peer, "visit", *files), []
        try:
            client.wait_for("ready")
            memory = self.memory()
            for kind in FLOODS:
                how = ("--rate", str(FLOOD_RATE), "--duration", f"{FLOOD_SECONDS}s", "--json")
                command = ("flood", "--target", target, "--kind", kind, *how)
                floods.append(self.start("attacker", self.arguments.origin, *command).report())
            grown, report = self.memory() - memory, client.end()
        finally:
            client.kill()
        expect(report["lost"] == [], f"established connections were lost: {report['lost']}")
        expect(report["refused"] == [], f"handshakes failed: {report['refused']}")
        expect(report["handshakes"] >= ENOUGH_HANDSHAKES and report["requests"] > 0, f"{report}")
        expect(all(flood["forged_senders"] for flood in floods), f"{floods}")
        # Every datagram has one verdict. A token that is dropped has a reason; one that a flipped bit makes a
        # token of NEW_TOKEN has one too, and its client is asked again.
        verdicts = self.verdicts(listener=listener)
        begun = self.count("retry_switches_total", listener=listener, reason="rate")
        expect(begun > 0, "the balancer has not begun to ask for addresses")
        asked = self.count("retry_sent_total") - sent
        expect(asked >= verdicts["replied"] > 0, f"{asked} Retries, {verdicts}")
        now = self.token_results()
        results = {its: count - results.get(its, 0) for its, count in now.items()}
        invalid = self.count("datagrams_dropped_total", listener=listener, reason="invalid_token")
        refused = sum(count for result, count in results.items() if result != "valid")
        expect(refused >= invalid > 0, f"{invalid} dropped for their token; {results}")
        expect(grown < FLOOD_OCTETS, f"memory has grown by {grown} octets")
        flood = sum(flood["sent"] for flood in floods)
        return (
            f"{flood} datagrams of {', '.join(FLOODS)}; {report['established']} connections with "
            f"{report['requests']} requests, 0 lost; {report['handshakes']} handshakes, 0 failed; "
            f"{verdicts}; dropped {self.by('datagrams_dropped_total', 'reason', listener=listener)}; "
            f"tokens {results}; memory {memory >> 20} MiB and {grown >> 10} KiB more"
        )

    def blinded(self, pool, kind):
        """Forged senders who see no answers send twice each, towards one server. Clients behind a NAT that
        rebinds every second keep their connections, and new ones get theirs."""
        listener, target = f"to-{pool}", f"{VIP4}:{POOLS[pool]['listen'][1]}"
        files = ("--target", target, "--certificate", self.path("cert.der"))
        backend = next(iter(POOLS[pool]["backends"]))
        encode = ("cid", "encode", "--config", self.path("quic-lb.yaml"), "--backend", backend)
        cid = run(self.arguments.balancer, *encode).split()[0]
        evicted = self.count("flows_evicted_total", listener=listener)
        client = self.start("client", self.arguments.peer, "visit", *files)
        try:
            client.wait_for("ready")
            seconds = self.arguments.blind_seconds
            how = ("--rate", str(BLIND_RATE), "--duration", f"{seconds}s", "--json", "--cid", cid)
            command = ("flood", "--target", target, "--kind", kind, *how)
            flood, rebound = self.start("attacker", self.arguments.origin, *command), 0
            while flood.process.poll() is None:
                time.sleep(REBIND_SECONDS)
                self.network.rebind()
                rebound += 1
            sent, report = flood.report(), client.end()
        finally:
            client.kill()
        expect(sent["forged_senders"], f"{sent}")
        expect(report["lost"] == [], f"established connections were lost: {report['lost']}")
        tried = report["handshakes"] + len(report["refused"])
        expect(
            report["handshakes"] >= SUCCEED * tried,
            f"{report['handshakes']} of {tried} handshakes: {report['refused']}",
        )
        evicted = self.count("flows_evicted_total", listener=listener) - evicted
        dropped = self.by("datagrams_dropped_total", "reason", listener=listener)
        return (
            f"{sent['sent']} datagrams; {report['established']} connections, {rebound} rebindings, "
            f"{report['requests']} requests, 0 lost; {report['handshakes']} of {tried} handshakes; "
            f"{evicted} flows evicted; dropped {dropped}"
        )

    def silenced(self, pool, how, from_when):
        """One of two servers falls silent, at 50 new connections a second. Soon no new connection fails, none that was
        established is lost, and the server gets new ones when it is back."""
        target, backend = f"{VIP4}:{POOLS[pool]['listen'][1]}", f"{pool}-2"
        files = ("--target", target, "--certificate", self.path("cert.der"))
        pace = ("--connections", "6", "--new-every", str(1000 // NEW_CONNECTIONS))
        state = lambda: next(iter(self.by("backend_state", "state", backend=backend)), None)
        # Not behind a NAT: its ports would be used up.
        client = self.start("attacker", self.arguments.peer, "visit", *files, *pace)
        try:
            client.wait_for("ready")
            ready = time.monotonic()
            time.sleep(2)
            expect(state() == "active", f"{backend} is {state()} at first")
            silent = time.monotonic() - ready
            self.silence(backend, how, True)
            states = []
            while time.monotonic() - ready < silent + SILENT_SECONDS:
                states.append(state())
                time.sleep(0.1)
            back = time.monotonic()
            self.silence(backend, how, False)
            while state() not in ("active", "probing"):
                expect(time.monotonic() - back < START, f"{backend} does not come back")
                time.sleep(0.05)
            back = time.monotonic() - back
            time.sleep(2)
            report = client.end()
        finally:
            self.silence(backend, how, False)
            client.kill()
        expect("down" in states, f"{backend} was never down: {states}")
        expect(report["lost"] == [], f"established connections were lost: {report['lost']}")
        failed = sorted(round(at - silent, 1) for at in report["refused_at"])
        late = [at for at in failed if at >= from_when]
        expect(not late, f"{len(late)} new connections failed, so many seconds after the silence: {late[:20]}, {report['refused'][-5:]}, {self.balancer.logged()}")
        enough = NEW_CONNECTIONS * SILENT_SECONDS // 2
        expect(report["handshakes"] >= enough, f"{report['handshakes']} handshakes")
        return (
            f"{report['handshakes']} connections, {len(failed)} failed, the last one {max(failed, default=0)} s after the "
            f"silence; {report['established']} established, 0 lost; down for the first time after "
            f"{states.index('down') * 0.1:.1f} s or more, back after {back:.1f} s"
        )

    def killed(self, pool):
        """One of two servers is gone, at 50 new connections a second. Its host refuses what comes, and says so a few times a second at
        most. No new connection waits for a timeout of its client for that."""
        target, backend = f"{VIP4}:{POOLS[pool]['listen'][1]}", f"{pool}-2"
        files = ("--target", target, "--certificate", self.path("cert.der"))
        pace = ("--connections", "1", "--new-every", str(1000 // NEW_CONNECTIONS), "--within", str(WITHIN_A_TIMEOUT))
        moved = lambda: self.count("backend_refused_moved_total", backend=backend)
        # Not behind a NAT: its ports would be used up.
        client = self.start("attacker", self.arguments.peer, "visit", *files, *pace)
        try:
            client.wait_for("ready")
            ready = time.monotonic()
            time.sleep(1)
            before = moved()
            self.processes_of[backend].kill()
            killed = time.monotonic() - ready
            time.sleep(SILENT_SECONDS)
            report = client.end()
        finally:
            client.kill()
        gone, states = moved() - before, self.by("backend_state", "state", backend=backend)
        # Those that it was in the midst of are lost with it.
        failed = zip(report["refused_at"], report["refused"])
        late = [(round(at - killed, 2), why) for at, why in failed if at > killed]
        expect(gone > 0, f"nothing was moved: {states}, {report}")
        expect(
            not late,
            f"{len(late)} connections came late, so many seconds after the end: {late[:20]}; {gone} first flights were moved, "
            f"{self.count('backend_refused_total', backend=backend)} refused; {self.balancer.logged()}",
        )
        return f"{report['handshakes']} connections, none late; {gone} first flights were moved; then {states}"

    def upgraded(self, pool):
        """The balancer is replaced by itself again and again, while clients listen that send nothing but acknowledgements, others
        ask again and again, and new ones come. Nobody is lost or waits for long, and the kernel drops nothing."""
        listener, target = f"to-{pool}", f"{VIP4}:{POOLS[pool]['listen'][1]}"
        files = ("--target", target, "--certificate", self.path("cert.der"))
        # Not behind a NAT: its ports would be used up.
        listening = self.start("attacker", self.arguments.peer, "listen", *files)
        visiting = self.start("attacker", self.arguments.peer, "visit", *files, "--every", "20")
        standstills, strays = [], self.origins("misrouted_datagrams_total")
        # Each process counts from zero.
        names = ("datagrams_dropped_total", "path_changes_total")
        count = lambda: [self.count(name, listener=listener) for name in names]
        counted = []
        try:
            listening.wait_for("ready")
            visiting.wait_for("ready")
            drops, before = self.kernel_drops(), count()
            for _ in range(UPGRADES):
                counted.append(count())
                told = self.network.run("balancer", self.arguments.balancer, "upgrade", "--admin", ADMIN)
                process, millis = re.match(r"process (\d+) goes on with \d+ flows; handed over in ([\d.]+) ms", told).groups()
                self.balancer_now, standstill = int(process), float(millis)
                standstills.append(standstill)
                time.sleep(UPGRADE_SECONDS)
            heard, visited = listening.end(), visiting.end()
        finally:
            listening.kill()
            visiting.kill()
        drops = self.kernel_drops() - drops
        verdicts = self.verdicts(listener=listener)
        counted.append(count())
        dropped, changes = (sum(of) - at_first for of, at_first in zip(zip(*counted), before))
        expect(heard["lost"] == [] and visited["lost"] == [], f"lost: {heard['lost']} {visited['lost']}")
        expect(visited["refused"] == [], f"handshakes failed: {visited['refused']}")
        expect(len(heard["octets"]) == 20 and min(heard["octets"]) > 0, f"{heard}")
        expect(heard["silence"] <= LONGEST_SILENCE, f"silent for {heard['silence']} s")
        expect(drops == 0, f"the kernel has dropped {drops} datagrams")
        expect(dropped == 0, f"the balancer has dropped {dropped} datagrams")
        expect(self.origins("misrouted_datagrams_total") == strays, "datagrams at a wrong origin")
        # Their servers would see other addresses.
        expect(changes == 0, f"{changes} connections came to another port")
        return (
            f"{UPGRADES} upgrades, at a standstill for {max(standstills):.0f} ms at most; 20 connections listened, silent "
            f"for {heard['silence'] * 1000:.0f} ms at most; {visited['requests']} requests on {visited['established']} connections, "
            f"{visited['handshakes']} new ones, 0 lost; {verdicts} since the last, kernel drops 0"
        )

    def stuck(self):
        """One thread of the balancer stands still, as a debugger holds it. It is seen, and that it goes on."""
        # `ip netns exec` becomes the balancer.
        process = self.balancer_now or self.balancer.process.pid
        threads = f"/proc/{process}/task"
        named = lambda thread: open(f"{threads}/{thread}/comm").read().strip()
        worker = next(int(thread) for thread in os.listdir(threads) if named(thread) == "worker-0")
        ptrace = ctypes.CDLL(None, use_errno=True).ptrace
        ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        trace = lambda request: expect(
            ptrace(request, worker, None, None) == 0, os.strerror(ctypes.get_errno())
        )

        def until(wanted):
            began = time.monotonic()
            while ('"healthy":true' in self.admin("/healthz")) != wanted:
                expect(time.monotonic() < began + START, f"the balancer is not healthy: {not wanted}")
                time.sleep(0.1)
            return time.monotonic() - began

        until(True)
        trace(PTRACE_SEIZE)
        try:
            trace(PTRACE_INTERRUPT)
            os.waitpid(worker, WALL)
            seen = until(False)
            expect(not self.admin("/readyz"), "it is ready")
            expect(self.count("workers_stuck") == 1, "the metric does not say so")
        finally:
            trace(PTRACE_DETACH)
        return f"seen after {seen:.1f} s, healthy again {until(True):.1f} s after it went on"

    def kernel_drops(self):
        """Datagrams that found no room in a socket of the balancer's namespace."""
        counted = 0
        for file, name in (("snmp", "Udp"), ("snmp6", "Udp6")):
            text = self.network.run("balancer", "cat", f"/proc/net/{file}")
            if file == "snmp":
                names, values = [line.split()[1:] for line in text.splitlines() if line.startswith(f"{name}:")]
                counted += int(dict(zip(names, values))["RcvbufErrors"])
            else:
                counted += int(dict(line.split() for line in text.splitlines())[f"{name}RcvbufErrors"])
        return counted

    def silence(self, backend, how, silent):
        if how == "stopped":
            process = self.processes_of[backend].process
            process.send_signal(signal.SIGSTOP if silent else signal.SIGCONT)
        else:
            self.network.run("lone", "ip", "link", "set", "lan", "down" if silent else "up")

    def token_results(self):
        return self.by("retry_tokens_total", "result")

    def client(self, stack, target, pool, connections, *options):
        common = ("fetch", "--target", target, "--connections", str(connections), *options)
        if stack == "quinn":
            certificate = "cert.der" if pool.startswith("aioquic") else "quinn.der"
            octets = str((2 if pool.startswith("aioquic") else 32) << 20)
            options = ("--certificate", self.path(certificate), "--octets", octets)
            return self.start("client", self.arguments.peer, *common, *options)
        options = ("--octets", str(2 << 20))
        script = os.path.join(HERE, "peer.py")
        return self.start("client", self.arguments.python, script, *common, *options)

    def wait_until_seen(self, client, connections, addresses, again):
        """Until the server of each connection has seen so many addresses of it. A NAT that gives a
        connection the port it had is told `again`."""
        for _ in range(START // MOVE):
            deadline, line = time.monotonic() + MOVE, None
            while line != "":
                if sum(seen >= addresses for seen in client.seen.values()) == connections:
                    return
                line = client.next_line(deadline)
                expect(line is not None, f"the client has ended: {client.logged()}")
            again()
        raise Failure(f"connections stand still at {client.seen} addresses of {addresses}")

    # What holds at the end

    def arrived(self, servers):
        """The servers' reports: zero datagrams at a wrong one, zero connections lost."""
        reports = servers.end()
        for report in reports:
            name = report["name"]
            expect(report["misdelivered"] == 0, f"{name}: misdelivered {report['misdelivered']}")
            expect(report["unknown"] == 0, f"{name}: {report['unknown']} datagrams of nobody")
            expect(report["lost"] == [], f"{name} lost {report['lost']}")
        return reports

    def strays(self):
        """Zero datagrams at a wrong origin."""
        strays, answered = self.origins("misrouted_datagrams_total"), self.origins("requests_total")
        expect(strays == 0 and answered > 0, f"{strays} datagrams at a wrong origin, {answered} requests")
        return f"{answered} requests, 0 datagrams at a wrong origin"

    def arrivals(self, servers):
        reports = self.arrived(servers)
        own = sum(report["own"] for report in reports)
        connections = sum(report["connections"] for report in reports)
        expect(own > 0 and connections > 0, "the servers have served nobody")
        resets = sum(report["resets"] for report in reports)
        note = f", {resets} stateless resets of clients" if resets else ""
        return f"{connections} connections, {own} datagrams at their own server, 0 elsewhere{note}"

    def at_rest(self):
        """What the balancer says of itself when it gets nothing any more."""
        received, scrape = lambda scrape: total(scrape, "quic_lb_datagrams_received_total"), ""
        for _ in range(END):
            before, scrape = scrape, self.admin("/metrics")
            if before and received(before) == received(scrape):
                return scrape
            time.sleep(1)
        raise Failure("the balancer does not come to rest")

    def verdicts(self, **labels):
        """At rest each datagram received has one verdict."""
        scrape, verdicts = self.at_rest(), ("received", "forwarded", "dropped", "replied")
        sums = {its: total(scrape, f"quic_lb_datagrams_{its}_total", **labels) for its in verdicts}
        decided = sums["forwarded"] + sums["dropped"] + sums["replied"]
        expect(sums["received"] == decided > 0, f"{sums}")
        return sums

    def end_of_balancer(self):
        if not self.balancer_now:
            self.balancer.process.send_signal(signal.SIGTERM)
            expect(self.balancer.process.wait(END) == 0, self.balancer.logged())
            return
        # It is another process, and nobody's child here: its last record says how it went.
        os.kill(self.balancer_now, signal.SIGTERM)
        deadline = time.monotonic() + END
        while "ended reason=" not in self.balancer.logged():
            expect(time.monotonic() < deadline, self.balancer.logged())
            time.sleep(0.1)

    def run(self):
        rebind, change_uplink = self.network.rebind, self.network.change_uplink
        self.network.build()
        self.public_key = write_certificate(self.folder)
        self.start_balancer()
        self.start_quinn()
        quinn = [
            ("a NAT rebinds", "web", rebind, "cid"),
            ("a NAT rebinds, over IPv6", "web6", rebind, "cid"),
            ("the uplink changes", "web", change_uplink, "cid"),
            ("the uplink changes, over IPv6", "web6", change_uplink, "cid"),
            ("a NAT rebinds, servers without routable IDs", "opaque", rebind, "dcid"),
            ("the uplink changes, servers without routable IDs", "opaque", change_uplink, "dcid"),
        ]
        aioquic = [
            ("aioquic servers, a NAT rebinds", "aioquic", rebind, "cid"),
            ("aioquic servers, the uplink changes", "aioquic", change_uplink, "cid"),
            ("aioquic servers without routable IDs, a NAT rebinds", "aioquic-opaque", rebind, "dcid"),
        ]
        for title, *scenario in quinn:
            self.check(f"quinn client: {title}", self.downloads, "quinn", *scenario)
        validated = [("quinn", rebind), ("quinn", change_uplink)]
        # s2n-quic's clients keep the address that they sent from first, and that is of the first uplink.
        validated += [("s2n-quic", rebind)]
        if self.arguments.python:
            validated += [("aioquic", rebind), ("aioquic", change_uplink)]
            aioquic_servers = self.start_aioquic(["aioquic", "aioquic-opaque"])
            for title, *scenario in quinn + aioquic:
                self.check(f"aioquic client: {title}", self.downloads, "aioquic", *scenario)
            for title, *scenario in aioquic:
                self.check(f"quinn client: {title}", self.downloads, "quinn", *scenario)
            title = "aioquic client: version 2, aioquic servers read the balancer's tokens, a NAT rebinds"
            self.check(title, self.version_2, rebind)
        else:
            self.skip("aioquic as client and as server", "it could not be installed")
        self.start_origins()
        self.network.use_uplink(1)
        self.check("quinn client: a link narrows in the midst of a download", self.narrowed, "plain")
        for stack, move in validated:
            what = "a NAT rebinds" if move == rebind else "the uplink changes"
            title = f"{stack} client: the balancer asks for its address, {what}"
            self.check(title, self.validated, stack, move)
        for pool, from_when in (("watched", WITHOUT_CHECKS), ("checked", WITH_CHECKS)):
            for how in ("stopped", "cut off"):
                checks = "checks" if pool == "checked" else "traffic alone"
                title = f"quinn client: one of two servers is {how}, {checks}"
                self.check(title, self.silenced, pool, how, from_when)
        title = "Chromium: the balancer asks for its address, a NAT rebinds"
        self.check(title, self.browsed, rebind)
        self.check("quinn client: the balancer is upgraded again and again", self.upgraded, "plain")
        self.check("a worker that stands still is seen", self.stuck)
        self.check("quinn client: forged senders flood the balancer", self.flooded)
        for pool, mode in (("plain", "off"), ("origin", "always"), ("defended", "adaptive")):
            for kind in BLIND:
                title = f"quinn client: blind senders, {kind}, validation {mode}, a NAT rebinds"
                self.check(title, self.blinded, pool, kind)
        self.check("verdicts add up to the datagrams received", self.verdicts)
        self.check("nothing arrived at a wrong quinn server", self.arrivals, self.servers)
        if self.arguments.python:
            self.check("nothing arrived at a wrong aioquic server", self.arrivals, aioquic_servers)
        self.check("nothing arrived at a wrong origin", self.strays)
        # The last one: nobody counts for a server that is gone.
        self.check("quinn client: one of two servers is killed", self.killed, "watched")
        self.check("the balancer ends when told to", self.end_of_balancer)

    def clean_up(self):
        super().clean_up()
        if self.balancer_now and os.path.exists(f"/proc/{self.balancer_now}"):
            os.kill(self.balancer_now, signal.SIGKILL)
        self.network.remove()


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--balancer", required=True, help="the binary quic-lb")
parser.add_argument("--peer", required=True, help="the binary quic-peer")
parser.add_argument("--origin", required=True, help="the binary backend-sim")
parser.add_argument("--python", help="a Python interpreter that has aioquic")
parser.add_argument(
    "--blind-seconds", type=int, default=BLIND_SECONDS, help="how long blind senders send, in each case"
)
main(Namespaces, parser)

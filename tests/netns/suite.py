"""Clients behind real NATs, the balancer, servers: each in a network namespace of its own.

              .--- nat1 ---.
    client ---|            |--- balancer --- servers
              '--- nat2 ---'

Each NAT masquerades into a small range of ports at random, and forgets its bindings when told to.
The client has an uplink through each. Started by `run`, which see.
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

# How often each connection is moved while it downloads.
MOVES = 12
# Clients that prove their address: how many requests they make, how often they are moved meanwhile,
# and how many moves their server has to have seen.
VALIDATED_REQUESTS, MOVE_SECONDS, ENOUGH_MOVES = 60, 0.7, 5
# Bounds on waiting. Nothing is expected to take nearly as long.
START, MOVE, END = 60, 10, 120
KEY = "8f95f09245765f80256934e50c66207f"
HERE = os.path.dirname(os.path.abspath(__file__))

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

# The balancer's address that clients know. It is on no link of theirs.
VIP4, VIP6 = "10.99.0.1", "fd99::1"
SERVERS4, SERVERS6 = "10.20.0.2", "fd20::2"

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
    # Our own servers, which honour the balancer's tokens; it asks all their clients for one.
    "origin": dict(
        scheme=dict(config_id=4, server_id_length=2, nonce_length=6, key=KEY),
        listen=("0.0.0.0", 4437),
        backends={f"origin-{n}": (SERVERS4, 5400 + n) for n in (1, 2, 3)},
        retry="always",
    ),
}


def configuration():
    lines = ["listeners:"]
    for pool, its in POOLS.items():
        address = "%s:%d" % its["listen"]
        retry = f", retry: {{ mode: {its['retry']} }}" if "retry" in its else ""
        lines += [f'  - {{ name: to-{pool}, address: "{address}", pool: {pool}{retry} }}']
    lines += ["pools:"]
    for pool, its in POOLS.items():
        lines += [f"  - name: {pool}"]
        if its["scheme"]:
            pairs = ", ".join(f"{k}: {json.dumps(v)}" for k, v in its["scheme"].items())
            lines += ["    quic_lb:", f"      - {{ {pairs} }}"]
        lines += ["    backends:"]
        for nth, (name, address) in enumerate(its["backends"].items()):
            identity = f', server_id: "{server_id(its["scheme"], nth)}"' if its["scheme"] else ""
            lines += [f'      - {{ name: {name}, address: "%s:%d"{identity} }}' % address]
    lines += ['admin: { address: "127.0.0.1:9090" }', "limits: { flows: 4000 }"]
    lines += ['timeouts: { drain: "1s" }', "retry:", f'  keys: [{{ sequence: 0, key: "{KEY}" }}]']
    return "\n".join(lines) + "\n"


def server_id(scheme, nth):
    return f"{0xA000 + nth + 1:0{2 * scheme['server_id_length']}x}"


# Processes and namespaces


class Failure(Exception):
    """What was expected is not so."""


def expect(condition, message):
    if not condition:
        raise Failure(message)


class Process:
    """A process in a namespace that talks in lines."""

    def __init__(self, namespace, *command, log):
        self.what = os.path.basename(command[0])
        self.log = open(log, "a+")
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.lines = queue.Queue()
        # For clients: how many addresses of each connection its server has seen.
        self.seen = {}
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            if line.startswith("seen "):
                _, connection, addresses = line.split()
                self.seen[int(connection)] = int(addresses)
            self.lines.put(line.rstrip("\n"))
        self.lines.put(None)

    def next_line(self, deadline):
        try:
            return self.lines.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            return ""

    def wait_for(self, wanted):
        deadline = time.monotonic() + START
        while (line := self.next_line(deadline)) != wanted:
            expect(line, f"{self.what} does not say {wanted}: {self.logged()}")

    def end(self):
        """Ends it with SIGTERM and returns its last line, read as JSON."""
        self.process.send_signal(signal.SIGTERM)
        deadline, last = time.monotonic() + END, None
        while (line := self.next_line(deadline)) is not None:
            expect(line, f"{self.what} does not end")
            last = line
        self.process.wait(END)
        expect(self.process.returncode == 0 and last, f"{self.what} failed: {self.logged()}")
        return json.loads(last)

    def logged(self):
        self.log.seek(0)
        return self.log.read()[-2000:]

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def run(*command, stdin=None, check=True):
    done = subprocess.run(command, input=stdin, text=True, capture_output=True)
    if check and done.returncode != 0:
        raise Failure(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


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
        for role in ("client", "nat1", "nat2", "balancer", "servers"):
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


def total(scrape, name, **labels):
    """The sum of the samples of a metric that have these labels."""
    result = 0
    for line in scrape.splitlines():
        series, _, value = line.rpartition(" ")
        found, _, rest = series.partition("{")
        if found == f"quic_lb_{name}" and all(f'{k}="{v}"' in rest for k, v in labels.items()):
            result += float(value)
    return int(result)


# The suite


class Suite:
    def __init__(self, arguments, folder):
        self.arguments = arguments
        self.folder = folder
        self.network = Network()
        self.processes = []
        self.passed, self.failed, self.skipped = [], [], []

    def start(self, role, *command):
        log = os.path.join(self.folder, f"{len(self.processes)}.log")
        process = Process(self.network.name(role), *command, log=log)
        self.processes.append(process)
        return process

    def path(self, name):
        return os.path.join(self.folder, name)

    def check(self, title, function, *arguments):
        if self.arguments.only not in title:
            return
        start = time.monotonic()
        try:
            result = function(*arguments)
        except Exception as error:
            self.failed.append(title)
            reason = error if isinstance(error, Failure) else traceback.format_exc()
            print(f"FAILED: {title}: {reason}", flush=True)
        else:
            self.passed.append(title)
            note = f": {result}" if result else ""
            print(f"ok: {title} ({time.monotonic() - start:.0f} s){note}", flush=True)

    def skip(self, title, reason):
        self.skipped.append(title)
        print(f"SKIPPED: {title}: {reason}", flush=True)

    # Servers and balancer

    def start_balancer(self):
        with open(self.path("quic-lb.yaml"), "w") as file:
            file.write(configuration())
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

    def start_aioquic(self):
        servers = []
        for pool in ("aioquic", "aioquic-opaque"):
            scheme = POOLS[pool]["scheme"]
            for nth, (name, (host, port)) in enumerate(POOLS[pool]["backends"].items()):
                spec = dict(name=name, host=host, port=port)
                if scheme:
                    spec["scheme"] = dict(scheme, server_id=server_id(scheme, nth))
                servers.append(spec)
        command = ("--servers", json.dumps(servers), "--certificate", self.path("aioquic.der"))
        python = self.arguments.python
        script = os.path.join(HERE, "peer.py")
        self.aioquic = self.start("servers", python, script, "serve", *command)
        self.aioquic.wait_for("ready")

    def start_origins(self):
        certificate, key = self.path("origin.pem"), self.path("origin.key")
        run(
            "openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt",
            "ec_paramgen_curve:P-256", "-subj", "/CN=localhost", "-days", "2",
            "-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE",
            "-keyout", key, "-out", certificate,
        )  # fmt: skip
        run("openssl", "x509", "-in", certificate, "-outform", "DER", "-out", self.path("origin.der"))
        for nth, name in enumerate(POOLS["origin"]["backends"]):
            metrics = f"127.0.0.1:{9100 + nth}"
            files = ("--config", self.path("quic-lb.yaml"), "--cert", certificate, "--key", key)
            command = ("serve", *files, "--backend", name, "--metrics", metrics)
            origin = self.start("servers", self.arguments.origin, *command)
            deadline, ready = time.monotonic() + START, ("curl", "-sf", f"http://{metrics}/metrics")
            while not self.network.run("servers", *ready, check=False):
                expect(origin.process.poll() is None, origin.logged())
                expect(time.monotonic() < deadline, f"{name} does not become ready")
                time.sleep(0.1)

    def admin(self, path, *options):
        url = f"http://127.0.0.1:9090{path}"
        return self.network.run("balancer", "curl", "-sf", *options, url, check=False)

    def rules(self, listener):
        scrape, count = self.admin("/metrics"), "datagrams_forwarded_total"
        rules = ("cid", "four_tuple_scid", "dcid", "four_tuple", "fallback")
        return {rule: total(scrape, count, listener=listener, rule=rule) for rule in rules}

    # Scenarios

    def downloads(self, stack, pool, move, by_rule, connections=3):
        """Connections download while they are moved again and again."""
        listener = f"to-{pool}"
        host, port = POOLS[pool]["listen"]
        target = f"[{VIP6}]:{port}" if host == "[::]" else f"{VIP4}:{port}"
        before = self.rules(listener)
        client = self.client(stack, target, pool, connections)
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

    def validated(self, stack, move):
        """A client has to prove its address, keeps its connection while it is moved, and its server
        knows from the token where it was at first."""
        common = ("http3", "--stack", stack, "--target", f"{VIP4}:{POOLS['origin']['listen'][1]}")
        common += ("--requests", str(VALIDATED_REQUESTS), "--pause", "150", "--certificate")
        if stack == "aioquic":
            script = os.path.join(HERE, "../peers/client.py")
            command = (self.arguments.python, script, *common, self.path("origin.pem"))
        else:
            command = (self.arguments.peer, *common, self.path("origin.der"))
        sent = total(self.admin("/metrics"), "retry_sent_total")
        client, deadline = self.start("client", *command), time.monotonic() + END
        try:
            while (line := client.next_line(time.monotonic() + MOVE_SECONDS)) == "":
                expect(time.monotonic() < deadline, "the client does not end")
                move()
        finally:
            client.kill()
        expect(line, f"the client failed: {client.logged()}")
        report = json.loads(line)
        before, after = report["before"], report["after"]
        expect(before["backend"] == after["backend"], f"{before['backend']}, then {after['backend']}")
        moves = after["path_changes"] - before["path_changes"]
        expect(moves >= ENOUGH_MOVES, f"the server has seen {moves} moves")
        told = before["true_client"] or ""
        expect(told.startswith("10.1"), f"a NAT is where the token says that the client is: {told}")
        retries = total(self.admin("/metrics"), "retry_sent_total") - sent
        expect(retries > 0, "no Retry was sent")
        return f"{retries} Retries, {moves} moves, first seen at {before['client']} for {told}"

    def client(self, stack, target, pool, connections):
        common = ("fetch", "--target", target, "--connections", str(connections))
        if stack == "quinn":
            certificate = "aioquic.der" if pool.startswith("aioquic") else "quinn.der"
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

    def arrivals(self, servers):
        """Zero datagrams at a wrong backend, counted at the backends; zero connections lost."""
        reports = servers.end()
        for report in reports:
            name = report["name"]
            expect(report["misdelivered"] == 0, f"{name}: misdelivered {report['misdelivered']}")
            expect(report["unknown"] == 0, f"{name}: {report['unknown']} datagrams of nobody")
            expect(report["lost"] == [], f"{name} lost {report['lost']}")
        own = sum(report["own"] for report in reports)
        connections = sum(report["connections"] for report in reports)
        expect(own > 0 and connections > 0, "the servers have served nobody")
        resets = sum(report["resets"] for report in reports)
        note = f", {resets} stateless resets of clients" if resets else ""
        return f"{connections} connections, {own} datagrams at their own server, 0 elsewhere{note}"

    def verdicts(self):
        """At rest each datagram received has one verdict."""
        sums = None
        for _ in range(END):
            scrape, before = self.admin("/metrics"), sums
            verdicts = ("received", "forwarded", "dropped", "replied")
            sums = {verdict: total(scrape, f"datagrams_{verdict}_total") for verdict in verdicts}
            if sums == before:
                break
            time.sleep(1)
        decided = sums["forwarded"] + sums["dropped"] + sums["replied"]
        expect(sums["received"] == decided > 0, f"{sums}")
        return f"{sums}"

    def end_of_balancer(self):
        self.balancer.process.send_signal(signal.SIGTERM)
        expect(self.balancer.process.wait(END) == 0, self.balancer.logged())

    def run(self):
        rebind, change_uplink = self.network.rebind, self.network.change_uplink
        self.network.build()
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
        if self.arguments.python:
            self.start_aioquic()
            for title, *scenario in quinn + aioquic:
                self.check(f"aioquic client: {title}", self.downloads, "aioquic", *scenario)
            for title, *scenario in aioquic:
                self.check(f"quinn client: {title}", self.downloads, "quinn", *scenario)
        else:
            self.skip("aioquic as client and as server", "it could not be installed")
        self.start_origins()
        stacks = ("quinn", "s2n-quic", "aioquic") if self.arguments.python else ("quinn", "s2n-quic")
        for stack in stacks:
            for what, move in (("a NAT rebinds", rebind), ("the uplink changes", change_uplink)):
                title = f"{stack} client: the balancer asks for its address, {what}"
                self.check(title, self.validated, stack, move)
        self.check("verdicts add up to the datagrams received", self.verdicts)
        self.check("nothing arrived at a wrong quinn server", self.arrivals, self.servers)
        if self.arguments.python:
            self.check("nothing arrived at a wrong aioquic server", self.arrivals, self.aioquic)
        self.check("the balancer ends when told to", self.end_of_balancer)

    def clean_up(self):
        for process in self.processes:
            process.kill()
        self.network.remove()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--balancer", required=True, help="the binary quic-lb")
    parser.add_argument("--peer", required=True, help="the binary quic-peer")
    parser.add_argument("--origin", required=True, help="the binary backend-sim")
    parser.add_argument("--python", help="a Python interpreter that has aioquic")
    parser.add_argument("--only", default="", help="only checks whose title contains this")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(arguments, folder)
        try:
            suite.run()
        except Failure as failure:
            suite.failed.append("the suite itself")
            print(f"FAILED: {failure}", flush=True)
        finally:
            suite.clean_up()
    counts = len(suite.passed), len(suite.failed), len(suite.skipped)
    print("%d passed, %d failed, %d skipped" % counts, flush=True)
    sys.exit(bool(suite.failed))


main()

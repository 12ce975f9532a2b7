"""Faults that a fleet has to survive, for real: two balancers (`quic-lb run`) behind a router that spreads client paths over them, eight
servers (`backend-sim serve`) with addresses of their own, clients (`backend-sim load`) that verify each answer and record how each of
their connections ends. See `run`.

A row of the table is a function: it does something to the fleet while clients go on, and says what has to hold. Nothing is lost, misrouted or failed
but what the row allows; no server sees a datagram that is meant for another one; every datagram that a balancer received has
a verdict.
"""

import argparse
import json
import os
import re
import signal
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "foreign"))
from common import KEY, Suite, expect, main, run, total, write_certificate

VIP, PORT = "10.99.0.1", 4433
BACKENDS = {f"web-{n}": f"10.20.0.{n}" for n in range(1, 9)}
JOINING = {f"web-{n}": f"10.20.0.{n}" for n in range(9, 13)}
BALANCERS = ("lb1", "lb2")
# Two ways to each, so that half of all client paths can be moved.
GATEWAYS = {"lb1": ("10.2.0.2", "10.2.0.3"), "lb2": ("10.3.0.2", "10.3.0.3")}
ADMIN = "127.0.0.1:9090"
METRICS = 9100
TABLE = os.path.join(HERE, "..", "..", "docs", "scenarios.md")

# What is shown elsewhere, by tests that the gate runs too, and what is not.
ELSEWHERE = {
    "R07": ("hashing anew while a server is removed", "tests/tests/sim_faults.rs, `r07_…`"),
    "R08": ("all seven config IDs in turn", "tests/tests/rotation.rs, with real processes on loopback"),
    "R10": ("a file that is refused", "lb/tests/run.rs, `a_file_with_mistakes_is_refused_as_a_whole_and_everything_goes_on`"),
    "R15": ("migration between IPv4 and IPv6", "not run; within each family: tests/netns"),
    "R16": ("lengths of connection IDs, unknown versions, the greased bit", "lb/src/forwarder/tests, `rule_1_…`, `the_fixed_bit_decides_nothing`"),
    "R17": ("0-RTT, Retry and a hello of several datagrams", "tests/peers for hellos of two datagrams and Retry; 0-RTT of our own stack is not there yet"),
    "R18": ("a flood of Initials", "tests/netns, forged senders; `cargo bench -p quic-lb-tests --bench flood`"),
    "R19": ("a flood of short headers", "tests/netns, blind senders"),
    "R23": ("a clock jumps", "quic/src/token and lb/src/control/checks/skew.rs, by tokens of other times; the clock of a machine was not set"),
    "R25": ("random schedules of faults", "not run; one kind of fault at a time by seed: tests/tests/sim_faults.rs, sim_balancer.rs"),
    "R26": ("a day of churn", "not run"),
}


def port_of_metrics(backend):
    _, number, *succeeds = backend.split("-")
    return METRICS + int(number) + (50 if succeeds else 0)


class Fleet(Suite):
    def __init__(self, arguments, folder):
        super().__init__(arguments, folder)
        self.prefix = f"qls{os.getpid()}-"
        self.made, self.origins, self.balancers, self.loads = [], {}, {}, []
        self.misrouted_before = self.unclaimed_before = 0
        self.rows = {}
        self.weights, self.limits = {}, "limits: { flows: 20000 }"
        # Servers that have joined the others.
        self.joined = {}
        # Servers whose next process is there.
        self.succeeded = []
        # The whole version is a tenth of the load of the table.
        self.connections, self.pace = (1000, 1.0) if arguments.whole else (80, 0.1)

    # Namespaces

    def name(self, role):
        return self.prefix + role

    def inside(self, role, *command, **arguments):
        return run("ip", "netns", "exec", self.name(role), *command, **arguments)

    def link(self, one, one_name, one_address, other, other_name, other_address):
        peer = ("peer", "name", other_name, "netns", self.name(other))
        run("ip", "link", "add", one_name, "netns", self.name(one), "type", "veth", *peer)
        for role, device, address in ((one, one_name, one_address), (other, other_name, other_address)):
            self.inside(role, "ip", "addr", "add", f"{address}/24", "dev", device)
            self.inside(role, "ip", "link", "set", device, "up")

    def build(self):
        for role in ("client", "router", *BALANCERS, "servers"):
            run("ip", "netns", "add", self.name(role))
            self.made.append(role)
            self.inside(role, "ip", "link", "set", "lo", "up")
            for setting in (
                "net.ipv4.ip_forward=1",
                "net.ipv4.conf.all.rp_filter=0",
                "net.ipv4.conf.default.rp_filter=0",
                # Addresses and ports: as routers before balancers do.
                "net.ipv4.fib_multipath_hash_policy=1",
                "net.ipv4.ip_local_port_range=10000 65000",
            ):
                self.inside(role, "sysctl", "-qw", setting)
        self.link("client", "wan", "10.1.0.2", "router", "clients", "10.1.0.1")
        self.inside("client", "ip", "route", "add", "default", "via", "10.1.0.1")
        for n, balancer in enumerate(BALANCERS, 1):
            self.link("router", balancer, f"10.{n + 1}.0.1", balancer, "wan", f"10.{n + 1}.0.2")
            self.inside(balancer, "ip", "addr", "add", f"10.{n + 1}.0.3/24", "dev", "wan")
            self.inside(balancer, "ip", "route", "add", "default", "via", f"10.{n + 1}.0.1")
            self.inside(balancer, "ip", "addr", "add", f"{VIP}/32", "dev", "lo")
            self.link(balancer, "lan", f"10.2{n}.0.1", "servers", balancer, f"10.2{n}.0.2")
            self.inside(balancer, "ip", "route", "add", "10.20.0.0/24", "via", f"10.2{n}.0.2")
        for address in (BACKENDS | JOINING).values():
            self.inside("servers", "ip", "addr", "add", f"{address}/32", "dev", "lo")
        # What is dropped on the way to and from a server.
        rules = "table ip way { chain in { type filter hook input priority 0; }; chain out { type filter hook output priority 0; }; }"
        self.inside("servers", "nft", "-f", "-", stdin=rules)
        self.spread(0)

    def spread(self, turn, only=None):
        """Spreads client paths over the balancers; another turn moves half of them."""
        (a, b), (c, d) = GATEWAYS["lb1"], GATEWAYS["lb2"]
        ways = [(a, b, c, d), (a, c, b, d)][turn % 2] if only is None else GATEWAYS[only]
        hops = [word for way in ways for word in ("nexthop", "via", way)]
        self.inside("router", "ip", "route", "replace", f"{VIP}/32", *hops)

    def drop(self, backend, *what):
        """Drops what goes to and from a server, or some of it."""
        for chain, field in (("in", "daddr"), ("out", "saddr")):
            self.inside("servers", "nft", "add", "rule", "ip", "way", chain, "ip", field, BACKENDS[backend], *what, "drop")

    def drop_nothing(self):
        for chain in ("in", "out"):
            self.inside("servers", "nft", "flush", "chain", "ip", "way", chain)

    # Processes

    def start_in(self, role, *command):
        return super().start("ip", "netns", "exec", self.name(role), *command)

    def configuration(self):
        backends = []
        for n, (name, address) in enumerate((BACKENDS | self.joined).items(), 0xA001):
            more = f"weight: {self.weights.get(name, 1)}" + (", state: draining" if name in self.succeeded else "")
            backends += [f'      - {{ name: {name}, address: "{address}:4433", server_id: "{n:04x}", {more} }}']
            if name in self.succeeded:
                # Another process on the same host, with a server ID of its own.
                backends += [f'      - {{ name: {name}-next, address: "{address}:4434", server_id: "{n + 0x1000:04x}" }}']
        return "\n".join([
            f'listeners: [{{ name: edge, address: "0.0.0.0:{PORT}", pool: web }}]',
            f'admin: {{ address: "{ADMIN}" }}',
            "pools:",
            "  - name: web",
            f'    quic_lb: [{{ config_id: 0, server_id_length: 2, nonce_length: 6, key: "{KEY}" }}]',
            # One for all: each server derives its own.
            f'    stateless_reset: {{ key: "{KEY[::-1]}" }}',
            "    honours_tokens: true",
            "    backends:",
            *backends,
            self.limits,
            'timeouts: { drain: "1s" }',
            f'retry: {{ keys: [{{ sequence: 0, key: "{KEY}" }}] }}',
            "",
        ])  # fmt: skip

    def write(self):
        # Renamed into place, so that nobody reads half of it.
        with open(self.path("fresh.yaml"), "w") as file:
            file.write(self.configuration())
        os.rename(self.path("fresh.yaml"), self.path("lb.yaml"))

    def start_balancer(self, name):
        command = (self.arguments.balancer, "run", "--config", self.path("lb.yaml"))
        self.balancers[name] = [self.start_in(name, *command), None]
        self.until(lambda: "readyz" in self.admin(name, "/readyz", "-w", "readyz"), f"{name} is ready")

    def start_origin(self, name):
        metrics = f"127.0.0.1:{port_of_metrics(name)}"
        files = ("--config", self.path("lb.yaml"), "--cert", self.path("cert.pem"), "--key", self.path("key.pem"))
        command = (self.arguments.origin, "serve", *files, "--backend", name, "--metrics", metrics, "--shards", "1")
        self.origins[name] = self.start_in("servers", *command)

    def until(self, holds, what, patience=60):
        deadline = time.monotonic() + patience
        while not holds():
            expect(time.monotonic() < deadline, f"never: {what}")
            time.sleep(0.05)

    def admin(self, balancer, path, *options):
        return self.inside(balancer, "curl", "-sf", *options, f"http://{ADMIN}{path}", check=False)

    def command(self, balancer, *words):
        return self.inside(balancer, self.arguments.balancer, *words, "--admin", ADMIN)

    def count(self, name, **labels):
        """At both balancers."""
        return sum(total(self.admin(of, "/metrics"), f"quic_lb_{name}", **labels) for of in BALANCERS)

    def state(self, backend):
        """At both balancers."""
        states = [json.loads(self.admin(of, f"/api/v1/backends/web/{backend}") or "{}") for of in BALANCERS]
        return [state.get("state") for state in states]

    def origin(self, backend):
        return self.inside("servers", "curl", "-sf", f"http://127.0.0.1:{port_of_metrics(backend)}/metrics", check=False)

    def at(self, backend, name):
        return total(self.origin(backend), f"backend_sim_{name}")

    def tell(self, backend, number):
        os.killpg(self.origins[backend].process.pid, number)

    def load(self, seconds, connections=None, **options):
        """Clients that go on for so long: a request of a kilobyte every five seconds on each connection."""
        connections = connections or self.connections
        rate = options.pop("rate", max(connections // 5, 1))
        words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        load = self.start_in(
            "client", self.arguments.origin, "load", "--target", f"{VIP}:{PORT}", "--insecure", "--json",
            "--connections", str(connections), "--rate", str(rate), "--duration", f"{int(seconds * 1000)}ms",
            *(["--size", "1000B"] if "size" not in options else []), *words,
        )  # fmt: skip
        load.ends = time.monotonic() + seconds
        return load

    def established(self, load, connections=None):
        """Waits until they are there."""
        wanted = (connections or self.connections) * 0.98
        self.until(lambda: sum(self.at(of, "connections") for of in BACKENDS) >= wanted, "the connections are established")

    def report(self, load):
        deadline, lines = max(load.ends, time.monotonic()) + 60, []
        while (line := load.next_line(deadline)) is not None:
            expect(line, "the clients do not end")
            lines.append(line)
        load.process.wait(60)
        expect(lines, f"no report: {load.logged()}")
        return json.loads(lines[-1])

    def fair(self, report, lost=0, failed=(), balancers=BALANCERS):
        """Nothing is lost, misrouted or failed but what is allowed; every datagram has a verdict."""
        expect(report["requests"] > 0, report)
        expect(report["lost"] <= lost, f"{report['lost']} lost, {lost} may be: {report['lost_by_cause']}")
        expect(report["misrouted"] == 0, f"{report['misrouted']} answers of another server")
        expect(not report["requests_failed"] or lost, f"requests failed: {report['requests_failed']}")
        wrong = {why: n for why, n in report["handshakes_failed"].items() if why not in failed}
        expect(not wrong, f"handshakes failed: {wrong}")
        astray = sum(self.at(of, "misrouted_datagrams_total") for of in BACKENDS)
        expect(astray == self.misrouted_before, f"{astray - self.misrouted_before} datagrams came to another server than their own")
        for balancer in balancers:
            self.until(lambda: self.has_verdicts(balancer), f"every datagram that {balancer} received has a verdict", 20)
        return (
            f"{report['connections']} connections, {report['lost']} lost, 0 misrouted; {report['requests']} requests, longest wait "
            f"{report['latency']['max_us'] / 1e6:.2f} s, longest handshake {report['handshakes']['max_us'] / 1e6:.2f} s"
        )

    def has_verdicts(self, balancer):
        scrape = self.admin(balancer, "/metrics")
        sums = [total(scrape, f"quic_lb_datagrams_{name}_total") for name in ("received", "forwarded", "dropped", "replied")]
        return sums[0] == sum(sums[1:])

    # Rows

    def steady(self):
        """R01: nothing happens."""
        lasting = self.load(10 + 110 * self.pace)
        self.established(lasting)
        held = [self.at(of, "connections") for of in BACKENDS]
        spread = max(held) * len(held) / sum(held)
        return f"{self.fair(self.report(lasting))}; the server with most has {spread:.2f} times its share"

    def joining(self):
        """R04: four servers join eight while handshakes go on. Connections stay, and new ones come to all."""
        lasting, coming = self.load(10 + 20 * self.pace), self.load(9 + 20 * self.pace, 20, lifetime="500ms", rate=40)
        self.established(lasting)
        self.joined = dict(JOINING)
        self.write()
        for backend in self.joined:
            self.start_origin(backend)
        for backend in self.joined:
            self.until(lambda: self.origin(backend), f"{backend} listens")
        for balancer in BALANCERS:
            self.command(balancer, "reload")
        said = self.fair(self.report(coming))
        said = f"{self.fair(self.report(lasting))}; new ones: {said}"
        got = [self.at(backend, "connections_accepted_total") for backend in self.joined]
        expect(all(got), f"some got no connection: {got}")
        astray = sum(self.at(of, "misrouted_datagrams_total") for of in self.joined)
        expect(astray == 0, f"{astray} datagrams came to another server than their own")
        self.joined = {}
        self.write()
        for balancer in BALANCERS:
            self.command(balancer, "reload", "--force")
        for backend in JOINING:
            self.origins[backend].kill()
        return f"{said}; {sum(got)} of them came to the four"

    def drained(self):
        """R02: one of eight servers is drained. It gets no new connections, and those that it has go on."""
        seconds = 6 + 20 * self.pace
        lasting, coming = self.load(seconds), self.load(seconds, 20, lifetime="500ms", rate=40)
        self.established(lasting)
        for balancer in BALANCERS:
            self.command(balancer, "drain", "web/web-3")
        time.sleep(0.1)
        before, held = self.at("web-3", "connections_accepted_total"), self.at("web-3", "connections")
        said = self.fair(self.report(coming))
        expect(self.at("web-3", "connections_accepted_total") == before, "it got new connections")
        said = self.fair(self.report(lasting)) + "; with new ones: " + said
        for balancer in BALANCERS:
            self.command(balancer, "activate", "web/web-3")
        return f"{said}; {held} stayed, no new ones after 0.1 s"

    def killed(self):
        """R03, R28: one of eight servers is killed, and started anew. Its clients know at once, and nobody else notices."""
        lasting = self.load(8 + 20 * self.pace)
        self.established(lasting)
        held = self.at("web-3", "connections")
        self.misrouted_before -= self.at("web-3", "misrouted_datagrams_total")
        self.tell("web-3", signal.SIGKILL)
        time.sleep(1)
        self.start_origin("web-3")
        report = self.report(lasting)
        said = self.fair(report, lost=held)
        expect(set(report["lost_by_cause"]) <= {"stateless_reset"}, f"lost otherwise: {report['lost_by_cause']}")
        self.until(lambda: self.state("web-3") == ["active"] * 2, "it is back")
        return f"{said}; {held} were at the server, by {report['lost_by_cause']}"

    def balancer_gone(self, number):
        """One of two balancers is gone, and its client paths move to the other one."""
        lasting, coming = self.load(8 + 10 * self.pace), self.load(8 + 10 * self.pace, 20, lifetime="500ms", rate=40)
        self.established(lasting)
        os.killpg(self.balancers["lb1"][0].process.pid, number)
        # As long as BFD takes.
        time.sleep(0.6)
        self.spread(0, only="lb2")
        fair = lambda load: self.fair(self.report(load), balancers=["lb2"])
        said = f"{fair(coming)}; lasting ones: {fair(lasting)}"
        self.start_balancer("lb1")
        self.spread(0)
        return said

    def hashed_anew(self):
        """R06: half of all client paths move to the other balancer every second."""
        turns = max(int(60 * self.pace), 8)
        lasting, coming = self.load(turns + 6), self.load(turns + 4, 20, lifetime="500ms", rate=40)
        self.established(lasting)
        for turn in range(1, turns + 1):
            self.spread(turn)
            time.sleep(1)
        self.spread(0)
        said = self.fair(self.report(coming))
        return f"{turns} times; lasting ones: {self.fair(self.report(lasting))}; new ones: {said}"

    def reloaded(self):
        """R09: weights and limits change a hundred times a minute."""
        count, drops = max(int(100 * self.pace), 15), self.count("datagrams_dropped_total")
        lasting, coming = self.load(count * 0.6 + 6), self.load(count * 0.6 + 4, 20, lifetime="500ms", rate=40)
        self.established(lasting)
        longest = 0
        for n in range(count):
            self.weights = {name: 1 + (n + at) % 5 for at, name in enumerate(BACKENDS)}
            self.limits = f"limits: {{ flows: 20000, new_connections_per_second: {{ total: {10000 + n} }} }}"
            self.write()
            for balancer in BALANCERS:
                begin = time.monotonic()
                self.command(balancer, "reload")
                longest = max(longest, time.monotonic() - begin)
            time.sleep(0.5)
        self.weights, self.limits = {}, "limits: { flows: 20000 }"
        self.write()
        for balancer in BALANCERS:
            self.command(balancer, "reload")
        said = self.fair(self.report(coming)) + "; lasting ones: " + self.fair(self.report(lasting))
        dropped = self.count("datagrams_dropped_total") - drops
        expect(dropped == 0, f"{dropped} datagrams were dropped")
        return f"{count} reloads at each, none of which took longer than {longest * 1000:.0f} ms with the command; {said}"

    def upgraded(self):
        """R11: the program of a balancer is replaced again and again."""
        count = max(int(20 * self.pace), 3)
        lasting, coming = self.load(count * 1.5 + 8), self.load(count * 1.5 + 6, 20, lifetime="500ms", rate=40)
        self.established(lasting)
        stood = []
        for _ in range(count):
            told = self.command("lb2", "upgrade")
            process, millis = re.match(r"process (\d+) goes on with \d+ flows; handed over in ([\d.]+) ms", told).groups()
            self.balancers["lb2"][1] = int(process)
            stood.append(float(millis))
            time.sleep(1)
        said = self.fair(self.report(coming)) + "; lasting ones: " + self.fair(self.report(lasting))
        return f"{count} times, {max(stood)} ms at most; {said}"

    def rolled(self):
        """R12: all eight servers are restarted, one after the other, each after it has answered what it was asked."""
        lasting = self.load(60 + 60 * self.pace)
        self.established(lasting)
        for backend in BACKENDS:
            for balancer in BALANCERS:
                self.command(balancer, "drain", f"web/{backend}")
            self.misrouted_before -= self.at(backend, "misrouted_datagrams_total")
            process = self.origins[backend].process
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            self.start_origin(backend)
            self.until(lambda: self.origin(backend), f"{backend} is back")
            for balancer in BALANCERS:
                self.command(balancer, "activate", f"web/{backend}")
            time.sleep(0.5)
        os.killpg(lasting.process.pid, signal.SIGINT)
        return self.fair(self.report(lasting))

    def succeeded_by_others(self):
        """R13: the process of each server is replaced by another one, which gets what is new; what the first one has stays there."""
        seconds = 30 + 30 * self.pace
        lasting = self.load(seconds)
        self.established(lasting)
        for backend in BACKENDS:
            self.succeeded.append(backend)
            self.write()
            self.start_origin(f"{backend}-next")
            self.until(lambda: self.origin(f"{backend}-next"), f"the next {backend} listens")
            for balancer in BALANCERS:
                self.command(balancer, "reload")
        before = [self.at(backend, "connections_accepted_total") for backend in BACKENDS]
        said = self.fair(self.report(self.load(5, 20, lifetime="500ms", rate=40)))
        said = f"{self.fair(self.report(lasting))}; new ones: {said}"
        expect([self.at(backend, "connections_accepted_total") for backend in BACKENDS] == before, "the first ones got new connections")
        astray = sum(self.at(f"{of}-next", "misrouted_datagrams_total") for of in BACKENDS)
        expect(astray == 0, f"{astray} datagrams came to another server than their own")
        self.succeeded = []
        self.write()
        for balancer in BALANCERS:
            self.command(balancer, "reload", "--force")
        for backend in BACKENDS:
            self.origins[f"{backend}-next"].kill()
        return said

    def moved(self):
        """R14: the port of every client changes, and then its connection ID with it."""
        seconds = 10 + 10 * self.pace
        rebinding = self.load(seconds, rebind_every="3s", rate=self.connections // 2)
        report = self.report(rebinding)
        said = self.fair(report)
        migrating = self.load(seconds, migrate_every="3s", rate=self.connections // 2)
        moves = self.report(migrating)
        expect(report["rebinds"] >= self.connections and moves["migrations"] >= self.connections, (report, moves))
        return f"{report['rebinds']} rebindings: {said}; {moves['migrations']} migrations: {self.fair(moves)}"

    def flapping(self):
        """R20: a server stops for two seconds again and again. Who is there stays, and the balancers calm down."""
        turns = max(int(10 * self.pace), 3)
        lasting, coming = self.load(turns * 4 + 6), self.load(turns * 4 + 4, 20, lifetime="500ms", rate=40)
        self.established(lasting)
        logged = lambda: sum(self.whole_log(of).count("changed its state") + self.whole_log(of).count("gets no new connections") for of in BALANCERS)
        before = logged()
        for _ in range(turns):
            self.tell("web-3", signal.SIGSTOP)
            time.sleep(2)
            self.tell("web-3", signal.SIGCONT)
            time.sleep(2)
        # New ones may come to it while it is stopped, and wait.
        said = self.fair(self.report(coming), failed=("handshake_timeout",)) + "; lasting ones: " + self.fair(self.report(lasting))
        changes = logged() - before
        expect(changes <= 2 * turns * 3, f"its state changed {changes} times")
        self.until(lambda: self.state("web-3") == ["active"] * 2, "it is back", 120)
        return f"stopped {turns} times, its state changed {changes} times at both; {said}"

    def whole_log(self, balancer):
        log = self.balancers[balancer][0].log
        log.seek(0)
        return log.read()

    def lossy(self):
        """R21: a twentieth of what goes to and from a server is lost; then it stands still for five seconds."""
        lasting = self.load(18 + 10 * self.pace)
        self.established(lasting)
        self.drop("web-3", "numgen", "random", "mod", "100", "<", "5")
        time.sleep(6)
        self.drop_nothing()
        lost_some = self.state("web-3")
        self.tell("web-3", signal.SIGSTOP)
        time.sleep(5)
        self.tell("web-3", signal.SIGCONT)
        said = self.fair(self.report(lasting))
        expect(lost_some == ["active"] * 2, f"it was {lost_some} for a twentieth")
        return said

    def parted(self):
        """R22: ten seconds without a way to one server. Its connections go on afterwards, and nobody is sent a reset."""
        lasting = self.load(20 + 10 * self.pace)
        self.established(lasting)
        self.drop("web-3")
        time.sleep(10)
        self.drop_nothing()
        said = self.fair(self.report(lasting))
        resets = sum(self.at(of, "stateless_resets_total") for of in BACKENDS)
        expect(resets == self.resets, f"{resets - self.resets} resets were sent")
        return said

    def full(self):
        """R24: more client paths than there is room for. Who is there stays; new ones are refused or take turns."""
        lasting = self.load(14 + 10 * self.pace, self.connections, rate=self.connections)
        self.established(lasting)
        limit = self.connections + self.connections // 4
        self.limits = f"limits: {{ flows: {limit} }}"
        self.write()
        for balancer in BALANCERS:
            told = self.command(balancer, "upgrade")
            self.balancers[balancer][1] = int(re.match(r"process (\d+)", told).group(1))
        coming = self.load(6, 4 * self.connections, lifetime="300ms", rate=4 * self.connections)
        rush, report = self.report(coming), self.report(lasting)
        said = self.fair(report)
        self.limits = "limits: { flows: 20000 }"
        self.write()
        for balancer in BALANCERS:
            told = self.command(balancer, "upgrade")
            self.balancers[balancer][1] = int(re.match(r"process (\d+)", told).group(1))
        return f"room for {limit} at each; {said}; meanwhile {rush['connections']} of others, {sum(rush['handshakes_failed'].values())} failed"

    ROWS = (
        ("R01", "steady state", steady, ()),
        ("R02", "one of eight servers is drained", drained, ()),
        ("R03, R28", "one of eight servers is killed and comes back", killed, ()),
        ("R04", "four servers join eight", joining, ()),
        ("R05", "one of two balancers is killed", balancer_gone, (signal.SIGKILL,)),
        ("R27", "one of two balancers aborts", balancer_gone, (signal.SIGABRT,)),
        ("R06", "client paths are hashed anew every second", hashed_anew, ()),
        ("R09", "a hundred reloads a minute", reloaded, ()),
        ("R11", "a balancer is upgraded again and again", upgraded, ()),
        ("R12", "all servers are restarted in turn", rolled, ()),
        ("R13", "each server's process is succeeded by another one", succeeded_by_others, ()),
        ("R14", "all clients move", moved, ()),
        ("R20", "a server flaps", flapping, ()),
        ("R21", "a server loses datagrams, and stands still", lossy, ()),
        ("R22", "no way to one server for ten seconds", parted, ()),
        ("R24", "a full table", full, ()),
    )

    def run(self):
        self.build()
        write_certificate(self.folder)
        self.write()
        for backend in BACKENDS:
            self.start_origin(backend)
        for backend in BACKENDS:
            self.until(lambda: self.origin(backend), f"{backend} listens")
        for balancer in BALANCERS:
            self.start_balancer(balancer)
        for row, title, function, arguments in self.ROWS:
            self.check(f"{row}: {title}", self.row, row, title, function, *arguments)

    def row(self, row, title, function, *arguments):
        self.misrouted_before = sum(self.at(of, "misrouted_datagrams_total") for of in BACKENDS)
        self.resets = sum(self.at(of, "stateless_resets_total") for of in BACKENDS)
        self.rows[row] = (title, "failed")
        try:
            said = function(self, *arguments)
        finally:
            self.drop_nothing()
            for load in self.processes:
                if "load" in load.what:
                    load.kill()
        self.rows[row] = (title, said)
        return said

    def clean_up(self):
        for _, successor in self.balancers.values():
            if successor:
                try:
                    os.kill(successor, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        super().clean_up()
        for role in self.made:
            run("ip", "netns", "del", self.name(role), check=False)

    def conclude(self):
        if not self.arguments.write:
            return
        # What was not run this time stays.
        rows = dict(re.findall(r"^(\| R\d\d[^|]*\|)(.*)$", open(TABLE).read(), re.M)) if os.path.exists(TABLE) else {}
        for row, (title, said) in self.rows.items():
            rows[f"| {row} |"] = f" {title} | {said} |"
        for row, (title, where) in ELSEWHERE.items():
            rows[f"| {row} |"] = f" {title} | {where if where.startswith('not ') else f'elsewhere: {where}'} |"
        with open(TABLE, "w") as file:
            file.write(
                "# Faults that a fleet survives\n\n"
                "Made by `tests/scenarios/run --whole --write`: two balancers behind a router that spreads client paths, eight servers, "
                f"{self.connections:,} connections with a request each every five seconds, all of them processes in network namespaces of one "
                "machine with two cores. The gate runs a short version with fewer connections. In each row every datagram that a balancer received has a verdict, "
                "and no server saw a datagram that was meant for another one.\n\n| | fault | what was counted |\n| --- | --- | --- |\n"
            )
            for row, rest in sorted(rows.items()):
                file.write(f"{row}{rest}\n")


parser = argparse.ArgumentParser()
parser.add_argument("--balancer", required=True)
parser.add_argument("--origin", required=True)
parser.add_argument("--whole", action="store_true", help="a tenth of the load that the table is about, and its times")
parser.add_argument("--write", action="store_true", help="writes docs/scenarios.md")
main(Fleet, parser)

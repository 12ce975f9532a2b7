"""Peers that others wrote, through the balancer: clients to our origins, and an aioquic client to
aioquic servers. Everything runs on loopback; between client and balancer stands a NAT that moves.

    client ──► NAT (quic-nat) ──► balancer (quic-lb) ──► origins (backend-sim) or aioquic

Each case of each peer is checked, and the table of results belongs into SPECIFICATION.md, between two
marks: `--write` puts it there, otherwise the two are compared. Cases of a peer that is not installed
are skipped, and are not compared. Started by `run`, which see.
"""

import argparse
import base64
import contextlib
import hashlib
import html
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
SPECIFICATION = os.path.join(HERE, "../../SPECIFICATION.md")
BEGIN, END = "<!-- peers: made by tests/peers/run -->", "<!-- peers: end -->"
# Config IDs of the pools.
POOLS = {"web": 0, "aioquic": 3}
KEY = "8f95f09245765f80256934e50c66207f"
# Bounds on waiting. Nothing is expected to take nearly as long.
START, CASE = 60, 120
# The clients' requests, and how often the NAT moves meanwhile.
REQUESTS, PAUSE_MS, MOVE_SECONDS = 20, 150, 0.4
# Moves that a server has to have seen in such a case.
ENOUGH_MOVES = 4
WHITE, GREEN = (255, 255, 255), (0, 128, 0)

COLUMNS = {
    "http3": "HTTP/3",
    "rebind": "NAT rebinds",
    "migrate": "migrates",
    "retry": "Retry by the balancer",
    "v2": "version 2",
    "early": "0-RTT",
}


class Failure(Exception):
    """What was expected is not so."""


class Missing(Exception):
    """A peer that cannot be had here."""


def expect(condition, message):
    if not condition:
        raise Failure(message)


# Processes


def free_port():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        return udp.getsockname()[1]


def run(*command):
    done = subprocess.run(command, text=True, capture_output=True, timeout=CASE)
    expect(done.returncode == 0, f"{' '.join(command)}: {done.stdout[-500:]}{done.stderr[-2000:]}")
    return done.stdout


def total(scrape, name):
    """The sum of the samples of a metric."""
    lines = (line for line in scrape.splitlines() if line.startswith(name))
    return sum(float(line.rpartition(" ")[2]) for line in lines)


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


# The suite


class Suite:
    def __init__(self, arguments, folder):
        self.arguments, self.folder = arguments, folder
        self.processes, self.results = [], {}
        self.skipped, self.failed = [], []

    def path(self, name):
        return os.path.join(self.folder, name)

    def start(self, *command, **named):
        log = open(self.path(f"{len(self.processes)}.log"), "w")
        process = subprocess.Popen(command, stderr=log, text=True, **named)
        self.processes.append(process)
        return process

    # Certificate, servers, balancer

    def write_certificate(self):
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        import datetime

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
        now, day = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=1)
        names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.DNSName("lb.test")])
        made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        made = made.not_valid_before(now - day).not_valid_after(now + day)
        made = made.add_extension(names, False).sign(key, hashes.SHA256())
        encoding, private = serialization.Encoding, serialization.PrivateFormat.PKCS8
        public = key.public_key().public_bytes(
            encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self.spki = base64.b64encode(hashlib.sha256(public).digest()).decode()
        for file, octets in {
            "cert.pem": made.public_bytes(encoding.PEM),
            "cert.der": made.public_bytes(encoding.DER),
            "key.pem": key.private_bytes(encoding.PEM, private, serialization.NoEncryption()),
        }.items():
            with open(self.path(file), "wb") as out:
                out.write(octets)

    def write_configuration(self):
        retry = f'  keys: [{{ sequence: 0, key: "{KEY}" }}]'
        self.ports = {}
        self.servers = self.describe_servers()
        self.write_one("lb.yaml", "", ["retry:", "  mode: \"off\"", retry])
        # The same site behind another balancer, which asks every client for its address.
        self.write_one("retry.yaml", "retry-", ["retry:", "  mode: always", retry])

    def describe_servers(self):
        servers = []
        for pool, config_id in POOLS.items():
            scheme = dict(config_id=config_id, server_id_length=2, nonce_length=6, key=KEY)
            for nth in (1, 2, 3):
                spec = dict(name=f"{pool}-{nth}", host="127.0.0.1", port=free_port())
                spec["scheme"] = dict(scheme, server_id=f"{0xA000 + nth:04x}")
                servers.append((pool, spec))
        return servers

    def write_one(self, file, prefix, more):
        lines = ["listeners:"]
        for pool in POOLS:
            port = self.ports[prefix + pool] = free_port()
            lines += [f'  - {{ name: to-{pool}, address: "127.0.0.1:{port}", pool: {pool} }}']
        lines += ["pools:"]
        for pool, config_id in POOLS.items():
            scheme = dict(config_id=config_id, server_id_length=2, nonce_length=6, key=KEY)
            pairs = ", ".join(f"{k}: {json.dumps(v)}" for k, v in scheme.items())
            lines += [f"  - name: {pool}", "    quic_lb:", f"      - {{ {pairs} }}", "    backends:"]
            for of, spec in self.servers:
                if of == pool:
                    name, port, server_id = spec["name"], spec["port"], spec["scheme"]["server_id"]
                    pairs = f'name: {name}, address: "127.0.0.1:{port}", server_id: "{server_id}"'
                    lines += [f"      - {{ {pairs} }}"]
        port = self.ports[prefix + "admin"] = free_port()
        lines += [f'admin: {{ address: "127.0.0.1:{port}" }}', *more]
        with open(self.path(file), "w") as out:
            out.write("\n".join(lines) + "\n")

    def start_site(self):
        self.write_certificate()
        self.write_configuration()
        os.mkdir(self.path("root"))
        shutil.copy(os.path.join(HERE, "page.html"), self.path("root"))
        self.metrics = []
        for pool, spec in self.servers:
            if pool != "web":
                continue
            self.metrics.append(free_port())
            self.start(
                self.binary("backend-sim"), "serve",
                "--config", self.path("lb.yaml"), "--backend", spec["name"],
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
        try:
            run(sys.executable, "-c", f"import {module}")
        except Failure:
            raise Missing(f"{module} could not be installed") from None
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
        binary = shutil.which("chromium")
        if binary is None:
            raise Missing("Chromium could not be installed")
        port = target.rsplit(":", 1)[1]
        picture = self.path(f"{case}.png")
        page = run(
            binary, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={self.path('chromium-' + case)}",
            "--host-resolver-rules=MAP lb.test 127.0.0.1",
            f"--origin-to-force-quic-on=lb.test:{port}",
            f"--ignore-certificate-errors-spki-list={self.spki}",
            "--window-size=640,480", f"--screenshot={picture}", "--dump-dom",
            f"https://lb.test:{port}/page.html",
        )  # fmt: skip
        found = re.search(r'<pre id="result"[^>]*>(.*?)</pre>', page, re.S)
        expect(found and found[1], f"the page has no result: {page[-1000:]}")
        result = json.loads(html.unescape(found[1]))
        expect(result.get("error") is None, result.get("error"))
        expect(result["protocols"] == ["h3"], f"over {result['protocols']}")
        self.keep(picture)
        self.check_picture(picture)
        return result

    def keep(self, picture):
        os.makedirs(self.arguments.pictures, exist_ok=True)
        shutil.copy(picture, self.arguments.pictures)

    def check_picture(self, picture):
        try:
            from PIL import Image
        except ImportError:
            raise Missing("pillow could not be installed") from None
        image = Image.open(picture).convert("RGB")
        width, height = image.size
        columns = (2, width // 2, width - 3)
        # The origin's own page is white and above; below, it is green if all went well.
        for row, wanted in ((2, WHITE), (height - 30, GREEN), (height - 3, GREEN)):
            seen = {image.getpixel((column, row)) for column in columns}
            expect(seen == {wanted}, f"row {row} of the page looks like {seen}")

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
        specs = [spec for pool, spec in self.servers if pool == "aioquic"]
        script = os.path.join(HERE, "../netns/peer.py")
        der = self.path(f"{case}.der")
        command = (script, "serve", "--servers", json.dumps(specs), "--certificate", der, "--record")
        server = self.start(sys.executable, *command, stdout=subprocess.PIPE)
        expect(server.stdout.readline().strip() == "ready", "aioquic's servers do not start")
        with self.nat("aioquic", moves=False) as nat:
            client = json.loads(run(
                sys.executable, os.path.join(HERE, "client.py"), "echo", *options[case],
                "--target", f"127.0.0.1:{nat.port}", "--certificate", der + ".pem",
            ))  # fmt: skip
        server.send_signal(signal.SIGTERM)
        output, _ = server.communicate(timeout=START)
        reports = json.loads(output.splitlines()[-1])
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
                if self.arguments.only not in title:
                    continue
                self.results[peer, server, case] = self.one(title, check, client, case)
        scrapes = [self.wait_for(port) for port in self.metrics]
        astray = sum(total(scrape, "backend_sim_misrouted_datagrams_total") for scrape in scrapes)
        if astray:
            self.failed.append("misrouted")
            print(f"FAILED: {astray:.0f} datagrams at a wrong origin")

    def one(self, title, check, client, case):
        start = time.monotonic()
        try:
            check(client, case)
        except Missing as missing:
            self.skipped.append(title)
            print(f"SKIPPED: {title}: {missing}", flush=True)
            return "skipped"
        except (Failure, subprocess.TimeoutExpired, ValueError, KeyError) as error:
            self.failed.append(title)
            print(f"FAILED: {title}: {error}", flush=True)
            return "✗"
        print(f"ok: {title} ({time.monotonic() - start:.0f} s)", flush=True)
        return "✓"

    def clean_up(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    # The table

    def table(self):
        lines = ["| client | servers | " + " | ".join(COLUMNS.values()) + " |"]
        lines += ["| --- | --- |" + " --- |" * len(COLUMNS)]
        for peer, server, *_, cases in self.rows():
            cells = [self.results.get((peer, server, case), "") for case in COLUMNS]
            lines += [f"| {peer} | {server} | " + " | ".join(cells) + " |"]
        return lines

    def settle_table(self):
        """Writes the table, or compares: what was skipped here may be anything there."""
        with open(SPECIFICATION) as file:
            text = file.read()
        before, rest = text.split(BEGIN + "\n")
        old, after = rest.split(END)
        new = self.table()
        if self.arguments.write:
            with open(SPECIFICATION, "w") as file:
                file.write(before + BEGIN + "\n" + "\n".join(new) + "\n" + END + after)
            return
        cells = lambda lines: [[cell.strip() for cell in line.split("|")] for line in lines]
        rows = list(zip(cells(old.strip().splitlines()), cells(new), strict=False))
        same = len(old.strip().splitlines()) == len(new) and all(
            len(a) == len(b) and all(y in (x, "skipped") for x, y in zip(a, b)) for a, b in rows
        )
        if not same:
            self.failed.append("table")
            print("FAILED: SPECIFICATION.md has another table; tests/peers/run --write", flush=True)
            print("\n".join(new), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binaries", required=True, help="the folder of the programs under test")
    parser.add_argument("--pictures", required=True, help="where screenshots go")
    parser.add_argument("--only", default="", help="only cases whose title contains this")
    parser.add_argument("--write", action="store_true", help="write the table")
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
    if not arguments.only:
        suite.settle_table()
    passed = sum(result == "✓" for result in suite.results.values())
    print(f"{passed} passed, {len(suite.failed)} failed, {len(suite.skipped)} skipped", flush=True)
    sys.exit(bool(suite.failed))


main()

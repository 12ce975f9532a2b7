"""What the suites have in common that start processes, `tests/peers` and `tests/netns`: checks and how
they end, processes, the balancer's configuration, the origins' certificate."""

import base64
import hashlib
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

# Bounds on waiting. Nothing is expected to take nearly as long.
START, END = 60, 120
# Of connection IDs and of tokens, everywhere.
KEY = "8f95f09245765f80256934e50c66207f"
TOKEN_SEQUENCE = 0
# The exit status that says so.
NOTHING_RUN = 77


class Failure(Exception):
    """What was expected is not so."""


class Missing(Exception):
    """Something that cannot be had here."""


def expect(condition, message):
    if not condition:
        raise Failure(message)


def run(*command, stdin=None, check=True):
    """Runs a command to its end and returns its output. An error is worth more than where it was made."""
    environment = os.environ | {"RUST_LIB_BACKTRACE": "0"}
    options = dict(text=True, capture_output=True, timeout=END, env=environment)
    done = subprocess.run(command, input=stdin, **options)
    if check and done.returncode != 0:
        raise Failure(f"{' '.join(command)}: {done.stdout[-500:]}{done.stderr[-2000:]}")
    return done.stdout


def total(scrape, name, **labels):
    """The sum of the samples of a metric that have these labels."""
    result = 0
    for line in scrape.splitlines():
        series, _, value = line.rpartition(" ")
        found, _, rest = series.partition("{")
        if found == name and all(f'{k}="{v}"' in rest for k, v in labels.items()):
            result += float(value)
    return int(result)


# The balancer's configuration. pools: name → quic_lb configuration or none, address of the listener, its
# mode of address validation if it has one of its own, backends, checks if there are any.


def configuration(pools, admin, *more):
    lines = ["listeners:"]
    for name, pool in pools.items():
        address = "%s:%d" % pool["listen"]
        retry = f", retry: {{ mode: {json.dumps(pool['retry'])} }}" if "retry" in pool else ""
        lines += [f'  - {{ name: to-{name}, address: "{address}", pool: {name}{retry} }}']
    lines += ["pools:"]
    for name, pool in pools.items():
        lines += [f"  - name: {name}"]
        if pool["scheme"]:
            pairs = ", ".join(f"{k}: {json.dumps(v)}" for k, v in pool["scheme"].items())
            lines += ["    quic_lb:", f"      - {{ {pairs} }}"]
        lines += ["    backends:"]
        for nth, (backend, address) in enumerate(pool["backends"].items()):
            identity = f', server_id: "{server_id(pool["scheme"], nth)}"' if pool["scheme"] else ""
            lines += [f'      - {{ name: {backend}, address: "%s:%d"{identity} }}' % address]
        lines += [f"    honours_tokens: {pool.get('honours_tokens', 'true')}"]
        if "health_check" in pool:
            lines += [f"    health_check: {pool['health_check']}"]
    lines += [f'admin: {{ address: "{admin}" }}', *more]
    return "\n".join(lines) + "\n"


def validation(*more):
    """The section about it, with the key."""
    return ["retry:", f'  keys: [{{ sequence: {TOKEN_SEQUENCE}, key: "{KEY}" }}]', *more]


def server_id(scheme, nth):
    return f"{0xA000 + nth + 1:0{2 * scheme['server_id_length']}x}"


def python_servers(pool):
    """The backends of a pool as `netns/peer.py` wants to be told."""
    scheme = pool["scheme"]
    for nth, (name, (host, port)) in enumerate(pool["backends"].items()):
        identity = dict(scheme=dict(scheme, server_id=server_id(scheme, nth))) if scheme else {}
        yield dict(name=name, host=host, port=port, **identity)


def write_certificate(folder):
    """Makes the origins' `cert.pem`, `cert.der` and `key.pem`. Returns what Chromium calls it: the
    digest of its public key."""
    file = lambda name: os.path.join(folder, name)
    run(
        "openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
        "-subj", "/CN=localhost", "-days", "2", "-addext", "subjectAltName=DNS:localhost,DNS:lb.test",
        "-addext", "basicConstraints=critical,CA:FALSE",
        "-keyout", file("key.pem"), "-out", file("cert.pem"),
    )  # fmt: skip
    run("openssl", "x509", "-in", file("cert.pem"), "-outform", "DER", "-out", file("cert.der"))
    public = run("openssl", "x509", "-in", file("cert.pem"), "-noout", "-pubkey")
    body = base64.b64decode("".join(public.splitlines()[1:-1]))
    return base64.b64encode(hashlib.sha256(body).digest()).decode()


class Process:
    """A process that talks in lines."""

    def __init__(self, *command, log):
        self.what = " ".join(os.path.basename(word) for word in command[:6])
        self.log = open(log, "a+")
        # With its own children it is a group of processes, and ends as one.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,
            # An error says more than where it came from.
            env=dict(os.environ, RUST_LIB_BACKTRACE="0"),
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
        """The next line; nothing in it if none comes in time, `None` at the end."""
        try:
            return self.lines.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            return ""

    def wait_for(self, wanted):
        deadline = time.monotonic() + START
        while (line := self.next_line(deadline)) != wanted:
            expect(line, f"{self.what} does not say {wanted}: {self.logged()}")

    def end(self):
        """Ends it with SIGTERM; as `report` otherwise."""
        self.process.send_signal(signal.SIGTERM)
        return self.report()

    def report(self):
        """Waits until it has ended and returns its last line, read as JSON."""
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
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Suite:
    """Checks, each with a title, and how they ended; processes that end with the suite."""

    def __init__(self, arguments, folder):
        self.arguments, self.folder = arguments, folder
        self.processes = []
        self.passed, self.failed, self.skipped = [], [], []

    def run(self):
        """All checks."""
        raise NotImplementedError

    def conclude(self):
        """What remains to be said when all is over."""

    def path(self, name):
        return os.path.join(self.folder, name)

    def start(self, *command):
        process = Process(*command, log=self.path(f"{len(self.processes)}.log"))
        self.processes.append(process)
        return process

    def check(self, title, function, *arguments):
        """Returns whether it passed; `None` if it was skipped, or `--only` asks for others."""
        if self.arguments.only not in title:
            return None
        start = time.monotonic()
        try:
            result = function(*arguments)
        except Missing as missing:
            return self.skip(title, missing)
        except Exception as error:
            self.failed.append(title)
            reason = error if isinstance(error, Failure) else traceback.format_exc()
            print(f"FAILED: {title}: {reason}", flush=True)
            return False
        self.passed.append(title)
        note = f": {result}" if result else ""
        print(f"ok: {title} ({time.monotonic() - start:.0f} s){note}", flush=True)
        return True

    def skip(self, title, reason):
        self.skipped.append(title)
        print(f"SKIPPED: {title}: {reason}", flush=True)

    def clean_up(self):
        for process in self.processes:
            process.kill()


def main(suite_class, parser):
    """Runs the suite; the last line says how many checks passed, failed and were skipped. The exit status is 1 when
    one failed, and NOTHING_RUN when all that were asked for were skipped."""
    parser.add_argument("--only", default="", help="only checks whose title contains this")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as folder:
        suite = suite_class(arguments, folder)
        try:
            suite.run()
        except Failure as failure:
            suite.failed.append("the suite itself")
            print(f"FAILED: {failure}", flush=True)
        finally:
            suite.clean_up()
    suite.conclude()
    counts = len(suite.passed), len(suite.failed), len(suite.skipped)
    print("%d passed, %d failed, %d skipped" % counts, flush=True)
    sys.exit(1 if suite.failed else NOTHING_RUN if suite.skipped and not suite.passed else 0)

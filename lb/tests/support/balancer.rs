//! A running balancer, and who is around it.

#![allow(clippy::disallowed_methods, reason = "tests are their own shell")]

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{Ended, Folder, KEY, command, quic_lb};

/// Far more than anything here takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A loopback address that no other test uses, so that ports can be fixed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host(Ipv4Addr);

impl Host {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let [.., high, low] = std::process::id().to_be_bytes();
        Self(Ipv4Addr::new(127, high, low, NEXT.fetch_add(1, Ordering::Relaxed)))
    }

    pub(crate) fn at(self, port: u16) -> SocketAddr {
        (self.0, port).into()
    }

    /// Listener `edge` on 4433, pool `web` with backends `a` on 5001 and `b` on 5002, admin on 9090.
    pub(crate) fn config(self) -> String {
        let at = |port| self.at(port);
        format!(
            "listeners:
  - {{ name: edge, address: \"{}\", pool: web }}
pools:
  - name: web
    quic_lb:
      - {{ config_id: 0, server_id_length: 2, nonce_length: 6, key: \"{KEY}\" }}
    backends:
      - {{ name: a, address: \"{}\", server_id: \"0001\" }}
      - {{ name: b, address: \"{}\", server_id: \"0002\", weight: 2 }}
admin: {{ address: \"{}\" }}
workers: 2
limits: {{ flows: 1000, remembered: 1000 }}
timeouts: {{ drain: \"120s\" }}
log: {{ format: json, level: debug }}
",
            at(4433),
            at(5001),
            at(5002),
            at(9090)
        )
    }
}

/// The process.
pub(crate) struct Balancer {
    pub(crate) host: Host,
    pub(crate) folder: Folder,
    child: Child,
    /// The process that has taken over, if one has.
    successor: Option<u32>,
    log: Arc<Mutex<Vec<Value>>>,
}

impl Balancer {
    pub(crate) fn start(host: Host) -> Self {
        Self::start_with(host, &host.config())
    }

    pub(crate) fn start_with(host: Host, config: &str) -> Self {
        let folder = Folder::with(config);
        let path = folder.config();
        Self::start_at(host, folder, path)
    }

    pub(crate) fn start_at(host: Host, folder: Folder, config: PathBuf) -> Self {
        Self::start_as(command(), host, folder, config)
    }

    pub(crate) fn start_as(
        mut command: Command,
        host: Host,
        folder: Folder,
        config: PathBuf,
    ) -> Self {
        let mut child = command
            .arg("run")
            .arg("--config")
            .arg(config)
            .env("NOTIFY_SOCKET", folder.path().join("notify"))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        let log = Arc::new(Mutex::new(vec![]));
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let records = Arc::clone(&log);
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let record = serde_json::from_str(&line).unwrap_or(Value::String(line));
                records.lock().unwrap().push(record);
            }
        });
        let mut balancer = Self { host, folder, child, successor: None, log };
        balancer.wait_for_record("running");
        balancer
    }

    /// The one that runs.
    pub(crate) fn process(&self) -> u32 {
        self.successor.unwrap_or(self.child.id())
    }

    /// Has the program on disk take over, and says what the command has printed.
    pub(crate) fn upgrade(&mut self) -> String {
        let told = self.try_to_upgrade().done();
        let process = told.split(' ').nth(1).and_then(|process| process.parse().ok());
        self.follow(process.unwrap_or_else(|| panic!("{told}")));
        told
    }

    pub(crate) fn try_to_upgrade(&self) -> Ended {
        quic_lb(&["upgrade", "--admin", &self.host.at(9090).to_string()])
    }

    /// Another process has taken over.
    pub(crate) fn follow(&mut self, successor: u32) {
        assert_ne!(successor, self.process());
        self.successor = Some(successor);
    }

    /// What the kernel says of each of its threads, by the names in /proc/PID/status.
    pub(crate) fn threads(&self) -> Vec<BTreeMap<String, String>> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.process())).unwrap();
        let read = |task: std::io::Result<std::fs::DirEntry>| {
            let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let pairs = status.lines().filter_map(|line| line.split_once(':'));
            pairs.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
        };
        tasks.map(read).collect()
    }

    /// Waits for a log record with this message.
    pub(crate) fn wait_for_record(&mut self, message: &str) -> Value {
        let mut found = None;
        self.wait(&format!("log record {message:?}"), |balancer| {
            found = balancer.records(message).into_iter().next();
            found.is_some()
        });
        found.unwrap()
    }

    pub(crate) fn records(&self, message: &str) -> Vec<Value> {
        let log = self.log.lock().unwrap();
        log.iter().filter(|record| record["message"] == message).cloned().collect()
    }

    /// Everything logged so far.
    pub(crate) fn log(&self) -> String {
        let log = self.log.lock().unwrap();
        log.iter().map(|record| format!("{record}\n")).collect()
    }

    /// Waits until `done`, while the process lives.
    pub(crate) fn wait(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            let ended = match self.successor {
                None => self.child.try_wait().unwrap(),
                Some(_) => None,
            };
            assert_eq!(ended, None, "ended while waiting for {what}\n{}", self.log());
            assert!(Instant::now() < deadline, "no {what}\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, name: &str) {
        let kill = format!("kill -{name} {}", self.process());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }

    /// Waits for the end of the process.
    pub(crate) fn exit_code(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "it does not end\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.http("GET", path, "")
    }

    pub(crate) fn post(&self, path: &str) -> Answer {
        self.http("POST", path, "")
    }

    pub(crate) fn http(&self, method: &str, path: &str, headers: &str) -> Answer {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n"
        );
        self.raw_http(request.as_bytes())
    }

    pub(crate) fn raw_http(&self, request: &[u8]) -> Answer {
        self.raw_http_at(9090, request)
    }

    pub(crate) fn raw_http_at(&self, port: u16, request: &[u8]) -> Answer {
        let mut stream = TcpStream::connect(self.host.at(port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // Whoever is refused early may find the connection closed.
        let _ = stream.write_all(request);
        let mut answer = vec![];
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Answer { status: status.unwrap_or(0), head: head.to_lowercase(), body: body.to_owned() }
    }

    /// A scrape: the value of each sample by its name and labels.
    pub(crate) fn metrics(&self) -> BTreeMap<String, f64> {
        let answer = self.get("/metrics");
        assert_eq!(answer.status, 200);
        let samples = answer.body.lines().filter(|line| !line.starts_with('#'));
        let split = |line: &str| -> (String, f64) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        };
        samples.map(split).collect()
    }

    /// The value of one sample.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let all = self.metrics();
        *all.get(name).unwrap_or_else(|| panic!("no {name} in {all:#?}"))
    }

    /// The admin interface's view of a backend.
    pub(crate) fn backend(&self, name: &str) -> Value {
        let all = self.get("/api/v1/backends").json();
        all.as_array().unwrap().iter().find(|backend| backend["name"] == name).unwrap().clone()
    }

    /// Rewrites the configuration as editors do.
    pub(crate) fn rewrite(&self, config: &str) {
        let new = self.folder.write("lb.yaml.new", config.as_bytes());
        std::fs::rename(new, self.folder.config()).unwrap();
    }

    /// A connection ID that names a backend.
    pub(crate) fn cid(&self, backend: &str) -> Vec<u8> {
        let hex = self.folder.run(&["cid", "encode"], &["--backend", backend]).done();
        let hex = hex.trim();
        let octet = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(octet).collect()
    }

    /// A client of this balancer.
    pub(crate) fn client(&self) -> Client {
        self.client_of(4433)
    }

    /// A client of its listener on this port.
    pub(crate) fn client_of(&self, port: u16) -> Client {
        let socket = UdpSocket::bind(self.host.at(0)).unwrap();
        socket.connect(self.host.at(port)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        Client { socket }
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        if let Some(successor) = self.successor {
            // Somebody else's child by now.
            let _ = Command::new("kill").args(["-KILL", &successor.to_string()]).status();
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a balancer that is expected to fail.
pub(crate) fn run_in_vain(config: &str) -> String {
    let folder = Folder::with(config);
    Ended::failed(folder.run(&["run"], &[]), 1)
}

/// An answer of the admin interface.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Sends datagrams to the balancer.
pub(crate) struct Client {
    socket: UdpSocket,
}

impl Client {
    /// Where its datagrams come from.
    pub(crate) fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap()
    }

    pub(crate) fn send(&self, octets: &[u8]) {
        self.socket.send(octets).unwrap();
    }

    /// Sends until an answer comes: who answered, and whom it answered.
    pub(crate) fn ask(&self, octets: &[u8]) -> String {
        let mut answer = [0; 2000];
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.send(octets);
            if let Ok(len) = self.socket.recv(&mut answer) {
                return String::from_utf8(answer[..len].to_vec()).unwrap();
            }
            assert!(Instant::now() < deadline, "no answer");
        }
    }
}

/// Answers every datagram with its name and the address that it sees. Lives until dropped.
pub(crate) struct Server {
    stop: UdpSocket,
    address: SocketAddr,
    thread: Option<thread::JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(address: SocketAddr, name: &'static str) -> Self {
        let socket = UdpSocket::bind(address).unwrap();
        let thread = thread::spawn(move || {
            let mut datagram = [0; 2000];
            while let Ok((len, from)) = socket.recv_from(&mut datagram) {
                if &datagram[..len] == b"stop" {
                    return;
                }
                // Letters look like short headers, which nothing is learnt from.
                let _ = socket.send_to(format!("{name} {from}").as_bytes(), from);
            }
        });
        let stop = UdpSocket::bind((address.ip(), 0)).unwrap();
        Self { stop, address, thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.stop.send_to(b"stop", self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A short header with this connection ID.
pub(crate) fn short(cid: &[u8]) -> Vec<u8> {
    [&[0x40], cid, &[0; 20]].concat()
}

/// The first packet of a connection, as far as balancers look.
pub(crate) fn initial(nonce: u32) -> Vec<u8> {
    let nonce = nonce.to_be_bytes();
    let ids = [&[8, 0xff, 1, 1, 1][..], &nonce, &[4], &nonce].concat();
    [&[0xc0, 0, 0, 0, 1][..], &ids, &[0, 20], &[0; 1200]].concat()
}

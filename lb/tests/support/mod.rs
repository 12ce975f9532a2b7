//! Runs the real binary.
#![allow(dead_code, reason = "each test binary uses its part of this")]

pub(crate) mod balancer;
pub(crate) mod origin;

use std::{
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use tempfile::TempDir;

/// The key of the contract's example, and of the published vectors.
pub(crate) const KEY: &str = "8f95f09245765f80256934e50c66207f";

/// The contract's example as it stands there.
pub(crate) const CONTRACT: &str = r#"
listeners:
  - name: edge
    address: "127.0.0.1:4433"
    pool: web
pools:
  - name: web
    quic_lb:                         # up to seven; ids 0..6
      - config_id: 0
        server_id_length: 2
        nonce_length: 6
        key: "8f95f09245765f80256934e50c66207f"   # omit for clear-text CIDs
    backends:
      - name: a
        address: "127.0.0.1:5001"
        server_id: "0001"            # or server_ids: { 0: "0001", 1: "a1b2c3" } when configs differ
      - name: b
        address: "127.0.0.1:5002"
        server_id: "0002"
        weight: 2
admin:
  address: "127.0.0.1:9090"
"#;

/// A folder with a configuration in it.
pub(crate) struct Folder {
    folder: TempDir,
}

impl Folder {
    pub(crate) fn with(config: &str) -> Self {
        let folder = Self { folder: TempDir::new().unwrap() };
        folder.write("lb.yaml", config.as_bytes());
        folder
    }

    pub(crate) fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.path().join(name);
        std::fs::write(&path, content).unwrap();
        // There is a key in most of them.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.path().join("lb.yaml")
    }

    /// Runs a command that takes `--config`.
    pub(crate) fn run(&self, command: &[&str], args: &[&str]) -> Ended {
        let config = self.config();
        quic_lb(&[command, &["--config", config.to_str().unwrap()], args].concat())
    }
}

/// What a command that has ended left behind.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ended {
    /// What was printed by a command that did what it should.
    #[track_caller]
    pub(crate) fn done(self) -> String {
        assert_eq!((self.code, &*self.err), (Some(0), ""), "{}", self.out);
        self.out
    }

    /// The complaint of a command that did not.
    #[track_caller]
    pub(crate) fn failed(self, code: i32) -> String {
        assert_eq!((self.code, &*self.out), (Some(code), ""), "{}", self.err);
        self.err
    }
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        let text = |octets| String::from_utf8(octets).expect("output is UTF-8");
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}

pub(crate) fn command() -> Command {
    command_at(Path::new(env!("CARGO_BIN_EXE_quic-lb")))
}

/// As [`command`], of a program elsewhere.
pub(crate) fn command_at(program: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .env_remove("RUST_LOG")
        .env_remove("NOTIFY_SOCKET")
        .env_remove("RUNTIME_DIRECTORY")
        .stdin(Stdio::null());
    command
}

pub(crate) fn quic_lb(args: &[&str]) -> Ended {
    command().args(args).output().expect("the binary runs").into()
}

/// As [`quic_lb`], with standard input.
pub(crate) fn quic_lb_reading(input: &[u8], args: &[&str]) -> Ended {
    let mut child = command()
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap().into()
}

/// Reads `octets` octets of the output and closes it.
pub(crate) fn quic_lb_cut_off(octets: usize, args: &[&str]) -> (Option<i32>, String) {
    let mut child = command()
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    let mut start = vec![0; octets];
    child.stdout.take().unwrap().read_exact(&mut start).unwrap();
    let ended = Ended::from(child.wait_with_output().unwrap());
    (ended.code, ended.err)
}

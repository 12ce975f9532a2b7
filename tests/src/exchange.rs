//! Requests and answers on any stack's streams: what quinn's and ours have in common is tokio's
//! traits.
//!
//! One request per bidirectional stream, in its first line: `GET n` gets n octets of [`pattern`],
//! `PUT` is followed by content and gets its SHA-256 digest.

use anyhow::{bail, ensure};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::pattern::{self, Digest};

/// Octets that are read at once.
const PIECE: usize = 1 << 16;
/// The longest request line.
const MAX_LINE: usize = 32;

/// Answers one request.
///
/// # Errors
///
/// When the stream is lost or the request cannot be understood.
pub async fn serve(
    mut send: impl AsyncWrite + Unpin,
    mut recv: impl AsyncRead + Unpin,
) -> anyhow::Result<()> {
    let line = request_line(&mut recv).await?;
    match line.split_once(' ') {
        Some(("GET", length)) => write_pattern(&mut send, length.parse()?).await?,
        None if line == "PUT" => {
            let (_, digest) = read_all(&mut recv, |_| {}).await?;
            send.write_all(&digest).await?;
        }
        _ => bail!("no such request: {line:?}"),
    }
    Ok(send.shutdown().await?)
}

/// Asks for `length` octets and checks them. After each part that arrived, `progress` is told how
/// many there are.
///
/// # Errors
///
/// When the stream is lost or the content is not what it should be.
pub async fn get(
    mut send: impl AsyncWrite + Unpin,
    mut recv: impl AsyncRead + Unpin,
    length: usize,
    progress: impl FnMut(usize),
) -> anyhow::Result<()> {
    send.write_all(format!("GET {length}\n").as_bytes()).await?;
    send.shutdown().await?;
    let (received, digest) = read_all(&mut recv, progress).await?;
    ensure!(received == length, "{received} octets instead of {length}");
    ensure!(digest == pattern::digest(length), "other content");
    Ok(())
}

/// Sends `length` octets and compares the digest of what arrived at the server. After each part
/// that was written, `progress` is told how many octets there were.
///
/// # Errors
///
/// When the stream is lost or other content arrived.
pub async fn put(
    mut send: impl AsyncWrite + Unpin,
    mut recv: impl AsyncRead + Unpin,
    length: usize,
    mut progress: impl FnMut(usize),
) -> anyhow::Result<()> {
    send.write_all(b"PUT\n").await?;
    let mut written = 0;
    for block in pattern::blocks(length) {
        send.write_all(&block).await?;
        written += block.len();
        progress(written);
    }
    send.shutdown().await?;
    let mut digest = Digest::default();
    recv.read_exact(&mut digest).await?;
    ensure!(digest == pattern::digest(length), "other content arrived");
    Ok(())
}

async fn request_line(recv: &mut (impl AsyncRead + Unpin)) -> anyhow::Result<String> {
    let mut line = Vec::new();
    loop {
        match recv.read_u8().await? {
            b'\n' => return Ok(String::from_utf8(line)?),
            octet => line.push(octet),
        }
        ensure!(line.len() <= MAX_LINE, "a request line without end");
    }
}

async fn write_pattern(send: &mut (impl AsyncWrite + Unpin), length: usize) -> anyhow::Result<()> {
    for block in pattern::blocks(length) {
        send.write_all(&block).await?;
    }
    Ok(())
}

async fn read_all(
    recv: &mut (impl AsyncRead + Unpin),
    mut progress: impl FnMut(usize),
) -> anyhow::Result<(usize, Digest)> {
    let (mut hasher, mut received, mut piece) = (Sha256::new(), 0, vec![0; PIECE]);
    loop {
        match recv.read(&mut piece).await? {
            0 => return Ok((received, hasher.finalize().into())),
            count => {
                hasher.update(&piece[..count]);
                received += count;
                progress(received);
            }
        }
    }
}

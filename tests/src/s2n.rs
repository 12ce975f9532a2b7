//! A client on s2n-quic that makes requests over as little HTTP/3 as that takes (RFC 9114).
//!
//! It sends no compressed header fields but those of the static table (RFC 9204, appendix A), and reads
//! of an answer whether it begins with status 200 and what its body is.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use quic::varint;
use s2n_quic::{
    client::Connect,
    connection::Connection,
    provider::{limits::Limits, tls},
    stream::SendStream,
};

use crate::certificate::SERVER_NAME;

/// How often a client says something that has nothing to say, so that a NAT does not cut it off.
const KEEP_ALIVE: Duration = Duration::from_millis(300);
/// Octets of a content that is read at most.
const MAX_BODY: usize = 64 << 20;
// RFC 9114, section 7.2.
const DATA: u64 = 0x00;
const HEADERS: u64 = 0x01;
/// The control stream with empty settings (RFC 9114, sections 6.2.1 and 7.2.4).
const CONTROL_STREAM: &[u8] = &[0x00, 0x04, 0x00];
/// `:method GET` and `:scheme https`, without a dynamic table.
const GET_HTTPS: &[u8] = &[0x00, 0x00, 0xd1, 0xd7];
/// Literal values of these names.
const AUTHORITY: u8 = 0x50;
const PATH: u8 = 0x51;
/// `:status 200`, without a dynamic table.
const OK: &[u8] = &[0x00, 0x00, 0xd9];

/// One connection.
#[derive(Debug)]
pub struct Client {
    connection: Connection,
    authority: String,
    /// Closing it would be an error of the connection.
    _control: SendStream,
}

impl Client {
    /// Connects to `target`, from any port, and trusts the certificate `der`.
    ///
    /// # Errors
    ///
    /// When the handshake fails.
    pub async fn connect(any: IpAddr, target: SocketAddr, der: &[u8]) -> anyhow::Result<Self> {
        // It offers HTTP/3 and nothing else.
        let tls = tls::rustls::Client::builder()
            .with_certificate(der)
            .and_then(tls::rustls::client::Builder::build)
            .map_err(|error| anyhow::anyhow!("TLS of s2n-quic: {error}"))?;
        let client = s2n_quic::Client::builder()
            .with_tls(tls)?
            .with_limits(Limits::new().with_max_keep_alive_period(KEEP_ALIVE)?)?
            .with_io(SocketAddr::new(any, 0))?
            .start()?;
        let mut connection =
            client.connect(Connect::new(target).with_server_name(SERVER_NAME)).await?;
        connection.keep_alive(true)?;
        let mut control = connection.open_send_stream().await?;
        control.send(Bytes::from_static(CONTROL_STREAM)).await?;
        let authority = format!("{SERVER_NAME}:{}", target.port());
        Ok(Self { connection, authority, _control: control })
    }

    /// The body of what is at `path`.
    ///
    /// # Errors
    ///
    /// When the connection is lost, or the answer is another than one with status 200.
    pub async fn get(&mut self, path: &str) -> anyhow::Result<Vec<u8>> {
        let mut stream = self.connection.open_bidirectional_stream().await?;
        stream.send(request(&self.authority, path)?.into()).await?;
        // A server that has answered already may say that it wants no more of the request, which is no
        // reason to discard the answer (RFC 9114, section 4.1).
        let _ = stream.finish();
        let mut answer = Vec::new();
        while let Some(chunk) = stream.receive().await? {
            ensure!(answer.len() + chunk.len() <= MAX_BODY, "{path}: too long an answer");
            answer.extend_from_slice(&chunk);
        }
        body(&answer).with_context(|| path.to_owned())
    }

    /// Closes the connection.
    pub async fn close(self) {
        self.connection.close(0u8.into());
    }
}

/// A request as one HEADERS frame.
fn request(authority: &str, path: &str) -> anyhow::Result<Vec<u8>> {
    let mut fields = GET_HTTPS.to_vec();
    for (name, value) in [(AUTHORITY, authority), (PATH, path)] {
        // Lengths below 127 take one octet.
        let len = u8::try_from(value.len()).ok().filter(|&len| len < 0x7f);
        fields.extend_from_slice(&[name, len.context("too long a name")?]);
        fields.extend_from_slice(value.as_bytes());
    }
    let mut frame = Vec::new();
    varint::write(HEADERS, &mut frame);
    varint::write(fields.len() as u64, &mut frame);
    frame.extend_from_slice(&fields);
    Ok(frame)
}

/// What an answer's frames carry.
fn body(mut answer: &[u8]) -> anyhow::Result<Vec<u8>> {
    let (mut body, mut has_status) = (Vec::new(), false);
    while !answer.is_empty() {
        let (kind, rest) = varint::read(answer).context("half a frame")?;
        let (len, rest) = varint::read(rest).context("half a frame")?;
        let (payload, rest) =
            rest.split_at_checked(usize::try_from(len)?).context("half a frame")?;
        match kind {
            HEADERS if !has_status => {
                ensure!(payload.starts_with(OK), "another status than 200");
                has_status = true;
            }
            DATA => {
                ensure!(has_status, "a body without a status");
                body.extend_from_slice(payload);
            }
            // Trailers, and what nobody knows.
            _ => {}
        }
        answer = rest;
    }
    ensure!(has_status, "no answer");
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_what_data_frames_carry_after_a_status_of_200() {
        let unknown = [0x21, 2, 7, 7];
        let answer = [&[1, 3, 0, 0, 0xd9][..], &[0, 2, 8, 9], &unknown, &[0, 1, 10]].concat();
        assert_eq!(body(&answer).unwrap(), [8, 9, 10]);
        assert!(body(&answer[5..]).is_err(), "without a status");
        assert!(body(&answer[..answer.len() - 1]).is_err(), "cut off");
        assert!(body(&[1, 3, 0, 0, 0xdb]).is_err(), "status 404");
    }
}

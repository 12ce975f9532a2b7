//! What the two stacks have in common, as far as the benchmark goes.

use std::{future::Future, net::SocketAddr, sync::Arc};

use anyhow::{Context as _, Result};
use quic::{driver, transport};
use quic_lb_tests::{
    certificate::{Certificate, SERVER_NAME, client_tls, provider_with},
    site::LOCAL,
};
use rustls::{CipherSuite, crypto::CryptoProvider};
use tokio::io::{AsyncRead, AsyncWrite};

/// A QUIC stack.
pub(crate) trait Stack: 'static {
    type Endpoint: Clone + Send + Sync + 'static;
    type Connection: Clone + Send + Sync + 'static;
    type Send: AsyncWrite + Unpin + Send + 'static;
    type Recv: AsyncRead + Unpin + Send + 'static;

    fn server(certificate: &Certificate) -> impl Future<Output = Result<Self::Endpoint>> + Send;
    fn client(certificate: &Certificate) -> impl Future<Output = Result<Self::Endpoint>> + Send;
    fn address(endpoint: &Self::Endpoint) -> Result<SocketAddr>;
    fn connect(
        client: &Self::Endpoint,
        target: SocketAddr,
    ) -> impl Future<Output = Result<Self::Connection>> + Send;
    fn accept(server: &Self::Endpoint) -> impl Future<Output = Option<Self::Connection>> + Send;
    fn open(
        connection: &Self::Connection,
    ) -> impl Future<Output = Result<(Self::Send, Self::Recv)>> + Send;
    fn accept_stream(
        connection: &Self::Connection,
    ) -> impl Future<Output = Result<(Self::Send, Self::Recv)>> + Send;
}

/// The suite that both use.
fn provider() -> CryptoProvider {
    provider_with(CipherSuite::TLS13_AES_128_GCM_SHA256)
}

const ANY: SocketAddr = SocketAddr::new(LOCAL, 0);

/// Our stack.
pub(crate) struct Ours;

impl Stack for Ours {
    type Endpoint = driver::Endpoint;
    type Connection = driver::Connection;
    type Send = driver::SendStream;
    type Recv = driver::RecvStream;

    async fn server(certificate: &Certificate) -> Result<driver::Endpoint> {
        let tls = Arc::new(certificate.server_tls(provider())?);
        Ok(driver::Endpoint::server(transport::ServerConfig::new(tls), ANY)?)
    }

    async fn client(certificate: &Certificate) -> Result<driver::Endpoint> {
        let tls = Arc::new(client_tls(certificate.der(), provider())?);
        let mut endpoint = driver::Endpoint::client(ANY)?;
        endpoint.set_default_client_config(transport::ClientConfig::new(tls));
        Ok(endpoint)
    }

    fn address(endpoint: &driver::Endpoint) -> Result<SocketAddr> {
        Ok(endpoint.local_addr())
    }

    async fn connect(client: &driver::Endpoint, target: SocketAddr) -> Result<driver::Connection> {
        Ok(client.connect(target, SERVER_NAME)?.await?)
    }

    async fn accept(server: &driver::Endpoint) -> Option<driver::Connection> {
        server.accept().await?.await.ok()
    }

    async fn open(
        connection: &driver::Connection,
    ) -> Result<(driver::SendStream, driver::RecvStream)> {
        Ok(connection.open_bi().await?)
    }

    async fn accept_stream(
        connection: &driver::Connection,
    ) -> Result<(driver::SendStream, driver::RecvStream)> {
        Ok(connection.accept_bi().await?)
    }
}

/// Quinn.
pub(crate) struct Quinn;

impl Stack for Quinn {
    type Endpoint = quinn::Endpoint;
    type Connection = quinn::Connection;
    type Send = quinn::SendStream;
    type Recv = quinn::RecvStream;

    async fn server(certificate: &Certificate) -> Result<quinn::Endpoint> {
        let tls = certificate.server_tls(provider())?;
        let tls = Arc::new(quinn::crypto::rustls::QuicServerConfig::try_from(tls)?);
        Ok(quinn::Endpoint::server(quinn::ServerConfig::with_crypto(tls), ANY)?)
    }

    async fn client(certificate: &Certificate) -> Result<quinn::Endpoint> {
        let tls = client_tls(certificate.der(), provider())?;
        let tls = Arc::new(quinn::crypto::rustls::QuicClientConfig::try_from(tls)?);
        let mut endpoint = quinn::Endpoint::client(ANY)?;
        endpoint.set_default_client_config(quinn::ClientConfig::new(tls));
        Ok(endpoint)
    }

    fn address(endpoint: &quinn::Endpoint) -> Result<SocketAddr> {
        endpoint.local_addr().context("no address")
    }

    async fn connect(client: &quinn::Endpoint, target: SocketAddr) -> Result<quinn::Connection> {
        Ok(client.connect(target, SERVER_NAME)?.await?)
    }

    async fn accept(server: &quinn::Endpoint) -> Option<quinn::Connection> {
        server.accept().await?.await.ok()
    }

    async fn open(
        connection: &quinn::Connection,
    ) -> Result<(quinn::SendStream, quinn::RecvStream)> {
        Ok(connection.open_bi().await?)
    }

    async fn accept_stream(
        connection: &quinn::Connection,
    ) -> Result<(quinn::SendStream, quinn::RecvStream)> {
        Ok(connection.accept_bi().await?)
    }
}

//! Connections of the daemon: TCP without delay, mutual TLS, HTTP/2 with windows that a fast network needs.
//!
//! Outgoing: channels that connect when used and accept one identity only. Incoming: handshakes with a deadline; the
//! peer's identity goes into every request's extensions. Nothing here knows what is said on a connection.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use proto::status::Code;
use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::failure::Failure;
use crate::tls::{Identity, Tls, identity_of};

/// How long a connection may take to stand, both ways.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// A connection on which nothing is heard for this long, twice, is dead.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// HTTP/2 flow control: bytes in flight on one stream.
pub const STREAM_WINDOW: u32 = 16 << 20;
/// HTTP/2 flow control: bytes in flight on one connection.
pub const CONNECTION_WINDOW: u32 = 64 << 20;
/// Largest HTTP/2 frame.
pub const HTTP_FRAME: u32 = 1 << 20;
/// Largest gRPC message: a chunk of the largest section, or a manifest.
pub const MESSAGE_MAX: usize = 260 << 20;
/// The TLS library reads 4 KiB at a time; reading so many bytes ahead for it saves most of the system calls.
const READ_AHEAD: usize = 64 << 10;
/// Handshakes at the same time.
const HANDSHAKES_MAX: usize = 256;

/// A channel to one address that speaks only with one identity. Connects when it is used, and again when it broke.
///
/// # Errors
/// [`Code::BadInput`] if the address is none.
pub fn channel(tls: &Arc<Tls>, address: &str, peer: &Identity) -> Result<Channel, Failure> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|_| Failure::new(Code::BadInput, format!("{address:?} is no address; host:port is expected")))?
        .connect_timeout(CONNECT_MAX)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE);
    let (tls, peer) = (tls.clone(), peer.clone());
    Ok(endpoint.connect_with_connector_lazy(tower::service_fn(move |uri: Uri| {
        let (tls, peer) = (tls.clone(), peer.clone());
        async move { connect(&tls, &uri, &peer).await.map(TokioIo::new) }
    })))
}

async fn connect(tls: &Tls, uri: &Uri, peer: &Identity) -> io::Result<client::TlsStream<BufReader<TcpStream>>> {
    let (host, port) = (uri.host().unwrap_or_default(), uri.port_u16().unwrap_or(443));
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let config = tls.client(peer).map_err(io::Error::other)?;
    let tcp = TcpStream::connect((host, port)).await?;
    tcp.set_nodelay(true)?;
    // The verifier looks at the SPIFFE identity; the name is only what the handshake must carry.
    let name = rustls::pki_types::ServerName::try_from("godwit").map_err(io::Error::other)?;
    TlsConnector::from(config).connect(name, BufReader::with_capacity(READ_AHEAD, tcp)).await
}

/// An accepted connection whose peer is known.
pub struct Accepted {
    stream: server::TlsStream<BufReader<TcpStream>>,
    identity: Identity,
}

impl Connected for Accepted {
    type ConnectInfo = Identity;

    fn connect_info(&self) -> Identity {
        self.identity.clone()
    }
}

impl AsyncRead for Accepted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Accepts for ever; connections that stand go to `accepted`. Ends when its receiver is gone.
pub async fn accept(listener: TcpListener, tls: Arc<Tls>, accepted: mpsc::Sender<io::Result<Accepted>>) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    while !accepted.is_closed() {
        let permit = handshakes.clone().acquire_owned().await;
        let (tcp, from) = tokio::select! {
            () = accepted.closed() => return,
            connection = listener.accept() => match connection {
                Ok(connection) => connection,
                Err(error) => {
                    // Out of descriptors, most likely: others must end before another can begin.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let (tls, accepted) = (tls.clone(), accepted.clone());
        tokio::spawn(async move {
            match tokio::time::timeout(CONNECT_MAX, shake(&tls, tcp)).await {
                Ok(Ok(connection)) => drop(accepted.send(Ok(connection)).await),
                Ok(Err(error)) => refused(from, &error),
                Err(_) => refused(from, &io::Error::from(io::ErrorKind::TimedOut)),
            }
            drop(permit);
        });
    }
}

async fn shake(tls: &Tls, tcp: TcpStream) -> io::Result<Accepted> {
    tcp.set_nodelay(true)?;
    let stream = TlsAcceptor::from(tls.server()).accept(BufReader::with_capacity(READ_AHEAD, tcp)).await?;
    let leaf = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let identity = leaf.map(identity_of).transpose().map_err(io::Error::other)?;
    let identity = identity.ok_or_else(|| io::Error::other("no certificate"))?;
    Ok(Accepted { stream, identity })
}

fn refused(from: SocketAddr, error: &io::Error) {
    metrics::counter!(crate::metrics::HANDSHAKES_REFUSED).increment(1);
    tracing::warn!(%from, %error, "connection refused");
}

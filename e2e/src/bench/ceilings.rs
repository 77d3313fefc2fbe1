//! What the parts of a transfer can do at best on this machine now: copying, hashing, and bare tonic streams.

use std::time::{Duration, Instant};

use bytes::Bytes;
use proto::v1::Chunk;
use proto::v1::lanes_client::LanesClient;
use proto::v1::lanes_server::{Lanes, LanesServer};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

use super::Measurement;

const MESSAGE_BYTES: usize = 1 << 20;
const MESSAGES: usize = 1024;
const WINDOW_BYTES: u32 = 32 << 20;

/// Megabytes a second, one value a run; a bare TLS stream also in CPU seconds a GiB, both ends.
#[derive(Debug, Default)]
pub struct Ceilings {
    runtime: Option<tokio::runtime::Runtime>,
    memcpy: Vec<f64>,
    blake3: Vec<f64>,
    tonic_plain: Vec<f64>,
    tonic_tls: Vec<f64>,
    tonic_tls_cpu: Vec<f64>,
}

impl Ceilings {
    /// Measures all once more. Another's load on the machine changes from second to second, so a ceiling belongs right
    /// before what is compared with it.
    ///
    /// # Errors
    /// A server that cannot be started, or a stream that breaks.
    pub fn measure(&mut self) -> Result<(), String> {
        self.memcpy.push(memcpy());
        self.blake3.push(blake3());
        let plain = self.runtime()?.block_on(stream(false))?;
        self.tonic_plain.push(plain);
        self.measure_tls()
    }

    /// Measures a bare stream with TLS once more.
    ///
    /// # Errors
    /// As [`Ceilings::measure`].
    pub fn measure_tls(&mut self) -> Result<(), String> {
        let before = own_cpu_seconds();
        let rate = self.runtime()?.block_on(stream(true))?;
        let gib = (MESSAGES * MESSAGE_BYTES) as f64 / f64::from(1u32 << 30);
        self.tonic_tls_cpu.push((own_cpu_seconds() - before) / gib);
        self.tonic_tls.push(rate);
        Ok(())
    }

    fn runtime(&mut self) -> Result<&tokio::runtime::Runtime, String> {
        match &mut self.runtime {
            Some(runtime) => Ok(runtime),
            none => {
                let built = tokio::runtime::Builder::new_multi_thread().enable_all().build();
                Ok(none.insert(built.map_err(|e| e.to_string())?))
            }
        }
    }

    /// The last measured bare stream with TLS: megabytes a second, and CPU seconds a GiB.
    pub fn last_tls(&self) -> (f64, f64) {
        let last = |values: &[f64]| values.last().copied().unwrap_or(f64::NAN);
        (last(&self.tonic_tls), last(&self.tonic_tls_cpu))
    }

    /// Puts all beside a measurement.
    pub fn beside(&self, measurement: Measurement) -> Measurement {
        measurement
            .beside("tonic_tls", &self.tonic_tls)
            .beside("tonic_plain", &self.tonic_plain)
            .beside("blake3", &self.blake3)
            .beside("memcpy", &self.memcpy)
    }
}

/// CPU seconds of this process so far.
pub(super) fn own_cpu_seconds() -> f64 {
    let spent = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    spent.tv_sec as f64 + spent.tv_nsec as f64 / 1e9
}

fn rate(bytes: usize, elapsed: Duration) -> f64 {
    bytes as f64 / 1e6 / elapsed.as_secs_f64()
}

fn memcpy() -> f64 {
    let (source, mut target) = (vec![1u8; 256 << 20], vec![2u8; 256 << 20]);
    let begun = Instant::now();
    for _ in 0..4 {
        target.copy_from_slice(std::hint::black_box(&source));
        std::hint::black_box(&target);
    }
    rate(4 * source.len(), begun.elapsed())
}

fn blake3() -> f64 {
    let data = vec![3u8; MESSAGE_BYTES];
    let begun = Instant::now();
    for _ in 0..MESSAGES {
        std::hint::black_box(::blake3::hash(std::hint::black_box(&data)));
    }
    rate(MESSAGES * data.len(), begun.elapsed())
}

/// Takes what comes, and answers at the end.
struct Sink;

#[tonic::async_trait]
impl Lanes for Sink {
    type LaneStream = tokio_stream::Iter<std::vec::IntoIter<Result<Chunk, Status>>>;

    async fn lane(&self, request: Request<Streaming<Chunk>>) -> Result<Response<Self::LaneStream>, Status> {
        let mut chunks = request.into_inner();
        let mut bytes = 0u64;
        while let Some(chunk) = chunks.message().await? {
            bytes += chunk.frame.len() as u64;
        }
        let answer = Chunk { frame: Bytes::copy_from_slice(&bytes.to_le_bytes()) };
        Ok(Response::new(tokio_stream::iter(vec![Ok(answer)])))
    }
}

/// One stream of messages of 1 MiB over loopback.
async fn stream(tls: bool) -> Result<f64, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.map_err(|e| text(&e))?;
    let address = listener.local_addr().map_err(|e| text(&e))?;
    let incoming = TcpListenerStream::new(listener).map(|socket| {
        let socket = socket?;
        socket.set_nodelay(true)?;
        Ok::<_, std::io::Error>(socket)
    });
    let scheme = if tls { "https" } else { "http" };
    let mut server = Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(MESSAGE_BYTES as u32);
    let mut endpoint = Channel::from_shared(format!("{scheme}://{address}"))
        .map_err(|e| text(&e))?
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .tcp_nodelay(true);
    if tls {
        let key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).map_err(|e| text(&e))?;
        let (certificate, secret) = (key.cert.pem(), key.signing_key.serialize_pem());
        let identity = Identity::from_pem(&certificate, secret);
        server = server.tls_config(ServerTlsConfig::new().identity(identity)).map_err(|e| text(&e))?;
        let trust = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(certificate)).domain_name("localhost");
        endpoint = endpoint.tls_config(trust).map_err(|e| text(&e))?;
    }
    let service = LanesServer::new(Sink).max_decoding_message_size(4 * MESSAGE_BYTES);
    let serving = tokio::spawn(server.add_service(service).serve_with_incoming(incoming));
    let mut client = LanesClient::new(endpoint.connect().await.map_err(|e| text(&e))?);
    let frame = Bytes::from(vec![5u8; MESSAGE_BYTES]);
    let chunks = tokio_stream::iter(std::iter::repeat_n(Chunk { frame }, MESSAGES));
    let begun = Instant::now();
    let mut answers = client.lane(chunks).await.map_err(|e| text(&e))?.into_inner();
    let answer = answers.message().await.map_err(|e| text(&e))?.ok_or("the sink did not answer")?;
    let elapsed = begun.elapsed();
    serving.abort();
    let expected = (MESSAGES * MESSAGE_BYTES) as u64;
    if answer.frame[..] != expected.to_le_bytes() {
        return Err("the sink got another number of bytes".into());
    }
    Ok(rate(MESSAGES * MESSAGE_BYTES, elapsed))
}

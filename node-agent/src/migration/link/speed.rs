//! How fast a transfer is over TLS on loopback, beside a bare stream of the same messages. A measurement, run by hand:
//! `CARGO_PROFILE_DEV_OPT_LEVEL=3 cargo test -p node-agent speed -- --ignored --nocapture`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use proto::v1::lanes_client::LanesClient;
use proto::v1::lanes_server::{Lanes, LanesServer};
use proto::v1::{Chunk, Section, SendRequest, Ticket};
use rcgen::{CertificateParams, KeyPair};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

use super::{Receiver, Replies, read_hello, send, tune_endpoint, tune_server};
use crate::migration::bank::{Bank, noise};
use crate::migration::{Failure, MESSAGE_BYTES_MAX, SourceVm, Spaces, TargetVm};

const PAGES: u64 = 1 << 18;
const MIB: f64 = 1048576.0;

struct Still;

impl SourceVm for Still {
    async fn advance_epoch(&mut self) -> Result<u32, Failure> {
        Ok(2)
    }
    async fn stop(&mut self) -> Result<(), Failure> {
        Ok(())
    }
    async fn capture(&mut self) -> Result<Vec<Section>, Failure> {
        Ok(vec![])
    }
    async fn resume(&mut self) -> Result<(), Failure> {
        Ok(())
    }
}

impl TargetVm for Still {
    async fn apply(&mut self, _: Vec<Section>) -> Result<(), Failure> {
        Ok(())
    }
    async fn capture(&mut self) -> Result<Vec<Section>, Failure> {
        Ok(vec![])
    }
}

/// Counts what a bare stream brings, or lands what a transfer brings.
#[derive(Clone)]
enum Sink {
    Count(Arc<AtomicU64>),
    Land(Receiver),
}

#[tonic::async_trait]
impl Lanes for Sink {
    type LaneStream = Replies;

    async fn lane(&self, request: Request<Streaming<Chunk>>) -> Result<Response<Replies>, Status> {
        let mut inbound = request.into_inner();
        match self {
            Self::Land(receiver) => {
                let hello = read_hello(&mut inbound).await.unwrap();
                Ok(Response::new(receiver.lane(hello, inbound)))
            }
            Self::Count(count) => {
                let (count, (end, replies)) = (Arc::clone(count), mpsc::unbounded_channel());
                tokio::spawn(async move {
                    while let Ok(Some(chunk)) = inbound.message().await {
                        count.fetch_add(chunk.frame.len() as u64, Ordering::Relaxed);
                    }
                    drop(end);
                });
                Ok(Response::new(Replies::new(replies)))
            }
        }
    }
}

async fn channels(sink: Sink, lanes: u32) -> Vec<Channel> {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["localhost".into()]).unwrap().self_signed(&key).unwrap().pem();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let accepted = tokio_stream::wrappers::TcpListenerStream::new(listener)
        .map(|stream| stream.inspect(|stream| stream.set_nodelay(true).unwrap()));
    let tls = ServerTlsConfig::new().identity(Identity::from_pem(&certificate, key.serialize_pem()));
    let mut server = tune_server(Server::builder()).tls_config(tls).unwrap();
    let lanes_server = LanesServer::new(sink).max_decoding_message_size(MESSAGE_BYTES_MAX);
    tokio::spawn(server.add_service(lanes_server).serve_with_incoming(accepted));
    let mut channels = Vec::new();
    for _ in 0..lanes {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&certificate));
        let endpoint = tune_endpoint(Endpoint::from_shared(address.clone()).unwrap()).tls_config(tls).unwrap();
        channels.push(endpoint.connect().await.unwrap());
    }
    channels
}

/// Processor seconds that this process has used: on a busy machine they tell more than the clock.
fn cpu_s() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat[stat.rfind(')').unwrap()..].split(' ').collect();
    (fields[12].parse::<f64>().unwrap() + fields[13].parse::<f64>().unwrap()) / 100.0
}

async fn bare(lanes: u32) -> f64 {
    let count = Arc::new(AtomicU64::new(0));
    let channels = channels(Sink::Count(Arc::clone(&count)), lanes).await;
    let frame = Bytes::from((0..256).flat_map(noise).collect::<Vec<u8>>());
    let began = Instant::now();
    let each = PAGES as usize / 256 / lanes as usize;
    let calls: Vec<_> = channels
        .into_iter()
        .map(|channel| {
            let chunks = tokio_stream::iter(std::iter::repeat_n(Chunk { frame: frame.clone() }, each));
            tokio::spawn(async move {
                let mut client = LanesClient::new(channel).max_encoding_message_size(MESSAGE_BYTES_MAX);
                let mut replies = client.lane(chunks).await.unwrap().into_inner();
                while let Ok(Some(_)) = replies.message().await {}
            })
        })
        .collect();
    for call in calls {
        call.await.unwrap();
    }
    count.load(Ordering::Relaxed) as f64 / MIB / began.elapsed().as_secs_f64()
}

async fn transfer(lanes: u32, source: &Bank, target: &Bank) -> f64 {
    target.shared().zero_pages(vmcb_engine::memory::shared::Run { first: 0, pages: PAGES }).unwrap();
    let ticket = Ticket { operation: "op".into(), secret: vec![1; 32], expires_in_ms: 60_000, ..Default::default() };
    let receiver = Receiver::new(ticket.clone(), Spaces::new(target.shared(), vec![]), Still).unwrap();
    let channels = channels(Sink::Land(receiver), lanes).await;
    let request = SendRequest { ticket: Some(ticket), ..Default::default() };
    let (events, _kept) = mpsc::channel(1000);
    let began = Instant::now();
    let spaces = Spaces::new(source.shared(), vec![]);
    let sent = send(Still, spaces, channels, request, None, events, CancellationToken::new()).await.unwrap();
    let seconds = began.elapsed().as_secs_f64();
    print!("[{} us stopped] ", sent.handed_over.stopped_us);
    sent.handed_over.bytes_sent as f64 / MIB / seconds
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn speed() {
    let (source, target) = (Bank::new(PAGES), Bank::new(PAGES));
    (0..PAGES).for_each(|page| source.write(page, &noise(page), 1));
    for lanes in [1, 2, 4, 1, 2, 4] {
        let before = cpu_s();
        let ceiling = bare(lanes).await;
        let between = cpu_s();
        let speed = transfer(lanes, &source, &target).await;
        let (bare_s, transfer_s) = (between - before, cpu_s() - between);
        println!(
            "{lanes} lanes: bare {ceiling:.0} MiB/s ({bare_s:.2} s of processor), transfer {speed:.0} MiB/s ({transfer_s:.2} s)"
        );
    }
}

#[test]
#[ignore = "a measurement"]
fn speed_of_the_parts() {
    use vmcb_engine::memory::shared::Run;
    use vmcb_engine::transfer::{receive, runs};
    let (source, target) = (Bank::new(PAGES), Bank::new(PAGES));
    (0..PAGES).for_each(|page| source.write(page, &noise(page), 1));
    let (from, to) = (source.shared(), [target.shared()]);
    let all = Run { first: 0, pages: PAGES };
    let time = |name: &str, work: &mut dyn FnMut()| {
        let before = cpu_s();
        work();
        println!("{name}: {:.2} s of processor for 1 GiB", cpu_s() - before);
    };
    for pages in [32, 64, 128, 256] {
        println!("frames of {pages} pages");
        let mut kept = Vec::new();
        time("read", &mut || {
            let mut bytes = Vec::with_capacity(1 << 20);
            for piece in all.pieces(pages) {
                bytes.clear();
                from.append_pages(piece, &mut bytes).unwrap();
            }
        });
        time("read and hash into frames", &mut || {
            for piece in all.pieces(pages) {
                let frames = runs::frames(0, &from, piece, |_| true).unwrap();
                if piece.first < 256 {
                    kept = frames;
                }
            }
        });
        let frame = &kept[0].bytes;
        time("check", &mut || {
            for _ in all.pieces(pages) {
                std::hint::black_box(proto::frame::decode_pages(frame).unwrap());
            }
        });
        for name in ["write to cold pages", "write to warm pages"] {
            time(name, &mut || {
                all.pieces(pages).for_each(|piece| {
                    to[0].write_pages(piece.first, &frame[64..]).unwrap();
                })
            });
        }
        time("punch", &mut || to[0].zero_pages(all).unwrap());
        let _ = receive::land(&to, frame);
        to[0].zero_pages(all).unwrap();
    }
}

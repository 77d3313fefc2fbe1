//! Promises of a restore that goes through a recording: the blocks go between the sections and StateEnd, all of them, in order,
//! and what is missing of them is found before the target hears that the state is complete.

use std::sync::Mutex;

use proto::v1::Position;

use super::*;
use crate::ingest::load::Journal;
use crate::journal::chain::tests::{RECORDING, Recorder};
use crate::journal::{Appended, Journals};

const UNTIL: Position = Position { retired: 3_500_000, skipped_tsc: 1500 };

/// A target that believes everything, and remembers what lane 0 said after the pages.
#[derive(Clone)]
struct Credulous {
    digest: MachineDigest,
    heard: Arc<Mutex<Vec<Bytes>>>,
    ended: Arc<Mutex<u32>>,
}

#[tonic::async_trait]
impl Lanes for Credulous {
    type LaneStream = ReceiverStream<Result<Chunk, Status>>;

    async fn lane(&self, request: Request<Streaming<Chunk>>) -> Result<Response<Self::LaneStream>, Status> {
        let (out, back) = mpsc::channel(8);
        let (target, mut incoming) = (self.clone(), request.into_inner());
        tokio::spawn(async move {
            while let Ok(Some(chunk)) = incoming.message().await {
                let kind = frame::Header::parse(&chunk.frame).unwrap().kind;
                let said = if kind == Kind::Control { Some(said(&chunk.frame).unwrap()) } else { None };
                let answer = match said {
                    Some(Said::Hello(_)) => {
                        Some(Said::HelloReply(proto::v1::HelloReply { protocol: super::super::PROTOCOL }))
                    }
                    Some(Said::RoundEnd(_)) => {
                        let mut ended = target.ended.lock().unwrap();
                        *ended += 1;
                        (*ended == 2).then_some(Said::RoundAck(proto::v1::RoundAck { round: 1 }))
                    }
                    Some(Said::StateEnd(_)) => {
                        target.heard.lock().unwrap().push(chunk.frame);
                        Some(Said::Ready(proto::v1::Ready { digest: Some(target.digest.clone()) }))
                    }
                    Some(_) => None,
                    None => {
                        if kind != Kind::Pages {
                            target.heard.lock().unwrap().push(chunk.frame);
                        }
                        None
                    }
                };
                if let Some(answer) = answer {
                    let _gone = out.send(Ok(say(answer))).await;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(back)))
    }
}

async fn channel_to(target: Credulous) -> Channel {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = LanesServer::new(target).max_decoding_message_size(16 << 20);
    tokio::spawn(Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener)));
    Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy()
}

/// Restores with these blocks of the recording; what lane 0 said after the pages.
async fn restored(blocks: std::ops::Range<u64>, recorded: u64) -> (Result<MachineDigest, Failure>, Vec<Bytes>) {
    let scratch = Scratch::new();
    let entry = full(&scratch, &rounds()).await;
    let (reader, mut recorder) = (reader(&scratch.bucket), Recorder::new(RECORDING));
    let frames: Vec<Bytes> = (0..recorded).map(|n| if n == 0 { recorder.cut(1) } else { recorder.block() }).collect();
    let journals = Journals::new(reader.clone());
    let appended = journals.append(VM, RECORDING, &claim("ours", 3), frames).await.unwrap();
    assert!(matches!(appended, Appended::Below { next, .. } if next == recorded));
    let opened = reader.manifest(&entry.manifest_key).await.unwrap();
    let target = Credulous { digest: entry.digest.clone(), heard: Arc::default(), ended: Arc::default() };
    let ticket = ticket("controller", "hostB");
    let load = Load {
        reader: &reader,
        opened: &opened,
        ticket: &ticket,
        target: "hostB",
        channel: channel_to(target.clone()).await,
        lanes: 2,
        bandwidth: 0,
        verify_full: false,
        lazy: false,
        journal: Some(Journal { shelf: journals.shelf(VM, RECORDING), blocks, until: UNTIL }),
    };
    let sent = load.send(|_| ()).await;
    let heard = target.heard.lock().unwrap().clone();
    (sent, heard)
}

#[tokio::test]
async fn blocks_go_between_the_sections_and_the_end_of_the_state() {
    let (sent, heard) = restored(2..5, 8).await;
    sent.unwrap();
    let kinds: Vec<Kind> = heard.iter().map(|frame| frame::Header::parse(frame).unwrap().kind).collect();
    let expected = [vec![Kind::Section; 3], vec![Kind::Journal; 3], vec![Kind::Control]].concat();
    assert_eq!(kinds, expected);
    let sequence =
        |frame: &Bytes| frame::decode_message::<proto::v1::JournalBlock>(Kind::Journal, frame).unwrap().sequence;
    let Said::StateEnd(end) = said(&heard[6]).unwrap() else { panic!("something else than StateEnd came last") };
    assert_eq!((end.sections, end.replay_until), (3, Some(UNTIL)));
    assert_eq!(heard[3..6].iter().map(sequence).collect::<Vec<_>>(), [2, 3, 4]);
}

#[tokio::test]
async fn a_block_that_is_missing_ends_the_restore_before_the_state_is_said_to_be_complete() {
    let (sent, heard) = restored(2..9, 8).await;
    let failure = sent.unwrap_err();
    assert!(failure.code == Code::Corrupt && failure.message.contains("block 8 is missing"), "{failure}");
    assert!(heard.iter().all(|frame| frame::Header::parse(frame).unwrap().kind != Kind::Control));
}

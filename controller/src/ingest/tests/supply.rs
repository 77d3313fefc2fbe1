//! Pages on demand, from a bucket in a directory: what a host asks for is what the checkpoint holds, each page once, and zeros are
//! said to be zero; and the working set that the next lazy restore begins with. The stream is a channel; lanes are the
//! business of the other tests.

use proto::v1::pages_part::Part;
use proto::v1::{PagesAnswered, PagesWanted};

use super::*;
use crate::ingest::supply::Supply;

/// What a stream is sent for these requests: pages by number, and the answers in order.
async fn supplied(supply: &Arc<Supply>, asked: Vec<PagesWanted>) -> Result<(Contents, Vec<PagesAnswered>), Failure> {
    let (out, mut parts) = mpsc::channel(1000);
    supply.serve(tokio_stream::iter(asked.into_iter().map(Ok)), out).await?;
    let (mut contents, mut answers) = (Contents::new(), Vec::new());
    while let Some(part) = parts.recv().await {
        match part.unwrap().part.unwrap() {
            Part::Frame(frame) => {
                let held = frame::decode_pages(&frame).unwrap();
                assert_eq!((held.run.space, held.run.encoding), (0, Encoding::Raw));
                for (page, bytes) in (held.run.first_page..).zip(held.payload.chunks(PAGE_BYTES)) {
                    assert!(contents.insert((0, page), bytes[0]).is_none(), "page {page} is sent once");
                }
            }
            Part::Answered(answer) => answers.push(answer),
            Part::WorkingSet(_) => panic!("nobody asked for it"),
        }
    }
    Ok((contents, answers))
}

fn wanted(id: u64, first_page: u64, pages: u32) -> PagesWanted {
    PagesWanted { id, first_page, pages, ..PagesWanted::default() }
}

#[tokio::test]
async fn pages_on_demand_are_those_of_the_checkpoint_and_say_which_are_zero() {
    let scratch = Scratch::new();
    let entry = send(&scratch.bucket, script(&rounds()).0).await.1.unwrap();
    let supply = Arc::new(Supply::open(reader(&scratch.bucket), &entry.manifest_key).await.unwrap());
    let ram: Contents =
        contents_of(&rounds()).into_iter().filter(|((space, _), fill)| *space == 0 && *fill > 0).collect();
    let all = (0..4).map(|part| wanted(part, part * 256, 256)).collect();
    assert_eq!(supplied(&supply, all).await.unwrap().0, ram);
    // One page brings those that lie with it, and no others.
    let (some, answers) = supplied(&supply, vec![wanted(7, 12, 1)]).await.unwrap();
    assert_eq!(some, Contents::from([((0, 12), 7)]));
    assert_eq!((answers[0].id, answers[0].zero_pages), (7, 0));
    let (none, answers) = supplied(&supply, vec![wanted(8, 600, 1)]).await.unwrap();
    assert_eq!((none.len(), answers[0].zero_first_page, answers[0].zero_pages), (0, 512, 900 - 512));
    let refused = supplied(&supply, vec![wanted(9, RAM_PAGES - 1, 2)]).await.unwrap_err();
    assert_eq!(refused.code, Code::Protocol);
    // A pack that lies is named, and nothing of it is sent.
    let key = &entry.pack_keys[0];
    let mut bytes = scratch.bucket.get(key).await.unwrap().to_vec();
    bytes[200] ^= 1;
    scratch.bucket.put(key, bytes.into()).await.unwrap();
    let supply = Arc::new(Supply::open(reader(&scratch.bucket), &entry.manifest_key).await.unwrap());
    let refused = supplied(&supply, (0..4).map(|part| wanted(part, part * 256, 256)).collect()).await.unwrap_err();
    assert!(refused.code == Code::Corrupt && refused.message.contains(key.as_str()), "{refused}");
}

#[tokio::test]
async fn a_working_set_is_kept_for_the_next_lazy_restore() {
    let scratch = Scratch::new();
    let entry = send(&scratch.bucket, script(&rounds()).0).await.1.unwrap();
    let supply = Arc::new(Supply::open(reader(&scratch.bucket), &entry.manifest_key).await.unwrap());
    assert_eq!(supply.working_set().await, WorkingSet::default());
    let set = WorkingSet { pages: vec![900, 3, 1023] };
    let told = PagesWanted { id: 4, touched: Some(set.clone()), ..PagesWanted::default() };
    assert_eq!(supplied(&supply, vec![told]).await.unwrap().1[0].id, 4);
    assert_eq!(supply.working_set().await, set);
    let stored = scratch.bucket.get(&crate::bucket::working_set_key(&VM.to_string())).await.unwrap();
    assert_eq!(frame::Header::parse(&stored).unwrap().kind, Kind::Sealed);
}

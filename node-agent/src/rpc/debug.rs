//! A debugger's bytes between a stream and the server of gdb's protocol, which runs on a thread of its own.
//!
//! Whichever side ends first ends the other, and then the guest goes on. Knows nothing of what is said.

use std::sync::Arc;

use proto::status::Code;
use proto::v1::{DebugBytes, VmRef};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::status;
use crate::migration::Failure;
use crate::replay::gdb;
use crate::vm::debug::Live;
use crate::vm::{Message, Vms};

const CHUNK_BYTES: usize = 16 << 10;

type Outputs = mpsc::Sender<Result<DebugBytes, Status>>;

/// Serves one stream to its end.
pub(super) async fn run(vms: Arc<Vms>, inputs: Streaming<DebugBytes>, outputs: Outputs) {
    if let Err(failure) = serve(&vms, inputs, &outputs).await {
        // Whoever listened may have left.
        let _gone = outputs.send(Err(status(failure))).await;
    }
}

async fn serve(vms: &Vms, mut inputs: Streaming<DebugBytes>, outputs: &Outputs) -> Result<(), Failure> {
    let Ok(Some(first)) = inputs.message().await else {
        return Err(Failure::new(Code::BadInput, "the first message must name a VM"));
    };
    let none = || Failure::new(Code::NotFound, format!("{}: this host has no such VM", super::short(&first.vm)));
    let handle = vms.find(&first.vm).ok_or_else(none)?;
    let vm = VmRef { vm: first.vm.clone(), generation: first.generation, ..VmRef::default() };
    let runner = handle.ask(|reply| Message::Debug(vm, reply)).await?;
    let mut live = Live::new(runner).await;
    let internal = |error: std::io::Error| Failure::new(Code::Internal, error);
    let pair = UnixStream::pair().and_then(|(ours, theirs)| {
        let theirs = theirs.into_std()?;
        theirs.set_nonblocking(false)?;
        Ok((ours, theirs))
    });
    let session = match pair {
        Ok((ours, theirs)) => {
            let session = tokio::task::spawn_blocking(move || {
                let ended = gdb::session(&mut live, theirs);
                live.detach();
                ended
            });
            let (said, heard) = ours.into_split();
            tokio::select! {
                () = say(said, outputs) => {}
                () = hear(heard, inputs, first.data) => {}
                () = outputs.closed() => {}
                () = vms.host().ending.cancelled() => {}
            }
            session
        }
        Err(error) => {
            tokio::task::spawn_blocking(move || live.detach());
            return Err(internal(error));
        }
    };
    // Both halves are closed: the session ends, if it has not yet.
    let ended = session.await.map_err(|error| Failure::new(Code::Internal, error))?;
    tracing::info!(vm = first.vm, ?ended, "the debugger has gone");
    // What the actor knows of its guest is as of now.
    let _looked = handle.ask(Message::Look).await;
    ended.map(drop).map_err(|text| Failure::new(Code::Conflict, format!("the debugger's session ended: {text}")))
}

/// What gdb is told; the first word, of nothing, says that the guest stands still.
async fn say(mut said: OwnedReadHalf, outputs: &Outputs) {
    let mut bytes = vec![0; CHUNK_BYTES];
    let mut count = 0;
    loop {
        let data = bytes[..count].to_vec();
        if outputs.send(Ok(DebugBytes { data, ..DebugBytes::default() })).await.is_err() {
            return;
        }
        match said.read(&mut bytes).await {
            Ok(0) | Err(_) => return,
            Ok(read) => count = read,
        }
    }
}

/// What gdb says.
async fn hear(mut heard: OwnedWriteHalf, mut inputs: Streaming<DebugBytes>, first: Vec<u8>) {
    let mut data = first;
    loop {
        if heard.write_all(&data).await.is_err() {
            return;
        }
        match inputs.message().await {
            Ok(Some(input)) => data = input.data,
            Ok(None) | Err(_) => return,
        }
    }
}

//! A console through the controller: bytes between `ctl` and the agent of the host that has the VM.

use proto::status::Code;
use proto::v1::{ConsoleInput, ConsoleOutput};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::Api;
use crate::failure::Failure;

/// Messages in flight, each way.
const DEPTH: usize = 16;

type Output = Result<ConsoleOutput, Status>;

/// Attaches; the first input names the VM.
pub(super) fn attach(api: Api, inputs: Streaming<ConsoleInput>) -> ReceiverStream<Output> {
    let (out, outputs) = mpsc::channel(DEPTH);
    tokio::spawn(async move {
        if let Err(failure) = forward(&api, inputs, &out).await {
            let _ = out.send(Err(failure.into())).await;
        }
    });
    ReceiverStream::new(outputs)
}

async fn forward(api: &Api, mut inputs: Streaming<ConsoleInput>, out: &mpsc::Sender<Output>) -> Result<(), Failure> {
    let silence = || Failure::new(Code::BadInput, "the first input must name a VM");
    let broken = |status: Status| Failure::from_status("console", &status);
    let first = inputs.message().await.map_err(broken)?.ok_or_else(silence)?;
    let state = api.ledger.state();
    let vm = state.vms.get(&first.vm).ok_or_else(|| super::plans::unknown_vm(&first.vm))?;
    let mut agent = api.agents.client(&vm.host)?;
    let (tell, told) = mpsc::channel(DEPTH);
    // There is room for one: the channel is new.
    let _ = tell.send(first).await;
    let broken = |status: Status| Failure::from_status(&vm.host, &status);
    let mut outputs = agent.console(ReceiverStream::new(told)).await.map_err(broken)?.into_inner();
    let mut tell = Some(tell);
    loop {
        tokio::select! {
            output = outputs.next() => match output {
                Some(output) => {
                    if out.send(Ok(output.map_err(broken)?)).await.is_err() {
                        return Ok(());
                    }
                }
                None => return Ok(()),
            },
            // Input that the agent does not take yet must not hold up output; its acknowledgement makes room.
            input = inputs.next(), if tell.as_ref().is_some_and(|told| told.capacity() > 0) => match (input, &tell) {
                (Some(Ok(input)), Some(told)) => {
                    if told.send(input).await.is_err() {
                        tell = None;
                    }
                }
                // The operator says nothing more, but may still listen.
                _ => tell = None,
            },
            () = out.closed() => return Ok(()),
        }
    }
}

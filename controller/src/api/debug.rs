//! A debugger through the controller: bytes between `ctl` and the agent of the host that has the VM.
//!
//! Who debugs which guest reads and writes all of its memory, so the log says who. Knows nothing of what is said.

use proto::status::Code;
use proto::v1::DebugBytes;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::Api;
use crate::failure::Failure;
use crate::tls::Identity;

/// Messages in flight, each way.
const DEPTH: usize = 16;

type Output = Result<DebugBytes, Status>;

/// Attaches; the first message names the VM.
pub(super) fn attach(api: Api, operator: Identity, inputs: Streaming<DebugBytes>) -> ReceiverStream<Output> {
    let (out, outputs) = mpsc::channel(DEPTH);
    tokio::spawn(async move {
        if let Err(failure) = forward(&api, &operator, inputs, &out).await {
            // Whoever asked may have left.
            let _ = out.send(Err(failure.into())).await;
        }
    });
    ReceiverStream::new(outputs)
}

async fn forward(
    api: &Api,
    operator: &Identity,
    mut inputs: Streaming<DebugBytes>,
    out: &mpsc::Sender<Output>,
) -> Result<(), Failure> {
    let broken = |status: Status| Failure::from_status("debugger", &status);
    let first = inputs.message().await.map_err(broken)?;
    let first = first.ok_or_else(|| Failure::new(Code::BadInput, "the first message must name a VM"))?;
    let state = api.ledger.state();
    let vm = state.vms.get(&first.vm).ok_or_else(|| super::plans::unknown_vm(&first.vm))?;
    let mut agent = api.agents.client(&vm.host)?;
    tracing::info!(%operator, vm = vm.name, host = vm.host, "debugs");
    let (tell, told) = mpsc::channel(DEPTH);
    // There is room for one: the channel is new.
    let _ = tell.send(DebugBytes { generation: vm.generation, ..first }).await;
    let broken = |status: Status| Failure::from_status(&vm.host, &status);
    let mut outputs = agent.debug(ReceiverStream::new(told)).await.map_err(broken)?.into_inner();
    let up = async {
        while let Some(Ok(input)) = inputs.next().await {
            if tell.send(input).await.is_err() {
                return;
            }
        }
    };
    let down = async {
        while let Some(output) = outputs.message().await.map_err(broken)? {
            if out.send(Ok(output)).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    };
    // Whichever side ends, the debugger is gone; the agent lets the guest go on.
    let ended = tokio::select! {
        ended = down => ended,
        () = up => Ok(()),
        () = out.closed() => Ok(()),
    };
    tracing::info!(%operator, vm = vm.name, "debugs no more");
    ended
}

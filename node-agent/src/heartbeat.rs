//! What the agent says to the controller, again and again: this host, its VMs; and the ledger's word on each.
//!
//! Five heartbeats fit into a lease. A lease counts from when the heartbeat was sent, never from when it was answered.
//! A controller that is not there is not an error: leases end, runners pause their guests by themselves.

use std::sync::Arc;
use std::time::Duration;

use proto::v1::fleet_client::FleetClient;
use proto::v1::{HeartbeatReply, HeartbeatRequest, HostInfo, VmInfo};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::tls::Identity;
use crate::vm::actor::chain;
use crate::vm::requests::Word;
use crate::vm::{Message, Vms};

/// A heartbeat that takes longer says nothing about the present.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// Beats until `shutdown`.
pub async fn run(vms: Arc<Vms>, controller: String, version: String, shutdown: CancellationToken) {
    let identity = Identity::controller();
    let mut client: Option<FleetClient<Channel>> = None;
    let mut silent = false;
    loop {
        let host = vms.host_info(&version).await;
        let sent_ns = vms.host().clock.boottime_ns();
        let beat = async {
            let mut connected = match client.take() {
                Some(client) => client,
                None => connect(&vms, &controller, &identity).await?,
            };
            let request = HeartbeatRequest { host: Some(host.clone()) };
            let reply = connected.heartbeat(request).await.map_err(|status| status.message().to_owned())?;
            client = Some(connected);
            Ok::<_, String>(reply.into_inner())
        };
        let outcome = tokio::select! {
            outcome = tokio::time::timeout(CALL_TIMEOUT, beat) => outcome,
            () = shutdown.cancelled() => return,
        };
        match outcome {
            Ok(Ok(reply)) => {
                if silent {
                    tracing::info!(controller, "the controller answers again");
                }
                silent = false;
                metrics::counter!(crate::metrics::HEARTBEATS, "outcome" => "answered").increment(1);
                follow(&vms, &host, &reply, sent_ns);
            }
            failed => {
                let error = failed.map_or_else(|_| "no answer in time".to_owned(), |e| e.err().unwrap_or_default());
                if !silent {
                    tracing::warn!(controller, error, "the controller does not answer");
                }
                silent = true;
                metrics::counter!(crate::metrics::HEARTBEATS, "outcome" => "failed").increment(1);
            }
        }
        tokio::select! {
            () = tokio::time::sleep(vms.host().leases.interval()) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

async fn connect(vms: &Vms, controller: &str, identity: &Identity) -> Result<FleetClient<Channel>, String> {
    let channel = vms.host().tls.connect(controller, identity, |endpoint| endpoint.tcp_nodelay(true));
    channel.await.map(FleetClient::new).map_err(|error| chain(&error))
}

/// Passes the ledger's words on to the VMs that this host had reported.
fn follow(vms: &Vms, reported: &HostInfo, reply: &HeartbeatReply, sent_ns: u64) {
    vms.host().leases.note(sent_ns, reply.lease_ms);
    for (report, word) in words(&reported.vms, reply) {
        if let Some(handle) = vms.find(&report.name) {
            handle.tell(Message::Verdict(word, sent_ns));
        }
    }
}

/// The words on reported VMs, each with its report.
fn words<'a>(reported: &'a [VmInfo], reply: &'a HeartbeatReply) -> impl Iterator<Item = (&'a VmInfo, Word)> {
    reply.vms.iter().filter_map(|said| {
        let report = reported.iter().find(|report| report.name == said.vm)?;
        let word = Word {
            verdict: said.verdict(),
            generation: said.generation,
            reported_generation: report.generation,
            reported_state: report.state(),
            reported_operation: report.operation.clone(),
        };
        Some((report, word))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::v1::VmVerdict;
    use proto::v1::vm_verdict::Verdict;

    #[test]
    fn a_word_goes_with_the_report_that_it_answers() {
        let reported = [VmInfo { name: "vm1".into(), generation: 4, operation: "op".into(), ..VmInfo::default() }];
        let said = |vm: &str| VmVerdict { vm: vm.into(), verdict: Verdict::Hold.into(), generation: 4 };
        let reply = HeartbeatReply { lease_ms: 1000, vms: vec![said("vm1"), said("never-reported")] };
        let words: Vec<_> = words(&reported, &reply).collect();
        assert_eq!(words.len(), 1);
        assert_eq!((words[0].1.reported_generation, words[0].1.reported_operation.as_str()), (4, "op"));
    }
}

//! `ctl policy ...`: one call each, but for the simulation, which is this process's own arithmetic over the same rules
//! that the controller executes.

pub mod report;
pub mod words;

use proto::status::Code;
use proto::v1;

use super::client::Client;
use super::failure::Failure;
use super::output::{self, Format};
use super::report::{Done, List};
use crate::retention::Item;
use crate::retention::simulate::simulate;
use report::{Policy, Simulated};
use words::{PolicyCommand, SimulateArgs};

/// Whether a command is about nothing that a cluster has.
pub fn needs_no_cluster(command: &PolicyCommand) -> bool {
    matches!(command, PolicyCommand::Simulate(SimulateArgs { vm: None, .. }))
}

/// Carries out a command.
///
/// # Errors
/// What the controller refused, or what was wrong with the flags.
pub async fn run(client: Option<Client>, command: PolicyCommand, format: Format) -> Result<(), Failure> {
    let connected = || {
        let failure = Failure::new(Code::Internal, "a command about a VM needs a cluster");
        client.clone().ok_or(failure)
    };
    match command {
        PolicyCommand::Set(args) => {
            let (doing, policy) = (format!("set the policy of {}", args.vm), Some(args.policy()?));
            let reply = connected()?.set_policy(v1::SetPolicyRequest { vm: args.vm, policy }).await;
            let record = reply.map_err(|e| Failure::from_status(&doing, &e))?.into_inner();
            output::print(format, &Policy::from(record))
        }
        PolicyCommand::Ls { vm } => {
            let found = list(connected()?, vm.unwrap_or_default()).await?;
            output::print(format, &List(found.into_iter().map(Policy::from).collect()))
        }
        PolicyCommand::Rm { vm } => {
            let doing = format!("remove the policy of {vm}");
            let reply = connected()?.remove_policy(v1::VmName { vm: vm.clone() }).await;
            reply.map_err(|e| Failure::from_status(&doing, &e))?;
            let message = format!("{vm} has no policy any more; its checkpoints stay");
            output::print(format, &Done { message, operation: String::new() })
        }
        PolicyCommand::Simulate(args) => simulated(client, args, format).await,
    }
}

async fn list(mut client: Client, vm: String) -> Result<Vec<v1::PolicyRecord>, Failure> {
    let reply = client.list_policies(v1::VmName { vm }).await;
    Ok(reply.map_err(|e| Failure::from_status("list the policies", &e))?.into_inner().policies)
}

async fn simulated(client: Option<Client>, args: SimulateArgs, format: Format) -> Result<(), Failure> {
    let (policy, there) = match (&args.vm, client, args.every) {
        (Some(vm), Some(client), _) => of_vm(client, vm).await?,
        (_, _, Some(every)) => (words::policy(every, None, &args.rules)?, vec![]),
        _ => return Err(Failure::bad_input("name a VM, or give --every")),
    };
    let now = crate::ledger::unix_ms();
    let span = u64::try_from(args.span.as_millis()).unwrap_or(u64::MAX);
    let end = simulate(&policy, there, now, span).map_err(|e| Failure::bad_input(e.to_string()))?;
    output::print(format, &Simulated::new(&policy, end, now.saturating_add(span)))
}

/// The policy of a VM and the checkpoints that it has.
async fn of_vm(mut client: Client, vm: &str) -> Result<(v1::CheckpointPolicy, Vec<Item>), Failure> {
    let none = || {
        Failure::new(Code::NotFound, format!("{vm} has no policy"))
            .hint("`ctl policy simulate --every 5m --keep-last 12` simulates one that is only given there")
    };
    let policy = list(client.clone(), vm.to_owned()).await?.into_iter().next().and_then(|record| record.policy);
    let policy = policy.ok_or_else(none)?;
    let reply = client.list_checkpoints(v1::VmName { vm: vm.to_owned() }).await;
    let found = reply.map_err(|e| Failure::from_status("list the checkpoints", &e))?.into_inner().checkpoints;
    let item = |record: v1::CheckpointRecord| Item {
        id: record.id,
        unix_ms: record.created_unix_ms,
        pinned: record.pinned,
        held: false,
        sound: !record.verified.starts_with("damaged"),
    };
    Ok((policy, found.into_iter().map(item).collect()))
}

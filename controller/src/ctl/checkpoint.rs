//! `ctl checkpoint ...` and `ctl restore`: what is in the bucket, and back from it.

use std::collections::BTreeSet;

use proto::status::Code;
use proto::v1;

use super::client::Client;
use super::failure::Failure;
use super::grammar::{CheckpointCommand, RestoreArgs, Verify};
use super::operation;
use super::output::{self, Format};
use super::policy::report::Pruned;
use super::report::{Checkpoint, Done, List};
use super::sweeping::{drill, sweep};
use super::{export, migration, recording, vm};

/// The longest pause of a restore means nothing to the guest, which does not run yet; any value will do.
const RESTORE_DOWNTIME: std::time::Duration = std::time::Duration::from_millis(300);

/// Carries out a command.
///
/// # Errors
/// What the controller refused or found damaged.
pub async fn run(mut client: Client, command: CheckpointCommand, format: Format) -> Result<(), Failure> {
    match command {
        CheckpointCommand::Create(arg) => {
            let what = format!("checkpoint {}", arg.vm);
            let request = v1::CreateCheckpointRequest { vm: arg.vm, by_policy: arg.policy };
            let mut calls = client.clone();
            let outcome = operation::follow(&client, &what, calls.create_checkpoint(request)).await?;
            let record = outcome.done.checkpoint.ok_or_else(|| {
                Failure::new(Code::Protocol, format!("{what}: done, but the controller sent no record of it"))
            })?;
            output::print(format, &Checkpoint::from(record))
        }
        CheckpointCommand::Ls { vm } => {
            let found = list(&mut client, vm.unwrap_or_default()).await?;
            output::print(format, &List(found.into_iter().map(Checkpoint::from).collect()))
        }
        CheckpointCommand::Show { id } => {
            let doing = format!("show checkpoint {id}");
            let reply = client.get_checkpoint(name(&id)).await.map_err(|e| Failure::from_status(&doing, &e))?;
            output::print(format, &Checkpoint::from(reply.into_inner()))
        }
        CheckpointCommand::Verify(args) => match args.id {
            Some(id) => {
                let record = verify(&client, &id).await?;
                output::print(format, &Checkpoint::from(record))
            }
            None => verify_all(client, format).await,
        },
        CheckpointCommand::Rm { id } => {
            let mut calls = client.clone();
            let what = format!("remove checkpoint {id}");
            let outcome = operation::follow(&client, &what, calls.remove_checkpoint(name(&id))).await?;
            output::print(
                format,
                &Done { message: format!("checkpoint {id} is removed"), operation: outcome.operation },
            )
        }
        CheckpointCommand::Export(args) => export::run(client, args, format).await,
        CheckpointCommand::Drill(args) => drill(client, args, format).await,
        CheckpointCommand::Sweep { vm, dry_run } => sweep(client, vm.unwrap_or_default(), dry_run, format).await,
        CheckpointCommand::Prune { vm, dry_run } => {
            let doing = format!("prune the checkpoints of {vm}");
            let reply = client.prune_checkpoints(v1::PruneRequest { vm, dry_run }).await;
            let reply = reply.map_err(|e| Failure::from_status(&doing, &e))?.into_inner();
            output::print(format, &Pruned::new(reply, dry_run))
        }
    }
}

async fn list(client: &mut Client, vm: String) -> Result<Vec<v1::CheckpointRecord>, Failure> {
    let reply = client.list_checkpoints(v1::VmName { vm }).await;
    Ok(reply.map_err(|e| Failure::from_status("list the checkpoints", &e))?.into_inner().checkpoints)
}

/// The record after the check. A checkpoint that is not whole is a failure, however the controller says so.
async fn verify(client: &Client, id: &str) -> Result<v1::CheckpointRecord, Failure> {
    let mut calls = client.clone();
    let what = format!("verify checkpoint {id}");
    let outcome = operation::follow(client, &what, calls.verify_checkpoint(name(id))).await?;
    let record = outcome.done.checkpoint.ok_or_else(|| {
        Failure::new(Code::Protocol, format!("{what}: done, but the controller sent no record of it"))
    })?;
    if record.verified.starts_with("damaged") {
        return Err(Failure::new(Code::Corrupt, format!("checkpoint {id} of {}: {}", record.vm, record.verified))
            .hint("restore from another checkpoint: `ctl checkpoint ls`"));
    }
    Ok(record)
}

/// All are read, also after one that is damaged; the exit code is that of the first failure.
async fn verify_all(mut client: Client, format: Format) -> Result<(), Failure> {
    let mut verified = Vec::new();
    let mut failures: Vec<Failure> = Vec::new();
    for record in list(&mut client, String::new()).await? {
        match verify(&client, &record.id).await {
            Ok(record) => verified.push(Checkpoint::from(record)),
            Err(failure) if failure.code == Code::Cancelled => return Err(failure),
            Err(failure) => {
                eprintln!("{}", failure.lines());
                let verified_word = format!("damaged: {}", failure.message);
                verified.push(Checkpoint::from(v1::CheckpointRecord { verified: verified_word, ..record }));
                failures.push(failure);
            }
        }
    }
    let total = verified.len();
    output::print(format, &List(verified))?;
    match failures.first() {
        None => Ok(()),
        Some(first) => {
            Err(Failure::new(first.code, format!("{} of {total} checkpoints cannot be used", failures.len())))
        }
    }
}

/// Brings a VM back, or all of them.
///
/// # Errors
/// What the controller refused, found damaged, or could not reach; of several, the first.
pub async fn restore(mut client: Client, args: RestoreArgs, format: Format) -> Result<(), Failure> {
    if let Some(from) = &args.from {
        adopt(&mut client, from, args.name.clone().unwrap_or_default()).await?;
    }
    match &args.name {
        Some(name) => restore_one(&client, name, &args, format).await,
        None => restore_all(client, &args, format).await,
    }
}

/// Lets the controller look what the bucket has; says what was found.
async fn adopt(client: &mut Client, from: &str, name: String) -> Result<(), Failure> {
    let doing = format!("look into {from}");
    let reply = client.adopt_checkpoints(v1::AdoptRequest { from: from.to_owned(), name }).await;
    let reply = reply.map_err(|e| Failure::from_status(&doing, &e))?.into_inner();
    reply.problems.iter().for_each(|problem| eprintln!("left alone: {problem}"));
    eprintln!("{from}: {} checkpoints that this cluster did not know", reply.adopted.len());
    Ok(())
}

/// Every VM that has a checkpoint and is not here. One that fails does not keep the others from coming back.
async fn restore_all(mut client: Client, args: &RestoreArgs, format: Format) -> Result<(), Failure> {
    let reply = client.list_vms(v1::Empty {}).await.map_err(|e| Failure::from_status("list the VMs", &e))?;
    let here: BTreeSet<String> = reply.into_inner().vms.into_iter().map(|vm| vm.name).collect();
    let names: BTreeSet<String> = list(&mut client, String::new()).await?.into_iter().map(|c| c.vm).collect();
    let mut first = None;
    for name in names.difference(&here) {
        if let Err(failure) = restore_one(&client, name, args, format).await {
            eprintln!("{}", failure.lines());
            first.get_or_insert(failure);
        }
    }
    first.map_or(Ok(()), Err)
}

async fn restore_one(client: &Client, name: &str, args: &RestoreArgs, format: Format) -> Result<(), Failure> {
    let request = v1::RestoreRequest {
        name: name.to_owned(),
        to: args.to.clone().unwrap_or_default(),
        as_name: args.as_name.clone().unwrap_or_default(),
        policy: Some(migration::policy(RESTORE_DOWNTIME, None, Verify::Stream)?),
        lazy: args.lazy,
        at: recording::asked(args.at.as_ref())?,
    };
    let mut calls = client.clone();
    let what = match &args.to {
        Some(to) => format!("restore {name} to {to}"),
        None => format!("restore {name}"),
    };
    let outcome = operation::follow(client, &what, calls.restore(request)).await?;
    let restored = outcome.done.vm.as_ref().map(|vm| vm.name.clone());
    vm::changed(outcome, "restored", &restored.or(args.as_name.clone()).unwrap_or(name.to_owned()), format)
}

fn name(id: &str) -> v1::CheckpointName {
    v1::CheckpointName { id: id.to_owned() }
}

//! `ctl record ...` and `ctl replay`: what entered a VM, kept, shown, exported, and gone through again.
//!
//! | file | what |
//! |---|---|
//! | `words` | the command line |
//! | `instant` | times as people write them |
//! | `report` | how recordings are printed |
//! | `file` | a recording's file |
//! | `replay` | runs `vm-replay` |

mod file;
pub mod instant;
pub mod replay;
mod report;
pub mod words;

use std::time::{Duration, Instant};

use proto::status::Code;
use proto::v1;
use proto::v1::recorded_instant::At;

use self::instant::When;
use self::report::{Recording, Recordings};
use self::words::{RecordCommand, RecordExportArgs, StartArgs};
use super::client::Client;
use super::failure::Failure;
use super::interrupts::Interrupts;
use super::operation;
use super::output::{self, Format};
use super::report::Done;

/// How long the block is waited for that begins with the first checkpoint, and between two looks.
const BASED_MAX: Duration = Duration::from_secs(15);
const LOOK: Duration = Duration::from_millis(200);

/// Carries out a command.
///
/// # Errors
/// What the controller refused.
pub async fn run(mut client: Client, command: RecordCommand, format: Format) -> Result<(), Failure> {
    match command {
        RecordCommand::Start(args) => start(client, args, format).await,
        RecordCommand::Stop { vm } => {
            let doing = format!("end the recording of {vm}");
            let reply = client.stop_recording(v1::VmName { vm }).await;
            let reply = reply.map_err(|status| Failure::from_status(&doing, &status))?;
            output::print(format, &Recording::from(reply.into_inner()))
        }
        RecordCommand::Ls { vm } => {
            let found = list(&mut client, vm.unwrap_or_default()).await?;
            output::print(format, &Recordings(found.into_iter().map(Recording::from).collect()))
        }
        RecordCommand::Rm { vm, recording } => {
            let doing = format!("remove recording {recording} of {vm}");
            let message = format!("recording {recording} of {vm} is removed");
            let reply = client.remove_recording(v1::RecordingName { vm, recording }).await;
            reply.map_err(|status| Failure::from_status(&doing, &status))?;
            output::print(format, &Done { message, operation: String::new() })
        }
        RecordCommand::Export(args) => export(client, args, format).await,
    }
}

async fn list(client: &mut Client, vm: String) -> Result<Vec<v1::RecordingRecord>, Failure> {
    let reply = client.list_recordings(v1::VmName { vm }).await;
    let reply = reply.map_err(|status| Failure::from_status("list the recordings", &status))?;
    Ok(reply.into_inner().recordings)
}

/// Begins a recording, and makes the checkpoint from which it can be replayed if there is none. The VM's policy may remove that
/// one when there are newer ones, and what was recorded before the oldest goes with it.
async fn start(mut client: Client, args: StartArgs, format: Format) -> Result<(), Failure> {
    let StartArgs { vm, when_full } = args;
    let full = v1::JournalFull::from(when_full).into();
    let request = v1::StartRecordingRequest { vm: vm.clone(), full };
    let doing = format!("record {vm}");
    let reply = client.start_recording(request).await.map_err(|status| Failure::from_status(&doing, &status))?;
    let v1::StartRecordingReply { recording, wants_checkpoint } = reply.into_inner();
    let recording = recording.ok_or_else(|| {
        Failure::new(Code::Protocol, format!("{doing}: done, but the controller sent no record of it"))
    })?;
    if wants_checkpoint {
        let mut calls = client.clone();
        let request = v1::CreateCheckpointRequest { vm: vm.clone(), by_policy: true };
        let made = operation::follow(&client, &format!("checkpoint {vm}"), calls.create_checkpoint(request)).await;
        made.map_err(|failure| {
            let hint = format!("{vm} is recorded; `ctl checkpoint create {vm}` makes what it can be replayed from");
            failure.hint(hint)
        })?;
    }
    let found = until_based(&mut client, vm, recording).await?;
    output::print(format, &Recording::from(found))
}

/// The recording as soon as its first checkpoint's block has come: that takes as long as a block is open.
async fn until_based(
    client: &mut Client,
    vm: String,
    mut recording: v1::RecordingRecord,
) -> Result<v1::RecordingRecord, Failure> {
    let deadline = Instant::now() + BASED_MAX;
    loop {
        let there = list(client, vm.clone()).await?.into_iter().find(|found| found.id == recording.id);
        recording = there.unwrap_or(recording);
        let based = recording.segments.iter().any(|segment| !segment.checkpoint.is_empty());
        if based || !recording.ended.is_empty() || Instant::now() > deadline {
            return Ok(recording);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// An instant as the controller understands it.
pub fn asked(when: Option<&When>) -> Result<Option<v1::RecordedInstant>, Failure> {
    let unix_ns = when.map(When::here).transpose()?;
    Ok(unix_ns.map(|unix_ns| v1::RecordedInstant { at: Some(At::UnixNs(unix_ns)) }))
}

async fn export(mut client: Client, args: RecordExportArgs, format: Format) -> Result<(), Failure> {
    super::export::draft::free(&args.out)?;
    let doing = format!("export the recording of {}", args.vm);
    let request = v1::ExportRecordingRequest {
        name: args.from_checkpoint.clone().unwrap_or(args.vm.clone()),
        at: asked(args.at.as_ref())?,
        until: asked(args.until.as_ref())?,
    };
    let mut interrupts = Interrupts::listen()?;
    let written = tokio::select! {
        written = file::write(&mut client, request, &doing, &args.out) => written?,
        () = interrupts.next() => return Err(super::export::cancelled(&doing)),
    };
    output::print(format, &written)
}

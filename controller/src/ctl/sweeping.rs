//! `ctl checkpoint sweep` and `ctl checkpoint drill`: one call each, and what it prints. Fields may be added, never renamed.

use proto::status::Code;
use proto::v1;
use serde::Serialize;

use super::client::Client;
use super::failure::Failure;
use super::grammar::DrillArgs;
use super::output::{self, Format, Report, Text};
use super::units::{show_bytes, show_ms};

/// What a sweep did, or would do.
#[derive(Debug, Serialize)]
pub struct Swept {
    dry_run: bool,
    vms: Vec<SweptVm>,
}

#[derive(Debug, Serialize)]
struct SweptVm {
    vm: String,
    vm_id: String,
    packs: u64,
    bytes: u64,
    removed: u64,
    removed_bytes: u64,
    left: u64,
    repacked: u64,
    written_bytes: u64,
    note: String,
    failed: bool,
}

impl From<v1::SweptVm> for SweptVm {
    fn from(swept: v1::SweptVm) -> SweptVm {
        let failed = swept.code != 0;
        let v1::SweptVm {
            vm, vm_id, packs, bytes, removed, removed_bytes, left, repacked, written_bytes, note, ..
        } = swept;
        SweptVm { vm, vm_id, packs, bytes, removed, removed_bytes, left, repacked, written_bytes, note, failed }
    }
}

impl Report for Swept {
    fn text(&self) -> Text {
        let row = |vm: &SweptVm| {
            let note = if vm.failed { format!("FAILED: {}", vm.note) } else { vm.note.clone() };
            vec![
                vm.vm.clone(),
                vm.packs.to_string(),
                show_bytes(vm.bytes),
                vm.removed.to_string(),
                show_bytes(vm.removed_bytes),
                vm.left.to_string(),
                vm.repacked.to_string(),
                super::report::dash(&note),
            ]
        };
        let rows = Text::Rows {
            columns: vec!["vm", "packs", "needed", "removed", "freed", "left", "repacked", "note"],
            rows: self.vms.iter().map(row).collect(),
            empty: "no VM has anything in the bucket",
        };
        let told = if self.dry_run { "nothing was changed: `removed` and `repacked` would be" } else { "" };
        Text::Parts([rows].into_iter().chain((!told.is_empty()).then(|| Text::Lines(told.into()))).collect())
    }
}

/// Carries it out.
///
/// # Errors
/// What the controller refused; the first VM that could not be swept.
pub async fn sweep(mut client: Client, vm: String, dry_run: bool, format: Format) -> Result<(), Failure> {
    let reply = client.sweep_checkpoints(v1::SweepRequest { vm, dry_run }).await;
    let reply = reply.map_err(|error| Failure::from_status("sweep the bucket", &error))?.into_inner();
    let failed = reply.vms.iter().find(|vm| vm.code != 0);
    let failed = failed.map(|vm| Failure::new(Code::from_number(vm.code), format!("{}: {}", vm.vm, vm.note)));
    output::print(format, &Swept { dry_run, vms: reply.vms.into_iter().map(SweptVm::from).collect() })?;
    failed.map_or(Ok(()), Err)
}

/// How a drill went.
#[derive(Debug, Serialize)]
pub struct Drilled {
    checkpoint: String,
    vm: String,
    host: String,
    restore_ms: f64,
    life_ms: f64,
    destroy_ms: f64,
    seen: String,
}

impl Report for Drilled {
    fn text(&self) -> Text {
        Text::fields([
            ("checkpoint", self.checkpoint.clone()),
            ("vm", self.vm.clone()),
            ("host", self.host.clone()),
            ("restored in", show_ms(self.restore_ms)),
            ("alive after", show_ms(self.life_ms)),
            ("seen", self.seen.clone()),
            ("destroyed in", show_ms(self.destroy_ms)),
        ])
    }
}

/// Carries it out.
///
/// # Errors
/// What the controller refused, or why the guest did not come to life.
pub async fn drill(mut client: Client, args: DrillArgs, format: Format) -> Result<(), Failure> {
    let doing = format!("drill {}", args.id);
    let request = v1::DrillRequest {
        id: args.id,
        to: args.to.unwrap_or_default(),
        expect: args.expect.unwrap_or_default(),
        timeout_ms: u64::try_from(args.timeout.as_millis()).unwrap_or(u64::MAX).max(1),
    };
    let reply = client.drill_checkpoint(request).await;
    let reply = reply.map_err(|error| Failure::from_status(&doing, &error))?.into_inner();
    let v1::DrillReply { checkpoint, vm, host, restore_ms, life_ms, destroy_ms, seen } = reply;
    output::print(format, &Drilled { checkpoint, vm, host, restore_ms, life_ms, destroy_ms, seen })
}

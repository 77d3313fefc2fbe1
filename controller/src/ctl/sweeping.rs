//! `ctl checkpoint sweep`: one call, and what it prints. Fields may be added, never renamed.

use proto::status::Code;
use proto::v1;
use serde::Serialize;

use super::client::Client;
use super::failure::Failure;
use super::output::{self, Format, Report, Text};
use super::units::show_bytes;

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

//! `ctl vmcb show|diff`: virtual machine control blocks (APM2 appendix B) as tables.
//!
//! Knows where VMCBs come from (a VM, a checkpoint, a file of 4096 bytes) and how rows are compared; what the fields mean
//! is the engine's knowledge, asked for in [`decode`] and [`vmcb_of`] alone.

use std::collections::BTreeMap;
use std::path::Path;

use proto::status::Code;
use proto::v1;
use serde::Serialize;

use super::client::Client;
use super::failure::Failure;
use super::grammar::VmcbCommand;
use super::output::{self, Format, Report, Text};

const VMCB_BYTES: usize = 4096;

/// One field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Field {
    section: String,
    field: String,
    value: String,
}

/// A decoded VMCB.
#[derive(Debug, Serialize)]
struct Vmcb {
    name: String,
    vcpu: usize,
    fields: Vec<Field>,
}

impl Report for Vmcb {
    fn text(&self) -> Text {
        let row = |f: &Field| vec![f.section.clone(), f.field.clone(), f.value.clone()];
        let rows = self.fields.iter().map(row).collect();
        Text::Rows { columns: vec!["section", "field", "value"], rows, empty: "every field is zero" }
    }
}

/// Where two VMCBs differ.
#[derive(Debug, Serialize)]
struct Difference {
    a: String,
    b: String,
    vcpu: usize,
    fields: Vec<DifferentField>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct DifferentField {
    section: String,
    field: String,
    a: String,
    b: String,
}

impl Report for Difference {
    fn text(&self) -> Text {
        let row = |f: &DifferentField| vec![f.section.clone(), f.field.clone(), f.a.clone(), f.b.clone()];
        let rows = self.fields.iter().map(row).collect();
        Text::Rows { columns: vec!["section", "field", "a", "b"], rows, empty: "no field differs" }
    }
}

/// All that the engine's knowledge is needed for: the fields of one VMCB, in order.
fn decode(page: &[u8; VMCB_BYTES]) -> Vec<Field> {
    let rows = vmcb_engine::vmcb::decode::describe(&vmcb_engine::vmcb::Vmcb::from_bytes(page));
    rows.into_iter().map(|row| Field { section: row.section.to_owned(), field: row.field, value: row.value }).collect()
}

/// A checkpoint has states of processors: the VMCB that such a state is loaded into before it runs.
fn vmcb_of(name: &str, body: &[u8]) -> Result<Vec<u8>, Failure> {
    let state = vmcb_engine::cpu::CpuState::from_bytes(body)
        .map_err(|e| Failure::new(Code::Corrupt, format!("{name}: the state of a processor does not decode: {e}")))?;
    let mut vmcb = vmcb_engine::vmcb::Vmcb::boxed();
    state.to_vmcb(&mut vmcb);
    Ok(vmcb.as_page().to_vec())
}

/// Is everything that the command names a file?
pub fn needs_no_cluster(command: &VmcbCommand) -> bool {
    match command {
        VmcbCommand::Show { name, .. } => Path::new(name).is_file(),
        VmcbCommand::Diff { a, b, .. } => Path::new(a).is_file() && Path::new(b).is_file(),
    }
}

/// Carries out a command.
///
/// # Errors
/// No such VM, checkpoint or file; no such processor.
pub async fn run(mut client: Option<Client>, command: VmcbCommand, format: Format) -> Result<(), Failure> {
    match command {
        VmcbCommand::Show { name, vcpu } => {
            let page = fetch(&mut client, &name, vcpu).await?;
            output::print(format, &Vmcb { name, vcpu, fields: decode(&page) })
        }
        VmcbCommand::Diff { a, b, vcpu } => {
            let pages = [fetch(&mut client, &a, vcpu).await?, fetch(&mut client, &b, vcpu).await?];
            let fields = compare(&decode(&pages[0]), &decode(&pages[1]));
            output::print(format, &Difference { a, b, vcpu, fields })
        }
    }
}

async fn fetch(client: &mut Option<Client>, name: &str, vcpu: usize) -> Result<Box<[u8; VMCB_BYTES]>, Failure> {
    let path = Path::new(name);
    let pages = if path.is_file() {
        vec![std::fs::read(path).map_err(|e| Failure::file("read the VMCB", path, &e))?]
    } else {
        let client = client.as_mut().ok_or_else(|| Failure::new(Code::NotFound, format!("the file {name} is gone")))?;
        let request = v1::VmOrCheckpoint { name: name.to_owned() };
        let reply = client.get_vmcbs(request).await;
        let reply = reply.map_err(|e| Failure::from_status(&format!("read the VMCBs of {name}"), &e))?.into_inner();
        match reply.cpu_states.as_slice() {
            [] => reply.vmcbs,
            states => states.iter().map(|body| vmcb_of(name, body)).collect::<Result<_, _>>()?,
        }
    };
    let count = pages.len();
    let page = pages.into_iter().nth(vcpu).ok_or_else(|| {
        Failure::new(Code::NotFound, format!("{name} has {count} processors, there is no number {vcpu}"))
            .hint("they are counted from 0")
    })?;
    let bytes = page.len();
    page.try_into()
        .map_err(|_| Failure::new(Code::Corrupt, format!("{name}: a VMCB has {VMCB_BYTES} bytes, this has {bytes}")))
}

/// Fields whose values differ, or that only one side has, in order of `a`, then of `b`.
fn compare(a: &[Field], b: &[Field]) -> Vec<DifferentField> {
    let index = |fields: &[Field]| -> BTreeMap<(String, String), String> {
        fields.iter().map(|f| ((f.section.clone(), f.field.clone()), f.value.clone())).collect()
    };
    let (in_a, in_b) = (index(a), index(b));
    let key = |f: &Field| (f.section.clone(), f.field.clone());
    let mut keys: Vec<_> = a.iter().map(key).collect();
    keys.extend(b.iter().map(key).filter(|key| !in_a.contains_key(key)));
    let value = |side: &BTreeMap<_, String>, key: &(String, String)| side.get(key).cloned().unwrap_or_default();
    let different = keys.into_iter().filter(|key| in_a.get(key) != in_b.get(key)).map(|key| DifferentField {
        a: value(&in_a, &key),
        b: value(&in_b, &key),
        section: key.0,
        field: key.1,
    });
    different.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(field: &str, value: &str) -> Field {
        Field { section: "save".into(), field: field.into(), value: value.into() }
    }

    #[test]
    fn only_differences_are_shown_with_what_one_side_lacks() {
        let a = [field("rip", "1"), field("rax", "2"), field("rsp", "3")];
        let b = [field("rip", "9"), field("rax", "2"), field("cr2", "4")];
        let found = compare(&a, &b);
        let rows: Vec<_> = found.iter().map(|f| (f.field.as_str(), f.a.as_str(), f.b.as_str())).collect();
        assert_eq!(rows, [("rip", "1", "9"), ("rsp", "3", ""), ("cr2", "", "4")]);
    }

    #[test]
    fn a_changed_field_is_decoded_as_different() {
        let a = [0; VMCB_BYTES];
        let mut b = a;
        // RIP of the save area (APM2 table B-2).
        b[0x578..0x580].copy_from_slice(&0xfff0u64.to_le_bytes());
        let found = compare(&decode(&a), &decode(&b));
        assert!(found.iter().any(|field| field.b.contains("fff0")), "{found:?}");
    }
}

//! `ctl key ...`: the cluster keys, out to a safe and back.
//!
//! The export goes to standard output as it is, whatever `-o` says: it is a file, not a report.

use std::io::{Read, Write};
use std::path::Path;

use proto::status::Code;
use proto::v1;

use super::client::Client;
use super::failure::Failure;
use super::grammar::KeyCommand;
use super::output::{self, Format};
use super::report::Done;

/// Longest export that is read: more keys than anybody rotates.
const EXPORT_BYTES_MAX: u64 = 1 << 20;

/// Carries out a command.
///
/// # Errors
/// What the controller refused, or a file that cannot be read.
pub async fn run(mut client: Client, command: KeyCommand, format: Format) -> Result<(), Failure> {
    let failed = |doing: &'static str| move |status: tonic::Status| Failure::from_status(doing, &status);
    match command {
        KeyCommand::Export => {
            let text = client.export_keys(v1::Empty {}).await.map_err(failed("export the keys"))?.into_inner().data;
            let written = std::io::stdout().write_all(&text);
            written.map_err(|e| Failure::new(Code::Internal, format!("cannot write the export: {e}")))
        }
        KeyCommand::Import { file } => {
            let data = read(&file)?;
            let reply = client.import_keys(v1::Blob { data }).await.map_err(failed("import the keys"))?.into_inner();
            done("this cluster has", &reply, format)
        }
        KeyCommand::Rotate => {
            let reply = client.rotate_keys(v1::Empty {}).await.map_err(failed("rotate the key"))?.into_inner();
            done("keep a new export (`ctl key export`); this cluster has", &reply, format)
        }
    }
}

fn done(what: &str, reply: &v1::KeysReply, format: Format) -> Result<(), Failure> {
    let message = format!("{what} the keys {}; the last one wraps", reply.ids.join(", "));
    output::print(format, &Done { message, operation: String::new() })
}

fn read(file: &Path) -> Result<Vec<u8>, Failure> {
    let mut data = Vec::new();
    let read = match file.to_str() {
        Some("-") => std::io::stdin().lock().take(EXPORT_BYTES_MAX).read_to_end(&mut data),
        _ => std::fs::File::open(file).and_then(|file| file.take(EXPORT_BYTES_MAX).read_to_end(&mut data)),
    };
    read.map_err(|e| Failure::new(Code::BadInput, format!("{}: {e}", file.display())))?;
    Ok(data)
}

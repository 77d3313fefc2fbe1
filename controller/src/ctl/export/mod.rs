//! `ctl checkpoint export`: a checkpoint as files that other tools read: an ELF core for gdb, or raw images.
//!
//! ```text
//! controller ──pages, opened and checked──> draft (sparse, beside its final name) ──digest equal──> its name
//! ```
//! The controller proves each page; here frames are checked again as they come, and in the end the digest over all of them
//! against the checkpoint's. Until then nothing has the name that was asked for, and what fails leaves nothing behind.

pub(in crate::ctl) mod draft;
mod elf;
mod paging;
pub(in crate::ctl) mod proof;

use std::path::Path;
use std::time::{Duration, Instant};

use proto::frame::PAGE_BYTES;
use proto::status::Code;
use proto::v1;
use proto::v1::export_message::Message as Said;
use serde::Serialize;
use vmcb_engine::cpu::CpuState;

use super::client::Client;
use super::failure::Failure;
use super::grammar::{ExportArgs, ExportFormat};
use super::interrupts::Interrupts;
use super::output::{self, Format, Report, Text};
use super::progress::Progress;
use super::units::show_bytes;
use draft::Draft;
use proof::Proof;

/// How often the bar moves.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Carries out the command.
///
/// # Errors
/// No such checkpoint, a name that is taken, a full disk, or bytes that are not the checkpoint's.
pub async fn run(mut client: Client, args: ExportArgs, format: Format) -> Result<(), Failure> {
    draft::free(&args.out)?;
    let doing = format!("export {}", args.name);
    let mut interrupts = Interrupts::listen()?;
    let exported = tokio::select! {
        exported = receive(&mut client, &args, &doing) => exported?,
        () = interrupts.next() => return Err(cancelled(&doing)),
    };
    output::print(format, &exported)
}

/// What a file's writing ends with that was told to end.
pub(in crate::ctl) fn cancelled(doing: &str) -> Failure {
    Failure::new(Code::Cancelled, format!("{doing}: cancelled; nothing is left of it"))
}

async fn receive(client: &mut Client, args: &ExportArgs, doing: &str) -> Result<Exported, Failure> {
    let request = v1::ExportRequest { name: args.name.clone(), disks: args.format == ExportFormat::Raw };
    let failed = |status: tonic::Status| Failure::from_status(doing, &status);
    let mut stream = client.export_checkpoint(request).await.map_err(failed)?.into_inner();
    let mut export: Option<Export> = None;
    let mut shown = Instant::now();
    while let Some(message) = stream.message().await.map_err(failed)? {
        match (message.message, &mut export) {
            (Some(Said::Head(head)), None) => export = Some(Export::begin(args, head, doing)?),
            (Some(Said::Pages(chunk)), Some(export)) => {
                tokio::task::block_in_place(|| export.pages(&chunk.frame))?;
                if shown.elapsed() >= PROGRESS_EVERY {
                    export.show();
                    shown = Instant::now();
                }
            }
            (Some(Said::End(end)), Some(_)) => {
                let export = export.take().expect("it was matched as there");
                return tokio::task::block_in_place(|| export.finish(args, end.pages));
            }
            _ => return Err(protocol(doing, "a message that does not belong there")),
        }
    }
    Err(protocol(doing, "the stream's end before the checkpoint's"))
}

/// The controller said what it must not.
pub(in crate::ctl) fn protocol(doing: &str, what: &str) -> Failure {
    Failure::new(Code::Protocol, format!("{doing}: the controller sent {what}"))
}

/// An export that is under way.
struct Export {
    proof: Proof,
    cpus: Vec<CpuState>,
    draft: Draft,
    progress: Progress,
}

impl Export {
    fn begin(args: &ExportArgs, head: v1::ExportHead, doing: &str) -> Result<Export, Failure> {
        let config = head.config.clone().unwrap_or_default();
        let wanted = if args.format == ExportFormat::ElfCore { 1 } else { usize::MAX };
        let proof = Proof::new(doing, head, wanted)?;
        let cpus = cpus(&proof.head.sections)?;
        let draft = match args.format {
            ExportFormat::ElfCore => Draft::core(&args.out, config.memory_bytes)?,
            ExportFormat::Raw => Draft::raw(&args.out, &config)?,
        };
        Ok(Export { proof, cpus, draft, progress: Progress::new(doing) })
    }

    fn pages(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let held = self.proof.take(bytes)?;
        self.draft.write(usize::from(held.run.space), held.run.first_page, held.payload)
    }

    fn show(&self) {
        let bytes = |pages: u64| pages.saturating_mul(PAGE_BYTES as u64);
        self.progress.bytes(bytes(self.proof.came), bytes(self.proof.head.pages));
    }

    fn finish(mut self, args: &ExportArgs, pages: u64) -> Result<Exported, Failure> {
        self.proof.check(pages)?;
        let mappings = match args.format {
            ExportFormat::Raw => 0,
            ExportFormat::ElfCore => self.map()?,
        };
        let Export { proof: Proof { head, came, .. }, cpus, draft, .. } = self;
        let files = draft.finish()?;
        let checkpoint = head.checkpoint.unwrap_or_default();
        Ok(Exported {
            checkpoint: checkpoint.id,
            vm: checkpoint.vm,
            format: args.format.word(),
            path: args.out.display().to_string(),
            files,
            ram_bytes: head.config.unwrap_or_default().memory_bytes,
            bytes_written: came * PAGE_BYTES as u64,
            vcpus: cpus.len(),
            kernel_mappings: mappings,
        })
    }

    /// Writes the core's head; how many kernel mappings it has.
    fn map(&mut self) -> Result<usize, Failure> {
        let ram = elf::Ram::new(self.proof.head.config.as_ref().map_or(0, |config| config.memory_bytes));
        let walk = match self.cpus.first() {
            Some(cpu) => paging::kernel(cpu, &ram, |offset, page| self.draft.read(offset, page))?,
            None => paging::Walk::default(),
        };
        if !walk.complete {
            self.progress.note("the guest's page tables have more mappings than a core holds: some are left out");
        }
        self.draft.head(&elf::head(&ram, &walk.runs, &self.cpus))?;
        Ok(walk.runs.len())
    }
}

/// The processors, in order.
fn cpus(sections: &[v1::Section]) -> Result<Vec<CpuState>, Failure> {
    let number = |section: &v1::Section| section.name.strip_prefix("cpu/")?.parse::<u32>().ok();
    let mut found: Vec<_> = sections.iter().filter_map(|section| Some((number(section)?, section))).collect();
    found.sort_by_key(|(number, _)| *number);
    let decode = |(number, section): (u32, &v1::Section)| {
        CpuState::from_bytes(&section.body)
            .map_err(|e| Failure::new(Code::Corrupt, format!("the state of processor {number} does not decode: {e}")))
    };
    found.into_iter().map(decode).collect()
}

/// What was exported.
#[derive(Debug, Serialize)]
struct Exported {
    checkpoint: String,
    vm: String,
    format: &'static str,
    path: String,
    /// Names below `path`; empty for one file.
    files: Vec<String>,
    ram_bytes: u64,
    /// Without zeros.
    bytes_written: u64,
    vcpus: usize,
    kernel_mappings: usize,
}

impl Report for Exported {
    fn text(&self) -> Text {
        let shown = match self.files.is_empty() {
            true => format!("{} processors, {} kernel mappings", self.vcpus, self.kernel_mappings),
            false => self.files.join(", "),
        };
        Text::fields([
            ("checkpoint", format!("{} of {}", self.checkpoint, self.vm)),
            ("path", Path::new(&self.path).display().to_string()),
            ("format", format!("{}: {shown}", self.format)),
            ("ram", show_bytes(self.ram_bytes)),
            ("written", format!("{} (zeros are holes)", show_bytes(self.bytes_written))),
        ])
    }
}

#[cfg(test)]
mod tests {
    use proto::digest::machine_digest;
    use proto::frame::{self, Encoding, PageRun};

    use super::*;
    use crate::ingest::digest::{PageDigests, state_digest};

    const PAGES: u64 = 512;

    fn page(number: u64) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        page[..8].copy_from_slice(&(number + 1).to_le_bytes());
        page
    }

    fn frame(first_page: u64, pages: u64, space: u16) -> Vec<u8> {
        let mut frame = PageRun { first_page, pages: pages as u32, space, encoding: Encoding::Raw }.begin();
        (first_page..first_page + pages).for_each(|number| frame.extend_from_slice(&page(number)));
        frame::seal(&mut frame);
        frame
    }

    /// Of a guest of 2 MiB with pages 3 to 9, and no disk.
    fn head() -> v1::ExportHead {
        let cpu = v1::Section { name: "cpu/0".into(), body: CpuState::reset().to_bytes(), ..Default::default() };
        let mut digests = PageDigests::new(PAGES);
        (3..10).for_each(|number| digests.set(number, proto::leaf::leaf(&page(number))));
        let digest = machine_digest(digests.root(), state_digest(std::slice::from_ref(&cpu)), &[]);
        let checkpoint = v1::CheckpointRecord { digest: Some(digest), ..Default::default() };
        let config = v1::MachineConfig { memory_bytes: PAGES * PAGE_BYTES as u64, ..Default::default() };
        v1::ExportHead { checkpoint: Some(checkpoint), config: Some(config), sections: vec![cpu], pages: 7 }
    }

    struct Folder(std::path::PathBuf);

    impl Folder {
        fn new(test: &str) -> Folder {
            let path = std::env::temp_dir().join(format!("godwit-export-{test}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Folder(path)
        }

        fn args(&self, format: ExportFormat) -> ExportArgs {
            ExportArgs { name: "vm1".into(), format, out: self.0.join("out") }
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn what_is_proved_gets_its_name() {
        let folder = Folder::new("proved");
        for (format, at) in [(ExportFormat::ElfCore, elf::DATA_AT), (ExportFormat::Raw, 0)] {
            let args = folder.args(format);
            let mut export = Export::begin(&args, head(), "export vm1").unwrap();
            export.pages(&frame(6, 4, 0)).unwrap();
            export.pages(&frame(3, 3, 0)).unwrap();
            assert!(!args.out.exists());
            let said = export.finish(&args, 7).unwrap();
            assert_eq!((said.bytes_written, said.vcpus), (7 * 4096, 1));
            let file = if at == 0 { args.out.join("ram.raw") } else { args.out.clone() };
            let bytes = std::fs::read(file).unwrap();
            assert_eq!(bytes.len() as u64, at + (2 << 20));
            assert_eq!(bytes[at as usize + 9 * PAGE_BYTES..][..8], 10u64.to_le_bytes());
            let _ = std::fs::remove_file(&args.out).or_else(|_| std::fs::remove_dir_all(&args.out));
        }
    }

    #[test]
    fn what_is_not_the_checkpoint_leaves_nothing() {
        let folder = Folder::new("lies");
        let args = folder.args(ExportFormat::Raw);
        let begin = |head| Export::begin(&args, head, "export vm1").unwrap();
        let mut flipped = frame(3, 7, 0);
        *flipped.last_mut().unwrap() ^= 1;
        for wrong in [flipped, frame(510, 3, 0), frame(u64::MAX - 1, 1, 0), frame(3, 7, 1), b"no frame".to_vec()] {
            assert_eq!(begin(head()).pages(&wrong).unwrap_err().code, Code::Corrupt);
        }
        // Fewer pages, another page, another state.
        let mut export = begin(head());
        export.pages(&frame(3, 6, 0)).unwrap();
        assert_eq!(export.finish(&args, 6).unwrap_err().code, Code::Corrupt);
        let mut export = begin(head());
        export.pages(&frame(4, 7, 0)).unwrap();
        assert!(export.finish(&args, 7).unwrap_err().message.contains("digest"));
        let mut export = begin(head());
        export.proof.head.sections[0].minor = 9;
        export.pages(&frame(3, 7, 0)).unwrap();
        assert!(export.finish(&args, 7).unwrap_err().message.contains("digest"));
        let mut huge = head();
        huge.config = Some(v1::MachineConfig { memory_bytes: u64::MAX, ..Default::default() });
        assert_eq!(Export::begin(&args, huge, "export vm1").err().unwrap().code, Code::Protocol);
        assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 0);
    }
}

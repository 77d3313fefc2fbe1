//! The words of `ctl record` and `ctl replay`: clap's derive over plain values, and nothing else.

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand, ValueEnum};
use proto::v1::JournalFull;

use super::instant::{When, when};

/// `ctl record ...`
#[derive(Subcommand, Debug)]
pub enum RecordCommand {
    /// Record everything that enters a VM from now on, and make a checkpoint to replay from.
    Start(StartArgs),
    /// End a VM's recording; what was recorded stays.
    Stop {
        /// Name of the VM.
        vm: String,
    },
    /// All recordings, or those of one VM: which instants can be visited.
    Ls {
        /// Name of the VM.
        vm: Option<String>,
    },
    /// Remove a recording that has ended.
    Rm {
        /// Name of the VM.
        vm: String,
        /// Id of the recording.
        recording: String,
    },
    /// Write a checkpoint and what entered the VM since into a file that `ctl replay` takes anywhere.
    Export(RecordExportArgs),
}

/// `ctl record start`
#[derive(Args, Debug)]
pub struct StartArgs {
    /// Name of the VM.
    pub vm: String,
    /// What happens when blocks cannot be brought into the bucket and the host has no more room for them.
    #[arg(long, value_enum, default_value_t = WhenFull::Wait)]
    pub when_full: WhenFull,
}

/// What is done when there is no more room.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum WhenFull {
    /// The guest waits.
    Wait,
    /// The recording ends.
    End,
}

impl From<WhenFull> for JournalFull {
    fn from(when: WhenFull) -> JournalFull {
        match when {
            WhenFull::Wait => JournalFull::Wait,
            WhenFull::End => JournalFull::End,
        }
    }
}

/// `ctl record export`
#[derive(Args, Debug)]
pub struct RecordExportArgs {
    /// Name of the VM.
    pub vm: String,
    /// Begin with the newest checkpoint at or before this: RFC 3339, 12:03:55.250, or -30s [default: the newest one].
    #[arg(long, value_parser = when, value_name = "TIME", allow_hyphen_values = true)]
    pub at: Option<When>,
    /// Begin with this checkpoint.
    #[arg(long, value_name = "ID", conflicts_with = "at", value_parser = NonEmptyStringValueParser::new())]
    pub from_checkpoint: Option<String>,
    /// End there [default: with the last block].
    #[arg(long, value_parser = when, value_name = "TIME", allow_hyphen_values = true)]
    pub until: Option<When>,
    /// File to make; it must not be there yet.
    #[arg(long, value_name = "FILE.gwr")]
    pub out: PathBuf,
}

/// `ctl replay`
#[derive(Args, Debug)]
pub struct ReplayArgs {
    /// A VM, or a file that `ctl record export` wrote.
    #[arg(value_name = "VM|FILE.gwr")]
    pub what: String,
    /// Go to this instant: RFC 3339, 12:03:55.250 (the last one), or -30s.
    #[arg(long, value_parser = when, value_name = "TIME", allow_hyphen_values = true)]
    pub at: Option<When>,
    /// Go to this instruction of the machine's life.
    #[arg(long, value_name = "N", conflicts_with = "at")]
    pub to_instruction: Option<u64>,
    /// Wait there for gdb.
    #[arg(long, value_name = "ADDR")]
    pub gdb: Option<String>,
    /// Replay at full speed and say whether all digests are the same.
    #[arg(long)]
    pub check: bool,
    /// Say which instruction wrote there last.
    #[arg(long, value_name = "ADDR|SYMBOL")]
    pub last_write: Option<String>,
    /// How many bytes there.
    #[arg(long, value_name = "BYTES", requires = "last_write")]
    pub length: Option<u64>,
    /// Print what the guest had said until that instant.
    #[arg(long)]
    pub console: bool,
    /// The guest's kernel with its symbols.
    #[arg(long, value_name = "VMLINUX")]
    pub symbols: Option<PathBuf>,
    /// A file of the same recording that is known to be good: name the first instruction that goes otherwise.
    #[arg(long, value_name = "GOOD.gwr", conflicts_with = "flip")]
    pub against: Option<PathBuf>,
    /// Flip this bit of RAM in the checkpoint first, to see what comes of it.
    #[arg(long, value_name = "GPA:BIT")]
    pub flip: Option<String>,
}

//! The words of the command line: clap's derive over plain values, and nothing else.
//!
//! The words are a contract: options may be added, never renamed. Sizes and times go through [`super::units`].

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::failure::EXIT_CODES;
use super::output::Format;
use super::policy::words::PolicyCommand;
use super::recording::instant::{When, when};
use super::recording::words::{RecordCommand, ReplayArgs};
use super::units;

/// Operates a Godwit cluster: machines that keep running while hosts come and go.
#[derive(Parser, Debug)]
#[command(name = "ctl", version, after_help = EXIT_CODES, propagate_version = true)]
pub struct Cli {
    /// How results are printed.
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    pub output: Format,
    /// Names the cluster: a ctl.toml with the controller's address and this operator's certificate.
    #[arg(long, global = true, env = "GODWIT_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(subcommand)]
    #[allow(missing_docs, reason = "the subcommand")]
    pub command: Command,
}

/// What is to be done.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// A whole cluster on this machine, for trying and testing.
    #[command(subcommand)]
    Dev(DevCommand),
    /// Hosts of the cluster.
    #[command(subcommand)]
    Host(HostCommand),
    /// Virtual machines.
    #[command(subcommand)]
    Vm(VmCommand),
    /// Move a running VM to another host.
    Migrate(MigrateArgs),
    /// Checkpoints of VMs in the bucket.
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Checkpoints by the clock: when they are made, and which are kept.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Bring a VM back from a checkpoint, or as it was at any instant that was recorded.
    Restore(RestoreArgs),
    /// Recordings of VMs: everything that entered them, so that any instant can be visited.
    #[command(subcommand)]
    Record(RecordCommand),
    /// Go through a recording again, here: under gdb, to an instant, or as a check.
    Replay(ReplayArgs),
    /// The keys under which checkpoints are sealed.
    #[command(subcommand)]
    Key(KeyCommand),
    /// Virtual machine control blocks, decoded.
    #[command(subcommand)]
    Vmcb(VmcbCommand),
    /// Print any frame, section, manifest or pack.
    Inspect(InspectArgs),
    /// What happened, from the ledger.
    Events(EventsArgs),
    /// Hosts and guests, and how fast each guest goes, again and again.
    Top(TopArgs),
}

/// `ctl dev ...`
#[derive(Subcommand, Debug)]
pub enum DevCommand {
    /// Start a controller and hosts hostA, hostB, ...; what runs already is left alone.
    Up(DevUpArgs),
    /// End all of them and every guest; the state stays for the next `up`.
    Down(DevDownArgs),
    /// Begins a session of its own and becomes a daemon of the dev cluster.
    #[command(hide = true)]
    Launch(LaunchArgs),
}

/// `ctl dev up`
#[derive(Args, Debug)]
pub struct DevUpArgs {
    /// Directory of the cluster; made when there is none.
    #[arg(long)]
    pub dir: PathBuf,
    /// How many hosts there are to be [default: as many as there were, at first 2].
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=26))]
    pub hosts: Option<u8>,
    /// Which engines the hosts offer [default: as before, at first auto].
    #[arg(long, value_enum)]
    pub engine: Option<EngineChoice>,
    /// Where checkpoints go: file:DIR or s3://BUCKET/PREFIX?endpoint=URL [default: a directory of the cluster].
    #[arg(long, value_name = "URL")]
    pub bucket: Option<String>,
    /// Where the ledger is [default: a file of the cluster].
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
}

/// `ctl dev down`
#[derive(Args, Debug)]
pub struct DevDownArgs {
    /// Directory of the cluster.
    #[arg(long)]
    pub dir: PathBuf,
}

/// `ctl dev launch PROGRAM ARGS`
#[derive(Args, Debug)]
pub struct LaunchArgs {
    /// Program and arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<std::ffi::OsString>,
}

/// Engines of a dev cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum EngineChoice {
    /// What the machine has.
    Auto,
    /// The software engine alone.
    Soft,
    /// Hardware SVM through Linux KVM.
    Kvm,
}

impl EngineChoice {
    /// The word in configurations.
    pub fn word(self) -> &'static str {
        match self {
            EngineChoice::Auto => "auto",
            EngineChoice::Soft => "soft",
            EngineChoice::Kvm => "kvm",
        }
    }
}

/// `ctl host ...`
#[derive(Subcommand, Debug)]
pub enum HostCommand {
    /// All hosts.
    Ls,
    /// One host: what its engines can give a guest, and the VMs that it reports.
    Show {
        /// Its name.
        host: String,
    },
    /// What two hosts differ in, by bit and name: what a guest of one could miss on the other.
    Compare {
        /// A host.
        a: String,
        /// Another.
        b: String,
    },
    /// Which CPU models every one of some hosts can run, engine by engine: what a guest may be that is to go to any of them.
    Baseline {
        /// The hosts; all that are up if none is named.
        hosts: Vec<String>,
    },
}

/// A VM's name.
#[derive(Args, Debug)]
pub struct VmArg {
    /// Name of the VM.
    pub vm: String,
}

/// `ctl vm ...`
#[derive(Subcommand, Debug)]
pub enum VmCommand {
    /// Create a VM and start it.
    Create(VmCreateArgs),
    /// All VMs.
    Ls,
    /// One VM.
    Show(VmArg),
    /// Attach to the serial console; Ctrl-] detaches.
    ///
    /// Stays attached while the VM migrates. Ends when the VM stops. With input from a pipe, the end of the input does not
    /// end the output.
    Console(ConsoleArgs),
    /// Let gdb stop it, look at it, change it: `target remote` at the address that is printed.
    ///
    /// The guest stands still while gdb has stopped it, and goes on as it was when gdb has gone, however that was.
    ///
    /// What gdb writes is recorded, if the VM is. Whoever reaches the address has all of the guest's memory.
    Gdb(GdbArgs),
    /// Stop it between two instructions.
    Pause(VmArg),
    /// Let it go on.
    Resume(VmArg),
    /// End the guest; what it is made of stays.
    Stop(VmArg),
    /// End the guest and remove it; its checkpoints stay.
    Rm(VmArg),
}

/// `ctl vm create`
#[derive(Args, Debug)]
pub struct VmCreateArgs {
    /// Name of the new VM.
    pub name: String,
    /// Host that is to run it.
    #[arg(long)]
    pub host: String,
    /// Guest RAM, a multiple of 2M, for example 512M.
    #[arg(long, value_parser = units::size, value_name = "SIZE")]
    pub memory: u64,
    /// Processors.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub vcpus: u32,
    /// Linux bzImage, or an ELF kernel with a PVH note.
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, default_value = "console=ttyS0", value_name = "TEXT")]
    pub cmdline: String,
    /// A disk: an image that travels with the VM, or, `shared`, one that every host reaches under this path.
    #[arg(long = "disk", value_name = "PATH[,shared][,ro]")]
    pub disks: Vec<String>,
    /// A network card on host device T; an empty T is a card without a cable.
    #[arg(long = "net", value_name = "tap=T[,mac=M]")]
    pub nets: Vec<String>,
    /// CPU contract: what the guest may count on wherever it will run [default: soft-v1; on kvm the richest of the host].
    #[arg(long, value_name = "MODEL")]
    pub cpu: Option<String>,
    /// Engine: soft or kvm.
    #[arg(long, default_value = "soft")]
    pub engine: String,
    /// Skip idle time at once instead of following the host's clock.
    #[arg(long)]
    pub unpaced: bool,
    /// What happens to the guest when its host loses every controller.
    #[arg(long, value_enum, default_value_t = Isolation::Pause)]
    pub on_isolation: Isolation,
}

/// What a host does that is cut off.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Isolation {
    /// Pauses the guest before its lease ends.
    Pause,
    /// Lets it run; it is then never started elsewhere by itself.
    KeepRunning,
}

/// `ctl vm console`
#[derive(Args, Debug)]
pub struct ConsoleArgs {
    /// Name of the VM.
    pub vm: String,
    /// Print what it has said, and end.
    #[arg(long)]
    pub log: bool,
}

/// `ctl vm gdb`
#[derive(Args, Debug)]
pub struct GdbArgs {
    /// Name of the VM.
    pub vm: String,
    /// Where gdb is waited for; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:1234", value_name = "ADDR:PORT")]
    pub listen: SocketAddr,
}

/// `ctl migrate`
#[derive(Args, Debug)]
pub struct MigrateArgs {
    /// Name of the VM.
    pub vm: String,
    /// Target host.
    #[arg(long, value_name = "HOST")]
    pub to: String,
    /// Straight from host to host, or through the controller where they cannot reach each other.
    #[arg(long, value_enum, default_value_t = Via::Direct)]
    pub via: Via,
    /// Engine that it goes on with there: soft or kvm [default: the one that it has].
    #[arg(long, value_name = "ENGINE")]
    pub engine: Option<String>,
    /// Longest pause of the guest to aim at.
    #[arg(long, default_value = "30ms", value_parser = units::duration, value_name = "TIME")]
    pub downtime: Duration,
    /// Most bytes a second, for example 1G [default: no limit].
    #[arg(long, value_parser = units::size, value_name = "SIZE")]
    pub bandwidth: Option<u64>,
    /// What both sides compare before the hand-over: the digest kept while streaming, or every page again.
    #[arg(long, value_enum, default_value_t = Verify::Stream)]
    pub verify: Verify,
    /// Most that the guest may be slowed down while it dirties memory faster than it can be sent, in percent; 0: never.
    #[arg(long, default_value_t = 99, value_parser = clap::value_parser!(u32).range(0..=99), value_name = "PERCENT")]
    pub throttle: u32,
    /// Check everything that can be checked and say what would be done; move nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// Which way the bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Via {
    /// From host to host.
    Direct,
    /// Relayed.
    Controller,
}

/// How thoroughly the copy is proved.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Verify {
    /// The digest kept while streaming.
    Stream,
    /// Every page again.
    Full,
}

/// `ctl checkpoint ...`
#[derive(Subcommand, Debug)]
pub enum CheckpointCommand {
    /// Write a VM into the bucket while it runs. Kept until `rm`, whatever the VM's policy says.
    Create(CheckpointCreateArgs),
    /// All checkpoints, or those of one VM.
    Ls {
        /// Name of the VM.
        vm: Option<String>,
    },
    /// One checkpoint.
    Show {
        /// Its id.
        id: String,
    },
    /// Read a checkpoint back and check every byte.
    Verify(VerifyArgs),
    /// Remove a checkpoint.
    Rm {
        /// Its id.
        id: String,
    },
    /// Write a checkpoint into files that other tools read.
    Export(ExportArgs),
    /// Restore a checkpoint under another name without a network, wait for a sign of life, report, and destroy it again.
    Drill(DrillArgs),
    /// Remove packs that no checkpoint needs, and rewrite those that are mostly dead. The controller does it by itself, too.
    Sweep {
        /// Name of the VM [default: all].
        vm: Option<String>,
        /// Say what would be done; change nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Remove what a VM's policy does not keep, now.
    Prune {
        /// Name of the VM.
        vm: String,
        /// Say what would be removed; remove nothing.
        #[arg(long)]
        dry_run: bool,
    },
}

/// `ctl checkpoint create`
#[derive(Args, Debug)]
pub struct CheckpointCreateArgs {
    /// Name of the VM.
    pub vm: String,
    /// As if the VM's policy had made it: the policy may remove it.
    #[arg(long)]
    pub policy: bool,
}

/// `ctl checkpoint export`
#[derive(Args, Debug)]
pub struct ExportArgs {
    /// The id of a checkpoint, or a VM (its newest one).
    #[arg(value_name = "ID|VM")]
    pub name: String,
    /// What is written.
    #[arg(long, value_enum)]
    pub format: ExportFormat,
    /// File (elf-core) or folder (raw) to make; it must not be there yet.
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
}

/// What an export is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum ExportFormat {
    /// RAM and processors as an ELF core, with the kernel's own addresses: `gdb vmlinux PATH`.
    ElfCore,
    /// A folder with ram.raw and a diskN.raw for each local disk.
    Raw,
}

impl ExportFormat {
    /// The word on the command line.
    pub fn word(self) -> &'static str {
        match self {
            ExportFormat::ElfCore => "elf-core",
            ExportFormat::Raw => "raw",
        }
    }
}

/// `ctl checkpoint drill`
#[derive(Args, Debug)]
pub struct DrillArgs {
    /// A checkpoint, or a VM: its newest one.
    #[arg(value_name = "ID|VM")]
    pub id: String,
    /// Host that is to run it [default: of those that can, the one with the most memory free].
    #[arg(long, value_name = "HOST")]
    pub to: Option<String>,
    /// What its console must say [default: that it runs is enough].
    #[arg(long, value_name = "PATTERN")]
    pub expect: Option<String>,
    /// How long the sign of life is waited for.
    #[arg(long, default_value = "60s", value_parser = units::duration, value_name = "TIME")]
    pub timeout: Duration,
}

/// `ctl checkpoint verify`
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub struct VerifyArgs {
    /// Its id.
    pub id: Option<String>,
    /// All that there are.
    #[arg(long)]
    pub all: bool,
}

/// `ctl restore`
#[derive(Args, Debug)]
pub struct RestoreArgs {
    /// A VM (its newest checkpoint) or the id of a checkpoint.
    #[arg(value_name = "VM|ID", required_unless_present = "all", conflicts_with = "all")]
    pub name: Option<String>,
    /// Every VM of the bucket that this cluster does not have.
    #[arg(long, requires = "from", conflicts_with_all = ["to", "as_name"])]
    pub all: bool,
    /// Look there first for checkpoints that this cluster has never seen: its own bucket, or another one, whose are copied.
    #[arg(long, value_name = "URL")]
    pub from: Option<String>,
    /// Host that is to run it [default: of those that can, the one with the most memory free].
    #[arg(long, value_name = "HOST")]
    pub to: Option<String>,
    /// Let the guest run at once; its pages come while it runs, those that it touches first.
    #[arg(long)]
    pub lazy: bool,
    /// As it was then, by its recording: RFC 3339, 12:03:55.250 (the last one), or -30s.
    #[arg(long, value_parser = when, value_name = "TIME", allow_hyphen_values = true, conflicts_with_all = ["lazy", "all"])]
    pub at: Option<When>,
    /// Make a new VM of this name and leave the old one alone.
    #[arg(long = "as", value_name = "NAME")]
    pub as_name: Option<String>,
}

/// `ctl key ...`
#[derive(Subcommand, Debug)]
pub enum KeyCommand {
    /// Print the cluster keys: keep them in a safe. They and the bucket are all that a recovery needs.
    Export,
    /// Add the keys of an export to those of this cluster.
    Import {
        /// What `ctl key export` printed; `-` is standard input.
        file: std::path::PathBuf,
    },
    /// Make a new cluster key and wrap the key of every VM by it; keep a new export afterwards.
    Rotate,
}

/// `ctl vmcb ...`
#[derive(Subcommand, Debug)]
pub enum VmcbCommand {
    /// Every field of a VMCB.
    Show {
        /// A VM, a checkpoint, or a file of 4096 bytes.
        #[arg(value_name = "VM|ID|FILE")]
        name: String,
        /// Which processor.
        #[arg(long, default_value_t = 0, value_name = "N")]
        vcpu: usize,
    },
    /// The fields in which two VMCBs differ.
    Diff {
        /// A VM, a checkpoint, or a file of 4096 bytes.
        a: String,
        /// A VM, a checkpoint, or a file of 4096 bytes.
        b: String,
        /// Which processor.
        #[arg(long, default_value_t = 0, value_name = "N")]
        vcpu: usize,
    },
}

/// `ctl inspect`
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// A file of frames, or the id of a checkpoint.
    #[arg(value_name = "FILE|ID")]
    pub what: String,
    /// An export of the cluster keys: a file of a bucket's directory is shown opened.
    #[arg(long, value_name = "FILE")]
    pub keys: Option<std::path::PathBuf>,
}

/// `ctl events`
#[derive(Args, Debug)]
pub struct EventsArgs {
    /// Wait for more.
    #[arg(short, long)]
    pub follow: bool,
    /// Only of this VM.
    #[arg(long)]
    pub vm: Option<String>,
    /// Only this sequence number and later.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub since: u64,
}

/// `ctl top`
#[derive(Args, Debug)]
pub struct TopArgs {
    /// Time between two looks. Hosts report every two seconds or so.
    #[arg(long, default_value = "2s", value_parser = units::duration, value_name = "TIME")]
    pub interval: Duration,
    /// End after so many looks [default: go on for ever].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub count: Option<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_grammar_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_help_page_explains_every_word() {
        fn look(command: &mut clap::Command, path: &str, missing: &mut Vec<String>) {
            let path = format!("{path} {}", command.get_name());
            if command.get_about().is_none() {
                missing.push(path.clone());
            }
            for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
                if argument.get_help().is_none() {
                    missing.push(format!("{path} {}", argument.get_id()));
                }
            }
            for line in command.render_long_help().to_string().lines() {
                if line.chars().count() > 140 {
                    missing.push(format!("{path}: a long line: {line}"));
                }
            }
            command.get_subcommands_mut().filter(|sub| !sub.is_hide_set()).for_each(|sub| look(sub, &path, missing));
        }
        let mut missing = Vec::new();
        let mut cli = Cli::command();
        cli.build();
        look(&mut cli, "", &mut missing);
        assert_eq!(missing, Vec::<String>::new());
    }

    #[test]
    fn the_words_of_the_contract_are_understood() {
        for line in [
            "ctl dev up --dir D --hosts 2 --engine soft --bucket file:///b --store redb:///s",
            "ctl dev down --dir D",
            "ctl host ls -o json",
            "ctl host show hostA",
            "ctl host compare hostA hostB -o json",
            "ctl host baseline hostA hostB hostC -o json",
            "ctl vm create vm1 --host hostA --memory 512M --vcpus 1 --kernel K --initrd I --cmdline quiet --disk d.img,ro \
             --disk /s,shared --net tap=t0,mac=02:00:00:00:00:01 --cpu soft-v1 --engine soft --unpaced",
            "ctl vm ls",
            "ctl vm show vm1 -o yaml",
            "ctl vm console vm1 --log",
            "ctl vm gdb vm1",
            "ctl vm gdb vm1 --listen [::1]:0",
            "ctl vm pause vm1",
            "ctl vm resume vm1",
            "ctl vm stop vm1",
            "ctl vm rm vm1",
            "ctl migrate vm1 --to hostB --via controller --downtime 30ms --bandwidth 1G --verify full --throttle 50 --engine kvm --dry-run",
            "ctl checkpoint create vm1",
            "ctl checkpoint ls",
            "ctl checkpoint ls vm1",
            "ctl checkpoint show 00",
            "ctl checkpoint verify 00",
            "ctl checkpoint verify --all",
            "ctl checkpoint rm 00",
            "ctl checkpoint create vm1 --policy",
            "ctl checkpoint prune vm1 --dry-run",
            "ctl checkpoint drill 00 --to hostB --expect login: --timeout 30s",
            "ctl policy set vm1 --every 5m --verify-every 1d --drill-every 7d",
            "ctl checkpoint sweep",
            "ctl checkpoint sweep vm1 --dry-run",
            "ctl policy set vm1 --every 5m --keep-last 12 --keep-hourly 24 --keep-daily 14 --keep-weekly 8 --keep-monthly 12",
            "ctl policy set vm1 --every 1h --jitter 5m --window 22:00-06:00 --window 12:00-13:00 --zone Europe/Berlin",
            "ctl policy ls",
            "ctl policy ls vm1",
            "ctl policy rm vm1",
            "ctl policy simulate vm1 --for 90d",
            "ctl policy simulate --every 5m --keep-last 12 --keep-daily 14",
            "ctl restore vm1 --to hostB --as vm2",
            "ctl restore vm1",
            "ctl restore vm1 --at 12:03:55.250 --to hostB --as vm2",
            "ctl record start vm1 --when-full end",
            "ctl record stop vm1",
            "ctl record ls -o json",
            "ctl record ls vm1",
            "ctl record rm vm1 00",
            "ctl record export vm1 --at -30s --until 12:03:55 --out vm1.gwr",
            "ctl record export vm1 --from-checkpoint 00 --out vm1.gwr",
            "ctl replay vm1 --at 2026-11-23T12:03:50Z --gdb 127.0.0.1:1234 --symbols vmlinux",
            "ctl replay vm1.gwr --to-instruction 5 --check --flip 1000:3",
            "ctl replay vm1 --last-write jiffies",
            "ctl vmcb show vm1 --vcpu 0",
            "ctl vmcb diff a b",
            "ctl inspect file",
            "ctl events -f",
            "ctl top",
            "ctl top --interval 1s --count 3 -o json",
        ] {
            if let Err(error) = Cli::try_parse_from(line.split_whitespace()) {
                panic!("{line}\n{error}");
            }
        }
    }

    #[test]
    fn wrong_words_are_bad_input() {
        for line in [
            "ctl",
            "ctl migrate vm1",
            "ctl migrate vm1 --to hostB --downtime 30",
            "ctl vm create vm1 --host hostA --memory 1GB --kernel K",
            "ctl checkpoint verify",
            "ctl checkpoint verify 00 --all",
            "ctl dev up --dir D --hosts 0",
            "ctl policy set vm1",
            "ctl policy set vm1 --every 5m --window 22-06",
            "ctl policy simulate",
            "ctl policy simulate vm1 --every 5m",
            "ctl policy simulate vm1 --keep-last 5",
            "ctl vm gdb vm1 --listen 1234",
            "ctl record export vm1",
            "ctl record start vm1 --when-full never",
            "ctl replay vm1 --at noon",
            "ctl replay vm1 --at 12:00:00 --to-instruction 5",
            "ctl restore vm1 --at 12:00:00 --lazy",
        ] {
            let error = Cli::try_parse_from(line.split_whitespace()).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}

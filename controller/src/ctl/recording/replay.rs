//! `ctl replay`: fetches what is to be replayed, if it is no file yet, and runs `vm-replay` on it.
//!
//! `vm-replay` lies beside ctl. It has this terminal: what it prints and how it ends is what ctl prints and how ctl ends. What was
//! fetched lies in a directory that nobody else can read, and is gone afterwards: it is all of a guest's memory.

use std::ffi::OsString;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use proto::status::Code;
use proto::v1;
use proto::v1::recorded_instant::At;

use super::file;
use super::words::ReplayArgs;
use crate::ctl::client::Client;
use crate::ctl::failure::Failure;
use crate::ctl::interrupts::Interrupts;

/// The program that replays.
const PROGRAM: &str = "vm-replay";

/// Whether no cluster is asked.
pub fn is_file(args: &ReplayArgs) -> bool {
    Path::new(&args.what).is_file()
}

/// Replays; the exit code is that of `vm-replay`.
///
/// # Errors
/// What the controller says, or that there is no such program.
pub async fn run(client: Option<Client>, args: &ReplayArgs) -> Result<ExitCode, Failure> {
    let program = program()?;
    let at_ns = args.at.as_ref().map(|when| when.here()).transpose()?;
    let Some(mut client) = client else { return replay(&program, Path::new(&args.what), args, at_ns).await };
    let private = Private::new()?;
    let path = private.0.join("recording.gwr");
    let doing = format!("fetch the recording of {}", args.what);
    let at = at_ns.map(At::UnixNs).or(args.to_instruction.map(At::Instruction));
    let request = v1::ExportRecordingRequest {
        name: args.what.clone(),
        at: at.map(|at| v1::RecordedInstant { at: Some(at) }),
        until: None,
    };
    let mut interrupts = Interrupts::listen()?;
    tokio::select! {
        written = file::write(&mut client, request, &doing, &path) => drop(written?),
        () = interrupts.next() => return Err(Failure::new(Code::Cancelled, format!("{doing}: cancelled"))),
    }
    replay(&program, &path, args, at_ns).await
}

/// Runs the program to its end. Ctrl-C is its own to hear, since it has the terminal; ctl waits for it and cleans up.
async fn replay(program: &Path, file: &Path, args: &ReplayArgs, at_ns: Option<u64>) -> Result<ExitCode, Failure> {
    let mut interrupts = Interrupts::listen()?;
    let mut command = tokio::process::Command::new(program);
    command.args(arguments(file, args, at_ns)).kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| Failure::file("run", program, &error))?;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status.map_err(|error| Failure::file("wait for", program, &error))?,
            () = interrupts.next() => {}
        }
    };
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

/// The words for the program: ctl's own, but for the instant, which depends on the clock and the zone here.
fn arguments(file: &Path, args: &ReplayArgs, at_ns: Option<u64>) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec![file.into()];
    let mut option = |name: &str, value: Option<OsString>| {
        if let Some(value) = value {
            words.extend([OsString::from(name), value]);
        }
    };
    option("--at-unix-ns", at_ns.map(|ns| ns.to_string().into()));
    option("--to-instruction", args.to_instruction.map(|count| count.to_string().into()));
    option("--gdb", args.gdb.clone().map(OsString::from));
    option("--last-write", args.last_write.clone().map(OsString::from));
    option("--length", args.length.map(|bytes| bytes.to_string().into()));
    option("--symbols", args.symbols.clone().map(PathBuf::into_os_string));
    option("--against", args.against.clone().map(PathBuf::into_os_string));
    option("--flip", args.flip.clone().map(OsString::from));
    let flags = [("--check", args.check), ("--console", args.console)];
    words.extend(flags.into_iter().filter(|(_, given)| *given).map(|(name, _)| OsString::from(name)));
    words
}

fn program() -> Result<PathBuf, Failure> {
    let exe = std::env::current_exe()
        .map_err(|e| Failure::new(Code::Internal, format!("cannot tell where ctl itself is: {e}")))?;
    let program = exe.with_file_name(PROGRAM);
    if program.is_file() {
        return Ok(program);
    }
    let text = format!("there is no program {PROGRAM} beside ctl in {}", exe.with_file_name("").display());
    Err(Failure::new(Code::NotFound, text).hint("`cargo build --workspace` makes all of them"))
}

/// A directory of our own that goes with this.
struct Private(PathBuf);

impl Private {
    fn new() -> Result<Private, Failure> {
        let name = format!("godwit-replay-{}", crate::ctl::report::hex(&crate::entropy::bytes::<8>()));
        let path = std::env::temp_dir().join(name);
        DirBuilder::new().mode(0o700).create(&path).map_err(|error| Failure::file("make", &path, &error))?;
        Ok(Private(path))
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("{} is left behind: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use clap::Parser as _;

    use super::*;
    use crate::ctl::grammar::{Cli, Command};

    fn args(line: &str) -> ReplayArgs {
        match Cli::try_parse_from(line.split_whitespace()).unwrap().command {
            Command::Replay(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_program_gets_ctls_words_with_the_instant_as_a_number() {
        let args = args(
            "ctl replay vm1 --at -30s --gdb 127.0.0.1:1 --check --last-write jiffies --symbols vmlinux --flip 0x1000:3",
        );
        let words = arguments(Path::new("/f.gwr"), &args, Some(17));
        let words: Vec<_> = words.iter().map(|word| word.to_str().unwrap()).collect();
        let line =
            "/f.gwr --at-unix-ns 17 --gdb 127.0.0.1:1 --last-write jiffies --symbols vmlinux --flip 0x1000:3 --check";
        assert_eq!(words.join(" "), line);
        let args = self::args("ctl replay bad.gwr --check --against good.gwr");
        let words = arguments(Path::new("bad.gwr"), &args, None);
        assert_eq!(words, ["bad.gwr", "--against", "good.gwr", "--check"].map(OsString::from));
    }

    #[test]
    fn a_checkpoint_without_a_name_is_refused_where_it_is_typed() {
        let words = ["ctl", "record", "export", "vm1", "--from-checkpoint", "", "--out", "f.gwr"];
        let refused = Cli::try_parse_from(words).err().unwrap().to_string();
        assert!(refused.contains("--from-checkpoint"), "{refused}");
    }

    #[tokio::test]
    async fn how_the_program_ends_is_how_ctl_ends() {
        let private = Private::new().unwrap();
        let folder = private.0.clone();
        assert_eq!(std::fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
        let program = folder.join("program");
        // Prints nothing, ends with the number that follows --to-instruction, or by a signal.
        let script = "#!/bin/sh\n[ \"$3\" = 9 ] && kill -9 $$\nexit \"$3\"\n";
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
        for (count, code) in [(0, 0), (3, 3), (9, 137)] {
            let args = args(&format!("ctl replay f --to-instruction {count}"));
            let ended = replay(&program, Path::new("f"), &args, None).await.unwrap();
            assert_eq!(ended, ExitCode::from(code), "{count}");
        }
        drop(private);
        assert!(!folder.exists());
    }
}

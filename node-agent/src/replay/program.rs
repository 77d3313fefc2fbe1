//! `vm-replay FILE`: what is asked of a recording, in order. Answers go to standard output, the last line of a check or a
//! comparison is its verdict; what is odd goes to standard error. It refuses to know how any of it is found out.

use std::io::{self, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use vmcb_engine::replay::{Player, Spacing, Timeline};

use super::file::{self, Bit, Recording};
use super::gdb;
use super::history::History;
use super::instant::{instant, parse_number};
use super::symbols::Symbols;
use super::verdict::Verdict;
use super::{flip, verdict};
use crate::vm::actor::chain;

/// Longest file of symbols.
const SYMBOL_FILE_BYTES_MAX: u64 = 4 << 30;
/// Bytes that are asked for where nobody says how many.
const BYTES: u64 = 8;

/// Goes through a recording again: any instant of a VM, under a debugger, forwards and backwards.
#[derive(Parser, Debug)]
#[command(version)]
pub struct Arguments {
    /// The recording's file.
    file: PathBuf,
    /// Go to this instant: nanoseconds since 1970 by the recording host's clock. Without any instant: to the end.
    #[arg(long, value_name = "NS", conflicts_with = "to_instruction")]
    at_unix_ns: Option<u64>,
    /// Go to the instant after so many instructions.
    #[arg(long, value_name = "N")]
    to_instruction: Option<u64>,
    /// Serve gdb at this address, from that instant on.
    #[arg(long, value_name = "HOST:PORT")]
    gdb: Option<String>,
    /// Replay everything and compare; the last line is "same" or says what differs, and where.
    #[arg(long, conflicts_with_all = ["gdb", "last_write", "console"])]
    check: bool,
    /// A file of the same recording that is known to be good: name the first instruction that goes otherwise in FILE.
    #[arg(long, value_name = "GOOD", conflicts_with_all = ["gdb", "last_write", "console", "flip"])]
    against: Option<PathBuf>,
    /// Which instruction wrote there last before that instant: an address (0x...) or a symbol.
    #[arg(long, value_name = "ADDRESS|SYMBOL")]
    last_write: Option<String>,
    /// How many bytes `--last-write` asks for.
    #[arg(long, value_name = "BYTES", requires = "last_write")]
    length: Option<u64>,
    /// An ELF file with symbols, such as a vmlinux.
    #[arg(long, value_name = "VMLINUX")]
    symbols: Option<PathBuf>,
    /// Flip one bit of RAM at the beginning and find the first thing that differs; with --check also the first probe.
    #[arg(long, value_name = "GPA:BIT", value_parser = parse_bit, conflicts_with_all = ["gdb", "last_write", "console"])]
    flip: Option<Bit>,
    /// What the guest had said until that instant.
    #[arg(long)]
    console: bool,
}

fn parse_bit(text: &str) -> Result<Bit, String> {
    let wrong = || format!("{text:?} is not GPA:BIT, such as 0x1234:0");
    let (gpa, bit) = text.split_once(':').ok_or_else(wrong)?;
    let bit: u8 = bit.parse().ok().filter(|bit| *bit < 8).ok_or_else(wrong)?;
    Ok(Bit { gpa: parse_number(gpa).ok_or_else(wrong)?, bit })
}

/// Does what is asked.
pub fn run(arguments: &Arguments) -> ExitCode {
    match answer(arguments, &mut io::stdout().lock()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("vm-replay: {why}");
            ExitCode::from(2)
        }
    }
}

/// True if the answer is a good one.
fn answer(arguments: &Arguments, out: &mut dyn Write) -> Result<bool, String> {
    let symbols = arguments.symbols.as_ref().map(read_symbols).transpose()?;
    let Recording { player, checkpoint, warnings } = opened(&arguments.file, arguments.flip)?;
    warnings.iter().for_each(|warning| eprintln!("vm-replay: warning: {warning}"));
    let tape = player.tape();
    say(out, &format!("recording of {} on checkpoint {}", checkpoint.vm, checkpoint.id))?;
    say(out, &format!("from {}", instant(tape, tape.start())))?;
    say(out, &format!("to   {}", instant(tape, tape.end())))?;
    if !tape.ended().is_empty() {
        say(out, &format!("it ended there: {}", tape.ended()))?;
    }
    // The other one of a comparison, and what values of this one are called there.
    let beside = match (arguments.flip, &arguments.against) {
        (Some(_), _) => Some((&arguments.file, "with the bit flipped")),
        (None, Some(good)) => Some((good, "in this file")),
        (None, None) => None,
    };
    match beside {
        Some((good, with)) => {
            if arguments.check {
                check(player, out)?;
            }
            compare(good, arguments, with, symbols.as_ref(), out)
        }
        None if arguments.check => match check(player, out)? {
            Verdict::Same { .. } => Ok(true),
            Verdict::Diverged { mismatch, last_good, .. } => {
                let player = opened(&arguments.file, None)?.player;
                let lines = verdict::closer(player, last_good, &mismatch, symbols.as_ref()).map_err(|e| chain(&e))?;
                lines.iter().try_for_each(|line| say(out, line))?;
                Ok(false)
            }
        },
        None => {
            let timeline = Timeline::new(player, Spacing::default()).map_err(|e| chain(&e))?;
            visit(arguments, History::new(timeline, symbols), out)
        }
    }
}

fn opened(path: &Path, flip: Option<Bit>) -> Result<Recording, String> {
    file::open(path, flip).map_err(|e| chain(&e))
}

fn check(mut player: Player, out: &mut dyn Write) -> Result<Verdict, String> {
    let verdict = verdict::check(&mut player).map_err(|e| chain(&e))?;
    verdict.lines().iter().try_for_each(|line| say(out, line))?;
    Ok(verdict)
}

/// The file, with its bit flipped if one is to be, beside another one of the same recording.
fn compare(
    good: &Path,
    arguments: &Arguments,
    with: &str,
    symbols: Option<&Symbols>,
    out: &mut dyn Write,
) -> Result<bool, String> {
    let ours = opened(good, None)?.player;
    let theirs = opened(&arguments.file, arguments.flip)?.player;
    let (a, b) = (ours.tape(), theirs.tape());
    let differing = a.entries().iter().zip(b.entries()).find(|(a, b)| a != b);
    if a.start() != b.start() || differing.is_some() {
        let at = differing.map_or(a.start(), |(a, _)| a.position);
        return Err(format!("{}: this is another recording: other things happened at {at}", good.display()));
    }
    let found = flip::consequence(ours, theirs, with, symbols).map_err(|e| chain(&e))?;
    found.lines.iter().try_for_each(|line| say(out, line))?;
    Ok(!found.differs)
}

/// Goes to the instant and answers there.
fn visit(arguments: &Arguments, mut history: History, out: &mut dyn Write) -> Result<bool, String> {
    let end = history.timeline().player().tape().end();
    match (arguments.at_unix_ns, arguments.to_instruction) {
        (Some(ns), _) => history.goto_time(ns)?,
        (None, Some(instruction)) => history.goto_instruction(instruction)?,
        (None, None) => history.goto_position(end)?,
    }
    say(out, &format!("now at {}", history.now()))?;
    let mut good = true;
    if let Some(what) = &arguments.last_write {
        let (address, bytes) = history.address(what)?;
        let bytes = arguments.length.or(bytes).unwrap_or(BYTES);
        let report = history.last_write(address, bytes, &mut || false)?;
        report.lines.iter().try_for_each(|line| say(out, line))?;
        good = report.found;
    }
    if arguments.console {
        say(out, &history.console())?;
    }
    if let Some(address) = &arguments.gdb {
        let bind = |e: io::Error| format!("{address}: {e}: give --gdb a free address, such as 127.0.0.1:0");
        let listener = TcpListener::bind(address).map_err(bind)?;
        let local = listener.local_addr().map_err(bind)?;
        say(out, &format!("gdb: target remote {local}"))?;
        let mut told = |text: &str| eprintln!("vm-replay: {text}");
        gdb::serve(&mut history, &listener, &mut told).map_err(bind)?;
    }
    Ok(good)
}

fn say(out: &mut dyn Write, line: &str) -> Result<(), String> {
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(|e| format!("standard output: {e}"))
}

fn read_symbols(path: &PathBuf) -> Result<Symbols, String> {
    let failed = |e: io::Error| format!("{}: {e}", path.display());
    let bytes = std::fs::metadata(path).map_err(failed)?.len();
    if bytes > SYMBOL_FILE_BYTES_MAX {
        return Err(format!("{}: {bytes} bytes are no file of symbols", path.display()));
    }
    let file = std::fs::read(path).map_err(failed)?;
    Symbols::parse(&file).ok_or_else(|| format!("{}: no 64-bit ELF file with symbols", path.display()))
}

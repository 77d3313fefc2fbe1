//! A timeline as gdb and its `monitor` see it. Nothing of a recording can be changed: what is written would be another
//! history. It refuses to know gdb's packets and files.

use vmcb_engine::cpu::CpuState;
use vmcb_engine::engine::{Stops, Why};
use vmcb_engine::journal::Position;
use vmcb_engine::replay::{Arrival, Hit, LastWrite, Timeline, TimelineError, Written};

use super::gdb::{DebugError, Debuggee, Halt, Motion};
use super::instant::{self, disassembled, dump, instant, parse_number, parse_time, place, value};
use super::symbols::Symbols;
use crate::vm::actor::chain;

/// Longest range that `monitor physical` and `monitor last-write` take.
const BYTES_MAX: u64 = 4096;
const HELP: &str = "position                      where the present is, and between what
time                          what time it was
goto INSTRUCTION|@UNIXTIME    go there; then: maintenance flush register-cache
console                       what the guest had said
last-write ADDRESS|SYMBOL [BYTES]   who wrote there last before now
physical ADDRESS [BYTES]      guest-physical memory
why                           why a write was refused";
const REFUSED: &str = "a recording cannot be changed: what was written would be another history";

/// A recording with a present.
#[derive(Debug)]
pub struct History {
    timeline: Timeline,
    symbols: Option<Symbols>,
    stops: Stops,
    current: usize,
}

/// What wrote somewhere last, for people and programs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// One line each.
    pub lines: Vec<String>,
    /// Somebody wrote there.
    pub found: bool,
}

fn never() -> bool {
    false
}

impl History {
    /// Of a timeline.
    pub fn new(timeline: Timeline, symbols: Option<Symbols>) -> Self {
        let current = timeline.player().machine().current_vcpu();
        Self { timeline, symbols, stops: Stops::default(), current }
    }

    /// The timeline.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// The present, for people.
    pub fn now(&self) -> String {
        self.at(self.timeline.position())
    }

    fn at(&self, position: Position) -> String {
        instant(self.timeline.player().tape(), position)
    }

    /// What can be visited, for people.
    pub fn span(&self) -> String {
        let end = self.timeline.player().tape().end();
        format!("from {}\nto   {}", self.at(self.timeline.start()), self.at(end))
    }

    /// Goes to `INSTRUCTION` or `@UNIXTIME`.
    ///
    /// # Errors
    /// No such instant, for people.
    pub fn goto(&mut self, to: &str) -> Result<(), String> {
        match to.strip_prefix('@') {
            Some(time) => {
                let ns = parse_time(time).ok_or_else(|| format!("{time:?} is no time: seconds since 1970, or ns"))?;
                self.goto_time(ns)
            }
            None => {
                let instruction = parse_number(to).ok_or_else(|| format!("{to:?} is no instruction's number"))?;
                self.goto_instruction(instruction)
            }
        }
    }

    /// Goes to the instant after so many instructions.
    ///
    /// # Errors
    /// It was not recorded, for people.
    pub fn goto_instruction(&mut self, retired: u64) -> Result<(), String> {
        let (start, end) = (self.timeline.start(), self.timeline.player().tape().end());
        if !(start.retired..=end.retired).contains(&retired) {
            return Err(format!("instruction {retired} was not recorded; what was:\n{}", self.span()));
        }
        let position = Position { retired, skipped_tsc: 0 }.max(start);
        self.goto_position(position)
    }

    /// Goes to a position of the recording.
    ///
    /// # Errors
    /// The replay fails, for people.
    pub fn goto_position(&mut self, position: Position) -> Result<(), String> {
        self.timeline.seek(position, &mut never).map(drop).map_err(|e| chain(&e))
    }

    /// Goes to the instant at which the recording host's clock said this.
    ///
    /// # Errors
    /// It was not recorded, for people.
    pub fn goto_time(&mut self, ns: u64) -> Result<(), String> {
        let tsc = self.timeline.player().tape().tsc_at(ns);
        let outside = || format!("{} was not recorded; what was:\n{}", instant::clock(ns), self.span());
        let tsc = tsc.ok_or_else(outside)?;
        self.timeline.seek_tsc(tsc, &mut never).map_err(|e| chain(&e))?;
        Ok(())
    }

    /// Address and length of what somebody names: a number, or a symbol.
    ///
    /// # Errors
    /// Neither, for people.
    pub fn address(&self, text: &str) -> Result<(u64, Option<u64>), String> {
        if let Some(address) = parse_number(text) {
            return Ok((address, None));
        }
        let symbols =
            self.symbols.as_ref().ok_or_else(|| format!("{text:?} is no address, and no symbols were given"))?;
        let (address, bytes) = symbols.address(text).ok_or_else(|| format!("there is no symbol {text:?}"))?;
        Ok((address, (bytes > 0).then_some(bytes)))
    }

    /// Who wrote to a linear address last before now; the present stays.
    ///
    /// # Errors
    /// It is not mapped, or the replay fails; for people.
    pub fn last_write(
        &mut self,
        address: u64,
        bytes: u64,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<Report, String> {
        if !(1..=BYTES_MAX).contains(&bytes) || address % 4096 + bytes > 4096 {
            return Err(format!("{bytes} bytes at {address:#x}: at least one, and all in one page"));
        }
        let now = self.timeline.position();
        let gpa = self.timeline.player().machine().translate(self.current, address);
        let gpa = gpa.ok_or_else(|| format!("{address:#x} is not mapped at {}", self.now()))?;
        let found = self.timeline.last_write(gpa, bytes as usize, interrupted).map_err(|e| chain(&e))?;
        let mut lines =
            vec![format!("{address:#x} (guest-physical {gpa:#x}, {bytes} bytes), before {}:", self.at(now))];
        let by = matches!(found, LastWrite::By(_));
        match found {
            LastWrite::By(written) => lines.extend(self.written(&written)),
            LastWrite::Nobody => lines.push(format!("nobody wrote there since {}", self.at(self.timeline.start()))),
            LastWrite::Interrupted => lines.push("interrupted".to_owned()),
        }
        self.timeline.seek(now, &mut never).map_err(|e| chain(&e))?;
        Ok(Report { lines, found: by })
    }

    /// The present is just before the write.
    fn written(&self, written: &Written) -> Vec<String> {
        let Written { vcpu, old, new } = written;
        let machine = self.timeline.player().machine();
        let mut lines = vec![format!("written at {}", self.now())];
        match vcpu {
            Some(vcpu) => {
                lines.push(format!("by vCPU {vcpu}, {}", place(machine, *vcpu, self.symbols.as_ref())));
                lines.push(format!("   {}", disassembled(machine, *vcpu)));
            }
            None => lines.push("by a device, or by what entered from outside".to_owned()),
        }
        lines.push(format!("{} became {}", value(old), value(new)));
        lines
    }

    /// What the guest had said until now.
    pub fn console(&self) -> String {
        instant::console(self.timeline.player().console(), self.timeline.position())
    }

    fn physical(&self, address: u64, bytes: u64) -> Result<String, String> {
        if !(1..=BYTES_MAX).contains(&bytes) {
            return Err(format!("{bytes} bytes: 1 to {BYTES_MAX}"));
        }
        let mut contents = vec![0; bytes as usize];
        let read = self.timeline.player().machine().memory().read(address, &mut contents);
        read.map_err(|e| e.to_string())?;
        Ok(dump(address, &contents))
    }

    fn answer(&mut self, command: &str) -> Result<String, String> {
        let words: Vec<&str> = command.split_whitespace().collect();
        let number = |text: &str| parse_number(text).ok_or_else(|| format!("{text:?} is no number"));
        match words[..] {
            ["position"] => Ok(format!("{}, vCPU {}\n{}", self.now(), self.current, self.span())),
            ["time"] => {
                let machine = self.timeline.player().machine();
                let ns = self.timeline.player().tape().realtime_ns(machine.tsc());
                Ok(format!("{} ({ns} ns since 1970), TSC {}", instant::clock(ns), machine.tsc()))
            }
            ["goto", to] => {
                self.goto(to)?;
                Ok(format!("{}\nnow: maintenance flush register-cache", self.now()))
            }
            ["console"] => Ok(self.console()),
            ["last-write", at] => {
                let (address, bytes) = self.address(at)?;
                Ok(self
                    .last_write(address, bytes.unwrap_or(8).min(4096 - address % 4096), &mut never)?
                    .lines
                    .join("\n"))
            }
            ["last-write", at, bytes] => {
                let address = self.address(at)?.0;
                Ok(self.last_write(address, number(bytes)?, &mut never)?.lines.join("\n"))
            }
            ["physical", at] => self.physical(number(at)?, 64),
            ["physical", at, bytes] => self.physical(number(at)?, number(bytes)?),
            _ => Ok(HELP.to_owned()),
        }
    }

    fn arrived(&mut self, arrival: Arrival) -> Halt {
        match arrival {
            Arrival::Reached => Halt::Stepped,
            Arrival::Hit(Hit { vcpu, why }) => {
                self.current = vcpu;
                match why {
                    Why::Breakpoint { .. } => Halt::Instruction(vcpu),
                    Why::Watchpoint { watched, .. } => Halt::Watched { vcpu, watched },
                }
            }
            Arrival::Start => Halt::Beginning,
            Arrival::End => Halt::End,
            Arrival::Interrupted => Halt::Interrupted,
        }
    }
}

impl Debuggee for History {
    fn vcpus(&self) -> usize {
        self.timeline.player().machine().config().vcpus as usize
    }

    fn current(&self) -> usize {
        self.current
    }

    fn cpu(&mut self, vcpu: usize) -> Result<CpuState, DebugError> {
        Ok(self.timeline.player().machine().peek_cpu(vcpu).unwrap_or_default())
    }

    fn read(&mut self, vcpu: usize, address: u64, into: &mut [u8]) -> usize {
        self.timeline.player().machine().read_linear(vcpu, address, into)
    }

    fn write(&mut self, _vcpu: usize, _address: u64, _from: &[u8]) -> Result<(), String> {
        Err(REFUSED.to_owned())
    }

    fn set_cpu(&mut self, _vcpu: usize, _state: &CpuState) -> Result<(), String> {
        Err(REFUSED.to_owned())
    }

    fn set_stops(&mut self, stops: &Stops) -> Result<(), DebugError> {
        self.stops = stops.clone();
        Ok(())
    }

    fn reversible(&self) -> bool {
        true
    }

    fn resume(&mut self, motion: Motion, interrupted: &mut dyn FnMut() -> bool) -> Result<Halt, DebugError> {
        if let Motion::Step(vcpu) | Motion::StepBack(vcpu) = motion {
            if vcpu >= self.vcpus() {
                return Err(DebugError(format!("there is no vCPU {vcpu}")));
            }
            self.current = vcpu;
        }
        let stops = self.stops.clone();
        let arrival = match motion {
            Motion::Forward => self.timeline.continue_to(&stops, interrupted),
            Motion::Step(vcpu) => self.timeline.step(vcpu, &stops, interrupted),
            Motion::Backward => self.timeline.reverse_continue(&stops, interrupted),
            Motion::StepBack(vcpu) => self.timeline.reverse_step(vcpu, interrupted),
        };
        match arrival {
            Ok(arrival) => Ok(self.arrived(arrival)),
            Err(error) => Err(failed(&error)),
        }
    }

    fn monitor(&mut self, command: &str) -> String {
        self.answer(command).unwrap_or_else(|why| why)
    }
}

fn failed(error: &TimelineError) -> DebugError {
    DebugError(chain(error))
}

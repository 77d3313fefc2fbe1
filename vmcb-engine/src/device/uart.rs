//! A serial port as in the PC: 16550A. The line is infinitely fast: what is written is out at once, and the transmitter
//! is always empty. What arrives waits in a bounded queue until the guest reads it, and what does not fit there waits behind
//! it, on the line: both are state, so that nothing typed is lost when the machine moves.
//!
//! This file refuses to know who is at the other end. Output that the host has not fetched yet is no state of the guest's.

use std::collections::VecDeque;

use super::{Unfit, narrow};

/// Most input that the port holds for the guest.
pub const INPUT_BYTES_MAX: usize = 4096;
/// Most input that waits behind it.
pub const WAITING_BYTES_MAX: usize = 64 << 10;

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMITTER: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_ALL: u8 = 0x0f;
const LCR_DIVISOR: u8 = 1 << 7;
const MCR_ALL: u8 = 0x1f;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;
const LSR_RECEIVED: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_TRANSMITTER: u8 = 0x60;
const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVED: u8 = 1 << 1;
const IIR_NONE: u8 = 0x01;
const IIR_TRANSMITTER: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_FIFO: u8 = 0xc0;

/// One serial port.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Uart {
    interrupt_enable: u8,
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    divisor: u16,
    received: VecDeque<u8>,
    waiting: VecDeque<u8>,
    overrun: bool,
    transmitter_empty_interrupt: bool,
    output: Vec<u8>,
}

impl Uart {
    /// A port after power-up.
    pub fn new() -> Self {
        Self { divisor: 12, ..Self::default() }
    }

    /// Reads register 0 to 7.
    pub fn read(&mut self, register: u16) -> u8 {
        let divisor = self.line_control & LCR_DIVISOR != 0;
        match register {
            0 if divisor => self.divisor as u8,
            0 => self.receive(),
            1 if divisor => (self.divisor >> 8) as u8,
            1 => self.interrupt_enable,
            2 => self.identify_interrupt(),
            3 => self.line_control,
            4 => self.modem_control,
            5 => self.line_status(),
            6 => self.modem_status(),
            7 => self.scratch,
            _ => 0xff,
        }
    }

    /// Writes register 0 to 7.
    pub fn write(&mut self, register: u16, value: u8) {
        let divisor = self.line_control & LCR_DIVISOR != 0;
        match register {
            0 if divisor => self.divisor = self.divisor & 0xff00 | u16::from(value),
            0 => self.transmit(value),
            1 if divisor => self.divisor = self.divisor & 0xff | u16::from(value) << 8,
            1 => self.enable_interrupts(value & IER_ALL),
            2 => {
                let toggled = (value ^ self.fifo_control) & FCR_ENABLE != 0;
                if toggled || value & FCR_CLEAR_RECEIVED != 0 {
                    self.received.clear();
                    self.refill();
                }
                self.fifo_control = value & (FCR_ENABLE | 0xc0);
            }
            3 => self.line_control = value,
            4 => {
                self.modem_control = value & MCR_ALL;
                self.refill();
            }
            7 => self.scratch = value,
            _ => {}
        }
    }

    fn receive(&mut self) -> u8 {
        let value = self.received.pop_front().unwrap_or(0);
        self.refill();
        value
    }

    fn refill(&mut self) {
        if self.modem_control & MCR_LOOP != 0 {
            return;
        }
        let room = INPUT_BYTES_MAX - self.received.len();
        self.received.extend(self.waiting.drain(..room.min(self.waiting.len())));
    }

    /// The state after a reset of the machine. What waits on the line and output that nobody has fetched stay.
    pub fn reset(&mut self) {
        let (mut waiting, output) = (std::mem::take(&mut self.received), std::mem::take(&mut self.output));
        waiting.append(&mut self.waiting);
        *self = Self { waiting, output, ..Self::new() };
        self.refill();
    }

    fn transmit(&mut self, value: u8) {
        if self.modem_control & MCR_LOOP != 0 {
            self.arrive(value);
        } else {
            self.output.push(value);
        }
        self.transmitter_empty_interrupt = true;
    }

    fn arrive(&mut self, value: u8) {
        if self.received.len() < INPUT_BYTES_MAX {
            self.received.push_back(value);
        } else {
            self.overrun = true;
        }
    }

    fn enable_interrupts(&mut self, value: u8) {
        if value & !self.interrupt_enable & IER_TRANSMITTER != 0 {
            self.transmitter_empty_interrupt = true;
        }
        self.interrupt_enable = value;
    }

    /// The interrupt of highest priority, in the form of register 2.
    fn cause(&self) -> u8 {
        let enabled = |bit| self.interrupt_enable & bit != 0;
        if enabled(IER_LINE) && self.overrun {
            IIR_LINE
        } else if enabled(IER_RECEIVED) && !self.received.is_empty() {
            IIR_RECEIVED
        } else if enabled(IER_TRANSMITTER) && self.transmitter_empty_interrupt {
            IIR_TRANSMITTER
        } else {
            IIR_NONE
        }
    }

    fn identify_interrupt(&mut self) -> u8 {
        let cause = self.cause();
        if cause == IIR_TRANSMITTER {
            self.transmitter_empty_interrupt = false;
        }
        if self.fifo_control & FCR_ENABLE != 0 { cause | IIR_FIFO } else { cause }
    }

    fn line_status(&mut self) -> u8 {
        let received = if self.received.is_empty() { 0 } else { LSR_RECEIVED };
        let overrun = if std::mem::take(&mut self.overrun) { LSR_OVERRUN } else { 0 };
        LSR_TRANSMITTER | received | overrun
    }

    /// Somebody is at the other end: DCD, DSR and CTS; in the loop the port talks to itself.
    fn modem_status(&self) -> u8 {
        if self.modem_control & MCR_LOOP == 0 {
            return 0xb0;
        }
        let control = self.modem_control;
        (control & 0x0c) << 4 | (control & 1) << 5 | (control & 2) << 3
    }

    /// True while the port pulls its interrupt line (OUT2 is the gate, as in the PC).
    #[inline]
    pub fn interrupt(&self) -> bool {
        self.modem_control & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2 && self.cause() != IIR_NONE
    }

    /// How many bytes of input fit now.
    pub fn input_room(&self) -> usize {
        let held = if self.modem_control & MCR_LOOP == 0 { self.received.len() } else { INPUT_BYTES_MAX };
        INPUT_BYTES_MAX - held + WAITING_BYTES_MAX - self.waiting.len()
    }

    /// Input from the host; returns how many bytes fit.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let fit = bytes.len().min(self.input_room());
        self.waiting.extend(&bytes[..fit]);
        self.refill();
        fit
    }

    /// Everything that the guest has written since the last call.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Whether there is any.
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }
}

mod saved {
    use proto::v1::UartV1;

    use super::*;

    impl Uart {
        /// The saved form.
        pub fn save(&self) -> UartV1 {
            let Uart {
                interrupt_enable,
                fifo_control,
                line_control,
                modem_control,
                scratch,
                divisor,
                received,
                waiting,
                overrun,
                transmitter_empty_interrupt,
                output: _,
            } = self;
            UartV1 {
                interrupt_enable: (*interrupt_enable).into(),
                fifo_control: (*fifo_control).into(),
                line_control: (*line_control).into(),
                modem_control: (*modem_control).into(),
                scratch: (*scratch).into(),
                divisor: (*divisor).into(),
                received: received.iter().copied().collect(),
                overrun: *overrun,
                transmitter_empty_interrupt: *transmitter_empty_interrupt,
                waiting: waiting.iter().copied().collect(),
            }
        }

        /// The port in a saved state, with no output waiting.
        ///
        /// # Errors
        /// A field that no port could hold.
        pub fn restore(saved: &UartV1) -> Result<Uart, Unfit> {
            let interrupt_enable = narrow("interrupt_enable", saved.interrupt_enable)?;
            Unfit::check(interrupt_enable & !IER_ALL == 0, "interrupt_enable", interrupt_enable, "four bits")?;
            let fifo_control = narrow("fifo_control", saved.fifo_control)?;
            Unfit::check(fifo_control & !0xc1 == 0, "fifo_control", fifo_control, "enable and trigger bits")?;
            let modem_control = narrow("modem_control", saved.modem_control)?;
            Unfit::check(modem_control & !MCR_ALL == 0, "modem_control", modem_control, "five bits")?;
            let (held, waiting) = (saved.received.len(), saved.waiting.len());
            Unfit::check(held <= INPUT_BYTES_MAX, "received", held, "at most 4096 bytes")?;
            Unfit::check(waiting <= WAITING_BYTES_MAX, "waiting", waiting, "at most 65536 bytes")?;
            let closed = held == INPUT_BYTES_MAX || modem_control & MCR_LOOP != 0;
            Unfit::check(waiting == 0 || closed, "waiting", waiting, "none while the port has room")?;
            Ok(Uart {
                interrupt_enable,
                fifo_control,
                line_control: narrow("line_control", saved.line_control)?,
                modem_control,
                scratch: narrow("scratch", saved.scratch)?,
                divisor: narrow("divisor", saved.divisor)?,
                received: saved.received.iter().copied().collect(),
                waiting: saved.waiting.iter().copied().collect(),
                overrun: saved.overrun,
                transmitter_empty_interrupt: saved.transmitter_empty_interrupt,
                output: Vec::new(),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn open() -> Uart {
        let mut uart = Uart::new();
        uart.write(2, 0xc7);
        uart.write(4, 0x0b);
        uart
    }

    #[test]
    fn a_driver_recognises_a_16550a() {
        let mut uart = Uart::new();
        uart.write(1, 0);
        assert_eq!(uart.read(1), 0);
        uart.write(1, 0xff);
        assert_eq!(uart.read(1), 0x0f);
        uart.write(4, 0x1a);
        assert_eq!(uart.read(6) & 0xf0, 0x90, "loop test");
        uart.write(4, 0);
        uart.write(2, 1);
        assert_eq!(uart.read(2) & 0xc0, 0xc0);
        uart.write(7, 0x5a);
        assert_eq!(uart.read(7), 0x5a);
        uart.write(3, 0x80);
        uart.write(0, 1);
        uart.write(1, 0);
        assert_eq!((uart.read(0), uart.read(1)), (1, 0));
    }

    #[test]
    fn output_is_out_at_once_and_raises_an_edge_each_time() {
        let mut uart = open();
        uart.write(1, 2);
        assert!(uart.interrupt(), "enabling with an empty transmitter interrupts");
        assert_eq!(uart.read(2), 0xc2);
        assert!(!uart.interrupt(), "identifying it lets the line fall");
        uart.write(0, b'g');
        assert!(uart.interrupt());
        assert_eq!(uart.read(5), 0x60);
        uart.write(1, 0);
        assert!(!uart.interrupt());
        assert_eq!(uart.take_output(), b"g");
        assert_eq!(uart.take_output(), b"");
    }

    #[test]
    fn input_interrupts_until_it_is_read() {
        let mut uart = open();
        uart.write(1, 5);
        assert_eq!(uart.input(b"ab"), 2);
        assert!(uart.interrupt());
        assert_eq!((uart.read(2), uart.read(5)), (0xc4, 0x61));
        assert_eq!((uart.read(0), uart.read(0)), (b'a', b'b'));
        assert_eq!((uart.interrupt(), uart.read(2)), (false, 0xc1));
    }

    #[test]
    fn input_is_bounded() {
        let mut uart = open();
        assert_eq!(uart.input(&[7; INPUT_BYTES_MAX + 9]), INPUT_BYTES_MAX + 9);
        assert_eq!(uart.save().received.len(), INPUT_BYTES_MAX);
        assert_eq!(uart.input(&[8; WAITING_BYTES_MAX]), WAITING_BYTES_MAX - 9);
        assert_eq!((uart.input(b"x"), uart.input_room()), (0, 0));
    }

    #[test]
    fn what_waits_behind_the_port_comes_in_order_whatever_the_guest_does_to_it() {
        let mut uart = open();
        let line: Vec<u8> = (0..INPUT_BYTES_MAX + 300).map(|n| (n % 251) as u8).collect();
        assert_eq!(uart.input(&line), line.len());
        let mut uart = Uart::restore(&uart.save()).unwrap();
        let read: Vec<u8> = (0..200).map(|_| uart.read(0)).collect();
        assert_eq!(read, line[..200]);
        uart.write(2, 0x03);
        // Clearing drops what the port held, as in the chip; what was on the line arrives now.
        let read: Vec<u8> = (0..100).map(|_| uart.read(0)).collect();
        assert_eq!(read, line[INPUT_BYTES_MAX + 200..]);
        assert_eq!(uart.read(5) & 1, 0);
        uart.write(4, 0x10);
        assert_eq!(uart.input(b"later"), 5);
        uart.write(0, b'L');
        assert_eq!((uart.read(0), uart.read(5) & 1), (b'L', 0), "in its loop the port hears itself alone");
        uart.reset();
        assert_eq!(uart.save().received, b"later");
    }

    #[test]
    fn without_out2_the_line_stays_low() {
        let mut uart = Uart::new();
        uart.write(1, 1);
        uart.input(b"a");
        assert!(!uart.interrupt());
        uart.write(4, 8);
        assert!(uart.interrupt());
    }

    proptest! {
        #[test]
        fn any_history_survives_saving(steps in proptest::collection::vec((0u16..10, any::<u8>()), 0..80)) {
            let mut uart = Uart::new();
            for (what, value) in steps {
                match what {
                    0..8 => uart.write(what, value),
                    8 => { let _ = uart.read(value.into()); }
                    _ => { uart.input(&[value; 9]); }
                }
            }
            uart.take_output();
            prop_assert_eq!(Uart::restore(&uart.save()), Ok(uart));
        }
    }

    #[test]
    fn hostile_saved_forms_are_refused_by_name() {
        let good = Uart::new().save();
        let field = |saved| Uart::restore(&saved).unwrap_err().field;
        assert_eq!(field(proto::v1::UartV1 { interrupt_enable: 16, ..good.clone() }), "interrupt_enable");
        assert_eq!(field(proto::v1::UartV1 { fifo_control: 2, ..good.clone() }), "fifo_control");
        assert_eq!(field(proto::v1::UartV1 { modem_control: 32, ..good.clone() }), "modem_control");
        assert_eq!(field(proto::v1::UartV1 { divisor: 65536, ..good.clone() }), "divisor");
        assert_eq!(field(proto::v1::UartV1 { received: vec![0; INPUT_BYTES_MAX + 1], ..good.clone() }), "received");
        let full = proto::v1::UartV1 { received: vec![0; INPUT_BYTES_MAX], ..good.clone() };
        assert_eq!(field(proto::v1::UartV1 { waiting: vec![0; WAITING_BYTES_MAX + 1], ..full }), "waiting");
        assert_eq!(field(proto::v1::UartV1 { waiting: vec![0], ..good }), "waiting");
    }
}

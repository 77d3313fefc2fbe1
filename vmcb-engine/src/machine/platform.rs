//! The devices as an engine sees them: [`Platform`] over the bus.

use crate::device::bus::Bus;
use crate::device::lapic;
use crate::engine::{Platform, Request};

impl Platform for Bus {
    fn io_read(&mut self, tsc: u64, port: u16, size: u8) -> u32 {
        Bus::io_read(self, tsc, port, size)
    }

    fn io_write(&mut self, tsc: u64, port: u16, size: u8, value: u32) {
        Bus::io_write(self, tsc, port, size, value);
    }

    fn mmio_read(&mut self, tsc: u64, gpa: u64, size: u8) -> u64 {
        Bus::mmio_read(self, tsc, gpa, size)
    }

    fn mmio_write(&mut self, tsc: u64, gpa: u64, size: u8, value: u64) {
        Bus::mmio_write(self, tsc, gpa, size, value);
    }

    fn msr_read(&mut self, tsc: u64, vcpu: usize, msr: u32) -> Option<u64> {
        Bus::msr_read(self, tsc, vcpu, msr)
    }

    fn msr_write(&mut self, tsc: u64, vcpu: usize, msr: u32, value: u64) -> Option<()> {
        Bus::msr_write(self, tsc, vcpu, msr, value)
    }

    fn tick(&mut self, tsc: u64) {
        Bus::tick(self, tsc);
    }

    fn next_deadline(&self) -> Option<u64> {
        Bus::next_deadline(self)
    }

    fn pending_interrupt(&mut self, vcpu: usize) -> Option<u8> {
        Bus::pending_interrupt(self, vcpu)
    }

    fn acknowledge(&mut self, vcpu: usize, vector: u8) {
        Bus::acknowledge(self, vcpu, vector);
    }

    fn cr8(&self, vcpu: usize) -> u8 {
        Bus::cr8(self, vcpu)
    }

    fn set_cr8(&mut self, vcpu: usize, value: u8) {
        Bus::set_cr8(self, vcpu, value);
    }

    fn has_output(&self) -> bool {
        self.has_console_output()
    }

    fn executing(&mut self, vcpu: usize) {
        Bus::set_vcpu(self, vcpu);
    }

    fn take_request(&mut self, vcpu: usize) -> Option<Request> {
        Bus::take_request(self, vcpu).map(|request| match request {
            lapic::Request::Init => Request::Init,
            lapic::Request::Startup(page) => Request::Startup(page),
            lapic::Request::Nmi => Request::Nmi,
        })
    }

    fn stopped(&self) -> bool {
        Bus::stopped(self).is_some()
    }

    fn take_message(&mut self) -> Option<lapic::Message> {
        Bus::take_message(self)
    }

    fn take_level_messages(&mut self) -> Option<Vec<lapic::Message>> {
        Bus::take_level_messages(self)
    }

    fn end_of_interrupt(&mut self, vector: u8) {
        Bus::end_of_interrupt(self, vector);
    }
}

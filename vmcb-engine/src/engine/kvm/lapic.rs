//! KVM's local APIC and its saved form (KVM API 4.57, 4.58; APM2 chapter 16).
//!
//! The saved form is the platform's: [`LapicV1`], with instants in the machine's TSC. Registers lie in KVM's page as in the xAPIC's.
//! A counting timer runs at 1 GHz in KVM and at the TSC's rate on the software engine: its next instant survives a move
//! between them, and the guest's own counts go on at the engine's rate; guests of our CPU models are given the TSC-deadline
//! mode, which is the same on both. KVM reports no errors in ESR, so none are pending there.

use kvm_bindings::kvm_lapic_state;
use proto::v1::{LapicTimerV1, LapicV1};

use crate::device::lapic::{LVT_WRITABLE, Message, Target, delivery};

/// Offsets in the page (APM2 table 16-2).
mod at {
    pub const ID: usize = 0x20;
    pub const TPR: usize = 0x80;
    pub const LDR: usize = 0xd0;
    pub const DFR: usize = 0xe0;
    pub const SVR: usize = 0xf0;
    pub const ISR: usize = 0x100;
    pub const TMR: usize = 0x180;
    pub const IRR: usize = 0x200;
    pub const ESR: usize = 0x280;
    pub const ICR: usize = 0x300;
    pub const ICR_HIGH: usize = 0x310;
    pub const LVT: usize = 0x320;
    pub const TIMER_INITIAL: usize = 0x380;
    pub const TIMER_CURRENT: usize = 0x390;
    pub const TIMER_DIVIDE: usize = 0x3e0;
}

/// LVT timer bits 18:17 say TSC-deadline.
const MODE: u32 = 0b11 << 17;
const MODE_DEADLINE: u32 = 0b10 << 17;
/// Bits of ICR that are kept: no delivery status, nothing reserved.
const ICR_LOW: u32 = 0x000c_cfff;
/// Of APIC_BASE: address, enable, x2APIC, first processor.
const BASE: u64 = 0x0000_ffff_ffff_fd00;
const SVR: u32 = 0x1ff;
/// Rate of KVM's counting timer.
const KVM_HZ: u64 = 1_000_000_000;

/// What the page does not say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Beside {
    /// APIC_BASE.
    pub base: u64,
    /// The vCPU waits for INIT or a start-up.
    pub dormant: bool,
    /// When the TSC-deadline timer fires, in the machine's TSC; 0 if it is not armed.
    pub deadline: u64,
    /// The machine's TSC now.
    pub now: u64,
    /// Its rate.
    pub tsc_hz: u64,
}

fn register(page: &kvm_lapic_state, offset: usize) -> u32 {
    u32::from_le_bytes([0, 1, 2, 3].map(|byte| page.regs[offset + byte] as u8))
}

fn set_register(page: &mut kvm_lapic_state, offset: usize, value: u32) {
    let place = page.regs[offset..offset + 4].iter_mut();
    place.zip(value.to_le_bytes()).for_each(|(byte, value)| *byte = value as _);
}

/// 256 bits in eight registers, as four words. No vector is below 16.
fn vectors(page: &kvm_lapic_state, offset: usize) -> Vec<u64> {
    let word = |n: usize| {
        let half = |half: usize| u64::from(register(page, offset + 16 * (2 * n + half)));
        half(0) | half(1) << 32
    };
    vec![word(0) & !0xffff, word(1), word(2), word(3)]
}

fn set_vectors(page: &mut kvm_lapic_state, offset: usize, words: &[u64]) {
    for (n, word) in words.iter().take(4).enumerate() {
        set_register(page, offset + 32 * n, *word as u32);
        set_register(page, offset + 32 * n + 16, (word >> 32) as u32);
    }
}

/// log2 of the timer's divisor.
fn shift(divide: u32) -> u32 {
    ((divide & 3 | divide >> 1 & 4) + 1) & 7
}

fn scale(value: u64, times: u64, over: u64) -> u64 {
    u64::try_from(u128::from(value) * u128::from(times) / u128::from(over.max(1))).unwrap_or(u64::MAX)
}

/// The saved form of a page.
pub(super) fn saved(page: &kvm_lapic_state, beside: Beside) -> LapicV1 {
    let lvt: Vec<u32> = (0..6).map(|n| register(page, at::LVT + 16 * n) & LVT_WRITABLE[n]).collect();
    let timer = saved_timer(page, lvt[0] & MODE == MODE_DEADLINE, beside);
    LapicV1 {
        apic_base: beside.base & BASE,
        tpr: register(page, at::TPR) & 0xff,
        ldr: register(page, at::LDR),
        dfr: register(page, at::DFR) | 0x0fff_ffff,
        svr: register(page, at::SVR) & SVR,
        esr: register(page, at::ESR) & 0xff,
        esr_pending: 0,
        icr: u64::from(register(page, at::ICR_HIGH)) << 32 | u64::from(register(page, at::ICR) & ICR_LOW),
        lvt,
        irr: vectors(page, at::IRR),
        isr: vectors(page, at::ISR),
        tmr: vectors(page, at::TMR),
        timer: Some(timer),
        nmi_requested: false,
        init_requested: false,
        sipi_vector: None,
        dormant: beside.dormant,
    }
}

fn saved_timer(page: &kvm_lapic_state, deadline_mode: bool, beside: Beside) -> LapicTimerV1 {
    let divide = register(page, at::TIMER_DIVIDE) & 0xb;
    let initial = register(page, at::TIMER_INITIAL);
    if deadline_mode {
        let deadline = Some(beside.deadline).filter(|deadline| *deadline != 0);
        return LapicTimerV1 { divide, initial, count: 0, start: 0, deadline };
    }
    let left = u64::from(register(page, at::TIMER_CURRENT)) << shift(divide);
    if left == 0 {
        return LapicTimerV1 { divide, initial, ..LapicTimerV1::default() };
    }
    let count = (scale(left, beside.tsc_hz, KVM_HZ) >> shift(divide)).clamp(1, u64::from(u32::MAX)) as u32;
    let deadline = beside.now.saturating_add(u64::from(count) << shift(divide));
    LapicTimerV1 { divide, initial, count, start: beside.now, deadline: Some(deadline) }
}

/// Writes a saved form into the page that KVM has now: its version register is KVM's own.
pub(super) fn load(page: &mut kvm_lapic_state, vcpu: u32, saved: &LapicV1, now: u64, tsc_hz: u64) {
    // Without KVM_CAP_X2APIC_API the id lies in the upper byte in both modes.
    set_register(page, at::ID, vcpu << 24);
    let registers = [
        (at::TPR, saved.tpr),
        (at::LDR, saved.ldr),
        (at::DFR, saved.dfr),
        (at::SVR, saved.svr),
        (at::ESR, saved.esr),
        (at::ICR, saved.icr as u32),
        (at::ICR_HIGH, (saved.icr >> 32) as u32),
    ];
    registers.into_iter().for_each(|(offset, value)| set_register(page, offset, value));
    for (n, entry) in saved.lvt.iter().take(6).enumerate() {
        set_register(page, at::LVT + 16 * n, *entry);
    }
    for (offset, words) in [(at::IRR, &saved.irr), (at::ISR, &saved.isr), (at::TMR, &saved.tmr)] {
        set_vectors(page, offset, words);
    }
    set_timer(page, saved.timer.unwrap_or_default(), now, tsc_hz);
}

/// Writes the timer's registers: what is left of a count at this TSC.
pub(super) fn set_timer(page: &mut kvm_lapic_state, timer: LapicTimerV1, now: u64, tsc_hz: u64) {
    let left = timer.deadline.map_or(0, |deadline| scale(deadline.saturating_sub(now), KVM_HZ, tsc_hz));
    let current = match timer.deadline {
        Some(_) if timer.count != 0 => (left >> shift(timer.divide)).clamp(1, u64::from(u32::MAX)) as u32,
        _ => 0,
    };
    set_register(page, at::TIMER_DIVIDE, timer.divide);
    set_register(page, at::TIMER_INITIAL, timer.initial);
    set_register(page, at::TIMER_CURRENT, current);
}

/// The counting timer of a vCPU that has just left the kernel. What expires from then on the kernel either keeps to itself until
/// the vCPU enters again, so that no state shows it, or it requests the interrupt at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct LeftTimer {
    count: u32,
    requested: bool,
}

impl LeftTimer {
    /// As the page shows it.
    pub(super) fn of(page: &kvm_lapic_state) -> Self {
        let vector = register(page, at::LVT) as usize & 0xff;
        let requested = register(page, at::IRR + 16 * (vector / 32)) >> (vector % 32) & 1 == 1;
        Self { count: register(page, at::TIMER_CURRENT), requested }
    }

    /// Makes the page's timer this one again, unless the page has its interrupt.
    pub(super) fn put_back(self, page: &mut kvm_lapic_state) {
        let delivered = Self::of(page).requested && !self.requested;
        if !delivered {
            set_register(page, at::TIMER_CURRENT, self.count);
        }
    }
}

/// The timer of a saved form, if it counts.
pub(super) fn counting_timer(saved: &LapicV1) -> Option<LapicTimerV1> {
    let counts = saved.lvt.first().is_none_or(|entry| entry & MODE != MODE_DEADLINE);
    saved.timer.filter(|timer| counts && timer.count != 0)
}

/// The instant at which the TSC-deadline timer of a saved form fires; 0 if it is not armed.
pub(super) fn deadline(saved: &LapicV1) -> u64 {
    let in_mode = saved.lvt.first().is_some_and(|entry| entry & MODE == MODE_DEADLINE);
    saved.timer.and_then(|timer| timer.deadline).filter(|_| in_mode).unwrap_or(0)
}

/// What the processor is still asked to do, as messages that ask it again.
pub(super) fn requests(vcpu: usize, saved: &LapicV1) -> Vec<Message> {
    let to = |delivery, vector| Message { vector, delivery, target: Target::Physical(vcpu as u32), level: false };
    let init = saved.init_requested.then(|| to(delivery::INIT, 0));
    let startup = saved.sipi_vector.map(|page| to(delivery::STARTUP, page as u8));
    let nmi = saved.nmi_requested.then(|| to(delivery::NMI, 0));
    [init, startup, nmi].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::lapic::Lapic;

    const TSC_HZ: u64 = 2_500_000_000;

    fn beside(saved: &LapicV1, now: u64) -> Beside {
        let (base, dormant) = (saved.apic_base, saved.dormant);
        Beside { base, dormant, deadline: deadline(saved), now, tsc_hz: TSC_HZ }
    }

    #[test]
    fn what_expires_beside_a_vcpu_that_stands_has_not_expired_unless_it_was_requested() {
        let page = |count: u32, requested: bool| {
            let mut page = kvm_lapic_state::default();
            set_register(&mut page, at::LVT, 0x61);
            set_register(&mut page, at::TIMER_CURRENT, count);
            set_register(&mut page, at::IRR + 16 * 3, u32::from(requested) << 1);
            page
        };
        let found = |left: kvm_lapic_state, mut then: kvm_lapic_state| {
            LeftTimer::of(&left).put_back(&mut then);
            register(&then, at::TIMER_CURRENT)
        };
        assert_eq!(found(page(500, false), page(0, false)), 500, "the kernel keeps it to itself");
        assert_eq!(found(page(500, false), page(0, true)), 0, "it was delivered");
        assert_eq!(found(page(500, true), page(400, true)), 500, "an earlier one still waits");
        assert_eq!(found(page(0, true), page(0, true)), 0, "it does not count");
    }

    fn busy(mode: u32) -> LapicV1 {
        let mut lapic = Lapic::new(1);
        lapic.set_base(0xfee0_0c00).unwrap();
        lapic.write_msr(0, 0x0f, 0x1ff).unwrap();
        lapic.write_msr(0, 0x32, u64::from(mode | 0x40)).unwrap();
        let raise = |vector, level| Message { vector, delivery: delivery::FIXED, target: Target::Physical(1), level };
        for message in [raise(0x31, true), raise(0x85, false), raise(0xff, false)] {
            assert!(lapic.accept(message));
        }
        lapic.acknowledge(0xff);
        lapic.write_msr(0, 0x3e, 0xb).unwrap();
        lapic.write_msr(1000, 0x38, 500_000).unwrap();
        lapic.set_tsc_deadline(1000, 777_777);
        lapic.save()
    }

    #[test]
    fn every_register_survives_and_deadlines_are_the_machines() {
        let before = LapicV1 { init_requested: false, ..busy(MODE_DEADLINE) };
        let mut page = kvm_lapic_state::default();
        load(&mut page, 1, &before, 2000, TSC_HZ);
        assert_eq!((register(&page, at::ID), register(&page, at::IRR + 0x10)), (1 << 24, 1 << 0x11));
        let after = saved(&page, beside(&before, 2000));
        assert_eq!(after, before);
        assert_eq!(after.timer.unwrap().deadline, Some(777_777));
        Lapic::restore(1, &after).unwrap();
    }

    #[test]
    fn a_counting_timer_fires_at_its_instant() {
        let before = busy(0);
        assert_eq!(before.timer.unwrap().deadline, Some(501_000));
        let mut page = kvm_lapic_state::default();
        load(&mut page, 1, &before, 251_000, TSC_HZ);
        assert_eq!(register(&page, at::TIMER_CURRENT), 100_000, "250,000 ticks at 2.5 GHz are 100,000 ns");
        let after = saved(&page, beside(&before, 251_000));
        assert_eq!(after.timer.unwrap().deadline, Some(501_000));
        Lapic::restore(1, &after).unwrap();
    }

    #[test]
    fn requests_are_asked_again() {
        let saved = LapicV1 { init_requested: true, sipi_vector: Some(8), nmi_requested: true, ..busy(0) };
        let asked: Vec<(u8, u8)> = requests(1, &saved).iter().map(|m| (m.delivery, m.vector)).collect();
        assert_eq!(asked, [(delivery::INIT, 0), (delivery::STARTUP, 8), (delivery::NMI, 0)]);
        assert!(requests(0, &busy(0)).is_empty());
    }
}

//! Register-level tests of the local APIC.

use proptest::prelude::*;

use super::*;

fn enabled() -> Lapic {
    let mut lapic = Lapic::new(0);
    lapic.write_page(0, 0xf0, 0x1ff);
    lapic
}

fn enabled_x2() -> Lapic {
    let mut lapic = enabled();
    lapic.set_base(lapic.base() | BASE_X2).unwrap();
    lapic
}

fn fixed(vector: u8, level: bool) -> Message {
    Message { vector, delivery: delivery::FIXED, target: Target::All, level }
}

#[test]
fn power_up_is_the_manuals() {
    let mut lapic = Lapic::new(0);
    assert_eq!(lapic.base(), 0xfee0_0900);
    assert_eq!(lapic.read_page(0, 0x30), 0x0005_0014);
    assert_eq!(lapic.read_page(0, 0xf0), 0xff);
    assert_eq!(lapic.read_page(0, 0xe0), u32::MAX);
    assert!((0x320..=0x370).step_by(16).all(|offset| lapic.read_page(0, offset) == LVT_MASKED));
    assert!(!lapic.accept(fixed(0x40, false)));
}

#[test]
fn priorities_hold_back_what_is_not_above_them() {
    let mut lapic = enabled();
    assert!(lapic.accept(fixed(0x41, false)));
    assert!(lapic.accept(fixed(0x52, false)));
    assert_eq!(lapic.pending(), Some(0x52));
    lapic.acknowledge(0x52);
    assert_eq!(lapic.pending(), None);
    assert_eq!(lapic.read_page(0, 0xa0), 0x50);
    assert!(lapic.accept(fixed(0x5f, false)));
    assert_eq!(lapic.pending(), None, "same class");
    assert_eq!(lapic.write_page(0, 0xb0, 0), Action::None);
    assert_eq!(lapic.pending(), Some(0x5f));
    lapic.set_cr8(5);
    assert_eq!(lapic.pending(), None);
    assert_eq!(lapic.read_page(0, 0x80), 0x50);
    lapic.set_cr8(4);
    assert_eq!(lapic.pending(), Some(0x5f));
}

#[test]
fn the_end_of_a_level_interrupt_is_told() {
    let mut lapic = enabled();
    lapic.accept(fixed(0x61, true));
    lapic.acknowledge(0x61);
    assert_eq!(lapic.write_page(0, 0xb0, 0), Action::EndOfInterrupt(0x61));
    assert_eq!(lapic.write_page(0, 0xb0, 0), Action::None);
}

#[test]
fn timer_interrupts_in_all_three_modes() {
    let mut lapic = enabled();
    lapic.write_page(0, 0x3e0, 0xb);
    lapic.write_page(0, 0x320, 0x2_00ec);
    lapic.write_page(10, 0x380, 100);
    assert_eq!((lapic.deadline(), lapic.read_page(60, 0x390)), (Some(110), 50));
    lapic.tick(110);
    assert_eq!((lapic.pending(), lapic.deadline()), (Some(0xec), Some(210)));
    lapic.acknowledge(0xec);
    lapic.write_page(0, 0xb0, 0);

    lapic.write_page(300, 0x320, 0x4_00ec);
    assert_eq!(lapic.deadline(), None, "a change of mode stops it");
    lapic.set_tsc_deadline(300, 500);
    assert_eq!((lapic.tsc_deadline(), lapic.deadline()), (500, Some(500)));
    lapic.tick(499);
    assert_eq!(lapic.pending(), None);
    lapic.tick(500);
    assert_eq!((lapic.pending(), lapic.tsc_deadline()), (Some(0xec), 0));
    lapic.acknowledge(0xec);
    lapic.write_page(0, 0xb0, 0);
    lapic.set_tsc_deadline(600, 550);
    assert_eq!(lapic.pending(), Some(0xec), "a deadline of the past fires at once");
}

#[test]
fn a_masked_timer_stays_silent() {
    let mut lapic = enabled();
    lapic.write_page(0, 0x3e0, 0xb);
    lapic.write_page(0, 0x320, 0x1_00ec);
    lapic.write_page(0, 0x380, 100);
    lapic.tick(100);
    assert_eq!((lapic.pending(), lapic.deadline()), (None, None));
}

#[test]
fn interrupts_between_processors_are_messages() {
    let mut lapic = enabled();
    lapic.write_page(0, 0x310, 3 << 24);
    let sent = lapic.write_page(0, 0x300, 0x40f1);
    let message = Message { vector: 0xf1, delivery: delivery::FIXED, target: Target::Physical(3), level: false };
    assert_eq!(sent, Action::Send(message));
    assert_eq!(lapic.read_page(0, 0x300), 0x40f1);
    let Action::Send(init) = lapic.write_page(0, 0x300, 0xc_c500) else { panic!() };
    assert_eq!((init.delivery, init.target), (delivery::INIT, Target::Others));
    assert_eq!(lapic.write_page(0, 0x300, 0x8500), Action::None, "de-assert is history");
    assert_eq!(lapic.write_page(0, 0x300, 0x4005), Action::None);
    lapic.write_page(0, 0x280, 0);
    assert_eq!(lapic.read_page(0, 0x280), ERROR_SEND_VECTOR);
}

#[test]
fn a_processor_waits_for_init_and_startup() {
    let mut other = Lapic::new(1);
    let startup = Message { vector: 0x9a, delivery: delivery::STARTUP, target: Target::Physical(1), level: false };
    let init = Message { delivery: delivery::INIT, ..startup };
    assert!(other.accept(init));
    assert!(other.accept(startup));
    assert!(other.has_request());
    assert_eq!(other.take_request(), Some(Request::Init));
    assert_eq!(other.take_request(), Some(Request::Startup(0x9a)));
    assert_eq!(other.take_request(), None);
    assert!(!other.accept(startup), "a running processor ignores start-ups");
    other.accept(Message { delivery: delivery::NMI, ..startup });
    assert_eq!(other.take_request(), Some(Request::Nmi));
}

#[test]
fn x2apic_is_the_msr_view() {
    let mut lapic = Lapic::new(18);
    assert_eq!(lapic.read_msr(0, reg::ID), None);
    lapic.set_base(lapic.base() | BASE_X2).unwrap();
    assert_eq!(lapic.page(), None);
    assert_eq!(lapic.read_msr(0, reg::ID), Some(18));
    assert_eq!(lapic.read_msr(0, reg::LDR), Some(0x1_0004));
    assert_eq!(lapic.write_msr(0, reg::LDR, 1), None);
    assert_eq!(lapic.read_msr(0, reg::DFR), None);
    assert_eq!(lapic.write_msr(0, reg::SVR, 0x1ff), Some(Action::None));
    assert_eq!(lapic.write_msr(0, reg::EOI, 1), None);
    assert_eq!(lapic.write_msr(0, reg::TPR, 0x100), None);
    let sent = lapic.write_msr(0, reg::ICR, 0x0001_0004_0000_08f2);
    let target = Target::Logical(0x1_0004);
    assert_eq!(sent, Some(Action::Send(Message { vector: 0xf2, delivery: delivery::FIXED, target, level: false })));
    assert!(lapic.is_target(target, None));
    assert!(!lapic.is_target(Target::Logical(0x1_0008), None));
    assert!(matches!(lapic.write_msr(0, reg::SELF_IPI, 0x33), Some(Action::Send(Message { target: Target::Own, .. }))));
    assert_eq!(lapic.set_base(0xfee0_0800), None, "x2APIC to xAPIC only through disabled");
    assert_eq!(lapic.set_base(0xfee0_0000), Some(()));
    assert_eq!(lapic.set_base(0xfee0_0c00), None);
}

#[test]
fn logical_ids_of_both_models() {
    let mut lapic = enabled();
    lapic.write_page(0, 0xd0, 0x0400_0000);
    assert!(lapic.is_target(Target::Logical(0x0c), None));
    assert!(!lapic.is_target(Target::Logical(0x03), None));
    lapic.write_page(0, 0xe0, 0);
    lapic.write_page(0, 0xd0, 0x2100_0000);
    assert!(lapic.is_target(Target::Logical(0x23), None));
    assert!(!lapic.is_target(Target::Logical(0x33), None));
}

proptest! {
    #[test]
    fn any_history_survives_saving(writes in proptest::collection::vec((0u16..0x40, any::<u32>(), 0u64..5000), 0..60), x2: bool) {
        let mut lapic = if x2 { enabled_x2() } else { enabled() };
        let mut tsc = 0;
        for (register, value, step) in writes {
            tsc += step;
            if x2 {
                let _ = lapic.write_msr(tsc, register.into(), value.into());
            } else {
                lapic.write_page(tsc, register << 4, value);
            }
            lapic.accept(fixed(value as u8, value & 256 != 0));
            lapic.tick(tsc);
            if let Some(vector) = lapic.pending().filter(|_| value & 512 != 0) {
                lapic.acknowledge(vector);
            }
        }
        let restored = Lapic::restore(0, &lapic.save());
        prop_assert_eq!(restored, Ok(lapic));
    }
}

#[test]
fn hostile_saved_forms_are_refused_by_name() {
    let good = enabled().save();
    let refused = |change: &dyn Fn(&mut proto::v1::LapicV1)| {
        let mut saved = good.clone();
        change(&mut saved);
        Lapic::restore(0, &saved).unwrap_err().field
    };
    assert_eq!(refused(&|s| s.apic_base |= 1), "apic_base");
    assert_eq!(refused(&|s| s.apic_base &= !BASE_BSP), "apic_base");
    assert_eq!(refused(&|s| s.lvt.push(0)), "lvt");
    assert_eq!(refused(&|s| s.lvt[1] = 1 << 31), "lvt");
    assert_eq!(refused(&|s| s.irr[0] = 1), "irr");
    assert_eq!(
        refused(&|s| {
            s.isr.pop();
        }),
        "isr"
    );
    assert_eq!(refused(&|s| s.timer = None), "timer");
    assert_eq!(refused(&|s| s.timer.as_mut().unwrap().deadline = Some(5)), "timer.deadline");
    assert_eq!(refused(&|s| s.sipi_vector = Some(256)), "sipi_vector");
    assert_eq!(refused(&|s| s.tpr = 256), "tpr");
}

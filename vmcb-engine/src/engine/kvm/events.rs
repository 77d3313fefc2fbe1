//! Interrupts, exceptions and NMIs in flight: KVM_GET_VCPU_EVENTS and EVENTINJ (KVM API 4.31, APM2 15.20).
//!
//! What KVM calls injected is what the next entry delivers first. A software interrupt or a trap that an exit interrupted is not
//! kept: its instruction is executed again.

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI,
    kvm_vcpu_events,
};

use crate::cpu::CpuState;
use crate::engine::LoadError;
use crate::vmcb::event::{ERROR_CODE, ERROR_VALID};
use crate::vmcb::{Event, EventType};

/// #BP and #OF: raised by the instruction that is executed again.
const TRAPS: [u8; 2] = [3, 4];

/// Writes what is in flight into a state.
pub(super) fn store(events: &kvm_vcpu_events, state: &mut CpuState) {
    let (exception, interrupt, nmi) = (&events.exception, &events.interrupt, &events.nmi);
    state.event_injection = if exception.injected != 0 && !TRAPS.contains(&exception.nr) {
        Event::exception(exception.nr, (exception.has_error_code != 0).then_some(exception.error_code))
    } else if nmi.injected != 0 {
        Event::nmi()
    } else if interrupt.injected != 0 && interrupt.soft == 0 {
        Event::interrupt(interrupt.nr)
    } else {
        Event::NONE
    };
    state.interrupt_shadow = interrupt.shadow != 0;
    state.nmi_masked = nmi.masked != 0;
    state.nmi_pending = nmi.pending != 0;
}

/// What KVM is to deliver.
pub(super) fn load(state: &CpuState) -> Result<kvm_vcpu_events, LoadError> {
    let mut events =
        kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_NMI_PENDING, ..Default::default() };
    let event = state.event_injection;
    match event.kind().filter(|_| event.valid()) {
        None => {}
        Some(EventType::Interrupt) => (events.interrupt.injected, events.interrupt.nr) = (1, event.vector()),
        Some(EventType::Nmi) => events.nmi.injected = 1,
        Some(EventType::Exception) => {
            events.exception.injected = 1;
            events.exception.nr = event.vector();
            events.exception.has_error_code = ERROR_VALID.is_set(event.0).into();
            events.exception.error_code = ERROR_CODE.get(event.0) as u32;
        }
        Some(EventType::Software) => {
            let reason = "a software interrupt is in flight: KVM does not take one".to_owned();
            return Err(LoadError::Refused { step: "KVM_SET_VCPU_EVENTS", reason });
        }
    }
    if state.interrupt_shadow {
        events.interrupt.shadow = (KVM_X86_SHADOW_INT_MOV_SS | KVM_X86_SHADOW_INT_STI) as u8;
    }
    events.nmi.masked = state.nmi_masked.into();
    events.nmi.pending = state.nmi_pending.into();
    Ok(events)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_that_an_entry_delivers_survives() {
        let flying = [
            Event::NONE,
            Event::interrupt(0x41),
            Event::nmi(),
            Event::exception(14, Some(6)),
            Event::exception(6, None),
        ];
        for event in flying {
            let mut state = CpuState { event_injection: event, nmi_masked: true, ..CpuState::reset() };
            (state.interrupt_shadow, state.nmi_pending) = (true, true);
            let mut stored = CpuState::reset();
            store(&load(&state).unwrap(), &mut stored);
            assert_eq!(stored.compare(&state), []);
        }
        let software = CpuState { event_injection: Event::new(EventType::Software, 0x80), ..CpuState::reset() };
        assert!(load(&software).unwrap_err().to_string().contains("software interrupt"));
    }

    #[test]
    fn what_its_instruction_raises_again_is_not_kept() {
        let mut events = kvm_vcpu_events::default();
        (events.interrupt.injected, events.interrupt.nr, events.interrupt.soft) = (1, 0x80, 1);
        let mut state = CpuState::reset();
        store(&events, &mut state);
        assert_eq!(state.event_injection, Event::NONE);
        (events.exception.injected, events.exception.nr) = (1, 3);
        store(&events, &mut state);
        assert_eq!(state.event_injection, Event::NONE);
    }
}

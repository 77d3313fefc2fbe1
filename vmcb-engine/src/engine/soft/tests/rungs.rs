//! Rungs: a machine that comes back has the future that it had, stale translations included.

use iced_x86::code_asm::*;
use proptest::prelude::*;

use super::exact::{guest, ram_digest};
use super::*;
use crate::engine::soft::svm::bare::TABLES;
use crate::engine::{EngineRung, Stops, Why};

/// All of a guest, to come back to.
struct Place {
    rung: EngineRung,
    world: World,
    ram: Vec<u8>,
}

impl Place {
    fn of(guest: &Guest) -> Self {
        let mut ram = vec![0; 4 << 20];
        guest.memory.read(0, &mut ram).unwrap();
        Self { rung: guest.engine.rung(), world: guest.world.clone(), ram }
    }

    fn back(&self, guest: &mut Guest) {
        // By another mapping of the same RAM, so that nobody is told.
        let ram = guest.memory.ram_fd().try_clone_to_owned().unwrap();
        let stamps = guest.memory.stamps_fd().try_clone_to_owned().unwrap();
        GuestMemory::attach(ram, stamps, 16 << 20).unwrap().write(0, &self.ram).unwrap();
        guest.world = self.world.clone();
        guest.engine.climb(&self.rung).unwrap();
    }
}

/// Runs instruction by instruction, and tells the state after each.
fn future(guest: &mut Guest) -> Vec<CpuState> {
    let mut states = vec![guest.engine.peek(0).unwrap()];
    loop {
        let next = guest.engine.clock().retired + 1;
        if guest.run(next) == Exit::Halted {
            return states;
        }
        states.push(guest.engine.peek(0).unwrap());
    }
}

#[test]
fn from_any_instruction_a_guest_that_came_back_goes_on_as_it_did() {
    let mut alone = guest();
    let whole = future(&mut alone);
    let mut climber = guest();
    let mut places = Vec::new();
    for at in 0..whole.len() as u64 - 1 {
        climber.run(at);
        if at % 11 == 0 {
            places.push((at as usize, Place::of(&climber)));
        }
    }
    assert_eq!(climber.run(1 << 30), Exit::Halted);
    // Taking them changed nothing.
    assert_eq!(climber.world.log, alone.world.log);
    assert_eq!(climber.engine.translations(0), alone.engine.translations(0));
    for (at, place) in places.iter().rev() {
        place.back(&mut climber);
        assert_eq!(climber.engine.clock().retired, *at as u64);
        for (more, (now, then)) in future(&mut climber).iter().zip(&whole[*at..]).enumerate() {
            assert_eq!(now.compare(then), [], "{more} after {at}");
        }
        assert_eq!(climber.engine.clock(), alone.engine.clock());
        assert_eq!(climber.world.log, alone.world.log, "from {at}");
        assert_eq!(ram_digest(&climber.memory), ram_digest(&alone.memory), "from {at}");
        assert_eq!(climber.engine.translations(0), alone.engine.translations(0), "from {at}");
    }
}

/// Where the guest has a page of its own table.
const WINDOW: u64 = 0x4000_0000;

/// Reads [`WINDOW`], maps another page there without telling the processor, reads again, then tells it and reads again;
/// the same with code that is called there, and with a store.
fn stale() -> Guest {
    let guest = Guest::new(|a| {
        a.mov(ebx, WINDOW as u32).unwrap();
        a.mov(esi, 0x32_0000).unwrap();
        a.mov(rax, qword_ptr(rbx)).unwrap();
        a.call(rbx).unwrap();
        a.mov(qword_ptr(rbx + 0x800), rbx).unwrap();
        a.mov(dword_ptr(rsi), 0x31_0067).unwrap();
        a.mov(rcx, qword_ptr(rbx)).unwrap();
        a.call(rbx).unwrap();
        a.mov(qword_ptr(rbx + 0x808), rbx).unwrap();
        a.invlpg(ptr(rbx)).unwrap();
        a.mov(rdx, qword_ptr(rbx)).unwrap();
        a.call(rbx).unwrap();
        a.mov(qword_ptr(rbx + 0x810), rbx).unwrap();
        a.hlt().unwrap();
    });
    put(&guest.memory, TABLES + 0x1008, 0x33_0067);
    put(&guest.memory, 0x33_0000, 0x32_0067);
    put(&guest.memory, 0x32_0000, 0x30_0067);
    // INC R8; RET and INC R9; RET.
    put(&guest.memory, 0x30_0000, 0xc3c0_ff49);
    put(&guest.memory, 0x31_0000, 0xc3c1_ff49);
    guest
}

#[test]
fn stale_translations_are_there_after_a_climb_and_gone_after_a_capture() {
    let last = |guest: &mut Guest| {
        assert_eq!(guest.run(1000), Exit::Halted);
        let state = guest.engine.peek(0).unwrap();
        let stores = [0x30_0800, 0x30_0808, 0x31_0808, 0x31_0810].map(|at| get(&guest.memory, at));
        (state.gprs[1], state.gprs[2], state.gprs[8], state.gprs[9], stores)
    };
    let mut alone = stale();
    let expected = last(&mut alone);
    assert_eq!(expected, (0xc3c0_ff49, 0xc3c1_ff49, 2, 1, [WINDOW, WINDOW, 0, WINDOW]));
    let end = alone.engine.clock().retired;
    let mut differ = 0;
    for at in 0..end {
        let mut guest = stale();
        guest.run(at);
        let place = Place::of(&guest);
        assert_eq!(last(&mut guest), expected, "it was looked at after {at}");
        for _ in 0..2 {
            place.back(&mut guest);
            assert_eq!(last(&mut guest), expected, "from {at}");
            assert_eq!(guest.engine.translations(0), alone.engine.translations(0));
        }
        let mut forgets = stale();
        forgets.run(at);
        forgets.state();
        differ += u32::from(last(&mut forgets) != expected);
    }
    assert!(differ > 3, "the program relies on what is cached: {differ}");
}

#[test]
fn two_vcpus_come_back_in_the_middle_of_their_turns() {
    let both = |guest: &Guest| [0, 1].map(|vcpu| guest.engine.peek(vcpu).unwrap());
    let mut alone = super::several::guest();
    assert_eq!(alone.run(1 << 30), Exit::Halted);
    let end = alone.engine.clock();
    for at in [1, 3, 4_999, 5_000, 7_777, 10_001] {
        let mut climber = super::several::guest();
        climber.run(at);
        let place = Place::of(&climber);
        let here = both(&climber);
        climber.run(at + 6_000);
        let then = both(&climber);
        for step in [6_000, 1, 997] {
            place.back(&mut climber);
            assert_eq!(both(&climber), here);
            while climber.engine.clock().retired < at + 6_000 {
                let next = (climber.engine.clock().retired + step).min(at + 6_000);
                climber.run(next);
            }
            assert_eq!(both(&climber), then, "{step} from {at}");
        }
        assert_eq!(climber.run(1 << 30), Exit::Halted);
        assert_eq!((climber.engine.clock(), both(&climber)), (end, both(&alone)), "from {at}");
        assert_eq!(get(&climber.memory, super::several::COUNTER), get(&alone.memory, super::several::COUNTER));
    }
}

#[test]
fn a_rung_of_another_engine_is_refused() {
    let two = Guest::with_vcpus(2, |a| a.hlt().unwrap());
    let mut one = guest();
    one.run(50);
    let before = one.engine.peek(0).unwrap();
    for rung in [two.engine.rung(), EngineRung::new(7_u8, 1)] {
        assert!(matches!(one.engine.climb(&rung), Err(LoadError::Illegal(_))));
    }
    assert_eq!(one.engine.peek(0).unwrap(), before);
    assert!(one.engine.rung().bytes() > 1000);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn stops_set_at_any_time_are_met_after_a_climb(at in 0u64..150, set in 0u64..150, chosen in 0usize..10_000) {
        let everywhere = Stops { breakpoints: (CODE..CODE + 0x100).collect(), ..Stops::default() };
        let met = |guest: &mut Guest| {
            let mut seen: Vec<(u64, Why)> = Vec::new();
            loop {
                match guest.run(1 << 30) {
                    Exit::Stop { why, .. } => seen.push((guest.engine.clock().retired, why)),
                    Exit::Halted => return seen,
                    other => panic!("{other}"),
                }
            }
        };
        let mut all = guest();
        all.engine.set_stops(&everywhere);
        let all = met(&mut all);
        let Why::Breakpoint { address } = all[chosen % all.len()].1 else { panic!() };
        let mut climber = guest();
        climber.run(at);
        let place = Place::of(&climber);
        climber.run(at + set);
        climber.engine.set_stops(&Stops { breakpoints: vec![address], ..Stops::default() });
        met(&mut climber);
        let here = (at, Why::Breakpoint { address });
        let expected: Vec<(u64, Why)> =
            all.iter().filter(|(retired, why)| *retired >= at && *why == here.1).copied().collect();
        place.back(&mut climber);
        prop_assert_eq!(met(&mut climber), expected.clone());
        // Standing there already: told to pass it, it does.
        place.back(&mut climber);
        climber.engine.pass_breakpoints();
        let passed: Vec<_> = expected.into_iter().filter(|seen| *seen != here || climber.engine.peek(0).unwrap().rip != address).collect();
        prop_assert_eq!(met(&mut climber), passed);
    }
}

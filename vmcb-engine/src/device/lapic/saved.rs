//! Saved form of a local APIC: `LapicV1`.

use proto::v1::LapicV1;

use super::timer::{Mode, Timer};
use super::vectors::Vectors;
use super::{BASE_ADDRESS, BASE_BSP, BASE_ENABLE, BASE_X2, LVT_TIMER, LVT_WRITABLE, Lapic};
use crate::device::{Unfit, narrow};

impl Lapic {
    /// The saved form.
    pub fn save(&self) -> LapicV1 {
        // The id is the vCPU's number, which the section's name says.
        let Lapic {
            id: _,
            base,
            tpr,
            ldr,
            dfr,
            svr,
            esr,
            esr_pending,
            icr,
            lvt,
            irr,
            isr,
            tmr,
            timer,
            nmi_requested,
            init_requested,
            sipi_vector,
            dormant,
        } = self;
        LapicV1 {
            apic_base: *base,
            tpr: *tpr,
            ldr: *ldr,
            dfr: *dfr,
            svr: *svr,
            esr: *esr,
            esr_pending: *esr_pending,
            icr: *icr,
            lvt: lvt.to_vec(),
            irr: irr.0.to_vec(),
            isr: isr.0.to_vec(),
            tmr: tmr.0.to_vec(),
            timer: Some(timer.save()),
            nmi_requested: *nmi_requested,
            init_requested: *init_requested,
            sipi_vector: sipi_vector.map(u32::from),
            dormant: *dormant,
        }
    }

    /// The APIC of `vcpu` in a saved state.
    ///
    /// # Errors
    /// A field that no APIC could hold.
    pub fn restore(vcpu: usize, saved: &LapicV1) -> Result<Lapic, Unfit> {
        let legal = BASE_ADDRESS | BASE_BSP | BASE_ENABLE | BASE_X2;
        let base = saved.apic_base;
        let mode_fits = base & BASE_X2 == 0 || base & BASE_ENABLE != 0;
        let first_fits = (base & BASE_BSP != 0) == (vcpu == 0);
        Unfit::check(base & !legal == 0 && mode_fits && first_fits, "apic_base", base, "a legal APIC_BASE")?;
        Unfit::check(saved.tpr <= 0xff, "tpr", saved.tpr, "eight bits")?;
        Unfit::check(saved.dfr | 0xf000_0000 == u32::MAX, "dfr", saved.dfr, "a model and ones")?;
        Unfit::check(saved.svr <= 0x1ff, "svr", saved.svr, "nine bits")?;
        Unfit::check(saved.esr <= 0xff, "esr", saved.esr, "eight bits")?;
        Unfit::check(saved.esr_pending <= 0xff, "esr_pending", saved.esr_pending, "eight bits")?;
        Unfit::check(saved.icr & 0xfff3_3000 == 0, "icr", saved.icr, "no reserved bits")?;
        let lvt: [u32; 6] =
            saved.lvt.as_slice().try_into().map_err(|_| Unfit::new("lvt", saved.lvt.len(), "six entries"))?;
        let reserved = lvt.iter().zip(LVT_WRITABLE).any(|(entry, writable)| entry & !writable != 0);
        Unfit::check(!reserved, "lvt", lvt, "no reserved bits")?;
        let sipi_vector = saved.sipi_vector.map(|vector| narrow("sipi_vector", vector)).transpose()?;
        Ok(Lapic {
            id: vcpu as u32,
            base,
            tpr: saved.tpr,
            ldr: saved.ldr,
            dfr: saved.dfr,
            svr: saved.svr,
            esr: saved.esr,
            esr_pending: saved.esr_pending,
            icr: saved.icr,
            lvt,
            irr: vectors("irr", &saved.irr)?,
            isr: vectors("isr", &saved.isr)?,
            tmr: vectors("tmr", &saved.tmr)?,
            timer: Timer::restore(saved.timer.as_ref(), Mode::of(lvt[LVT_TIMER]))?,
            nmi_requested: saved.nmi_requested,
            init_requested: saved.init_requested,
            sipi_vector,
            dormant: saved.dormant,
        })
    }
}

fn vectors(field: &'static str, words: &[u64]) -> Result<Vectors, Unfit> {
    let words: [u64; 4] = words.try_into().map_err(|_| Unfit::new(field, words.len(), "four words"))?;
    Unfit::check(words[0] & 0xffff == 0, field, words[0], "no vector below 16")?;
    Ok(Vectors(words))
}

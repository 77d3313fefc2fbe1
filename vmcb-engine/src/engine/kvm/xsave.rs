//! The XSAVE area, component by component (APM2 11.5.2).
//!
//! KVM copies the area in the standard form, whose offsets the processor fixes and two vendors put differently; a saved state
//! has each component by itself, so that only its length must fit. The x87 and SSE part is an FXSAVE image on every host.

use std::collections::BTreeMap;

use kvm_bindings::kvm_xsave;
use kvm_ioctls::{Kvm, VcpuFd};

use super::{Refusal, refused};
use crate::cpu::FxState;
use crate::engine::LoadError;

/// Length of the area of KVM_GET_XSAVE (KVM API 4.42); whatever lies beyond belongs to features that need a permission.
const AREA_BYTES: usize = 4096;
const IMAGE_BYTES: usize = 512;
/// XSTATE_BV, the first word of the header.
const HEADER: usize = IMAGE_BYTES;
const LEGACY: u64 = 0b11;

/// Where components 2 and up lie on this host.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Layout(BTreeMap<u32, (usize, usize)>);

impl Layout {
    /// The host's, as KVM tells it: CPUID 0000_000D, subleaves 2 and up.
    pub(super) fn of(kvm: &Kvm) -> Result<Layout, Refusal> {
        let entries = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
        let entries = entries.map_err(refused("KVM_GET_SUPPORTED_CPUID"))?;
        let components = entries.as_slice().iter().filter(|entry| entry.function == 0xd && entry.index >= 2);
        // Supervisor components have no offset in the standard form.
        let user = components.filter(|entry| entry.ecx & 1 == 0 && entry.eax != 0);
        let places = user.map(|entry| (entry.index, (entry.ebx as usize, entry.eax as usize)));
        Ok(Layout(places.filter(|(_, (offset, bytes))| offset + bytes <= AREA_BYTES).collect()))
    }

    /// x87, SSE and those later components that are not as after reset and that `xcr0` allows. Whether the processor calls one in
    /// use that holds zeros is its own affair (APM2 11.5.4), and none of the guest's state.
    pub(super) fn store(&self, fd: &VcpuFd, xcr0: u64) -> Result<FxState, Refusal> {
        let area = fd.get_xsave().map_err(refused("KVM_GET_XSAVE"))?;
        Ok(self.take_apart(&to_bytes(&area), xcr0))
    }

    fn take_apart(&self, area: &[u8; AREA_BYTES], xcr0: u64) -> FxState {
        let image: &[u8; IMAGE_BYTES] = area.first_chunk().expect("the area begins with the image");
        let mut state = FxState::from_fxsave(image);
        let header = area[HEADER..].first_chunk().expect("the header follows the image");
        let used = u64::from_le_bytes(*header) & xcr0;
        for (id, (offset, bytes)) in &self.0 {
            let data = &area[*offset..offset + bytes];
            if used >> id & 1 == 1 && data.iter().any(|byte| *byte != 0) {
                state.later.insert(*id, data.to_vec());
            }
        }
        state
    }

    /// Loads what [`Layout::store`] stored, on any host.
    pub(super) fn load(&self, fd: &VcpuFd, state: &FxState) -> Result<(), LoadError> {
        let area = to_area(&self.put_together(state)?);
        // SAFETY: without permissions for larger features (arch_prctl) the kernel reads these 4096 bytes.
        Ok(unsafe { fd.set_xsave(&area) }.map_err(refused("KVM_SET_XSAVE"))?)
    }

    fn put_together(&self, state: &FxState) -> Result<[u8; AREA_BYTES], LoadError> {
        let mut area = [0; AREA_BYTES];
        area[..IMAGE_BYTES].copy_from_slice(state.fxsave());
        let mut used = LEGACY;
        for (id, data) in &state.later {
            let Some((offset, bytes)) = self.0.get(id).filter(|(_, bytes)| *bytes == data.len()) else {
                let here = self.0.get(id).map_or("none".to_owned(), |(_, bytes)| format!("{bytes} bytes"));
                let reason = format!("the state has {} bytes of component {id}, this host has {here}", data.len());
                return Err(LoadError::Refused { step: "XSAVE area", reason });
            };
            area[*offset..offset + bytes].copy_from_slice(data);
            used |= 1 << id;
        }
        area[HEADER..HEADER + 8].copy_from_slice(&used.to_le_bytes());
        Ok(area)
    }
}

fn to_bytes(area: &kvm_xsave) -> [u8; AREA_BYTES] {
    let mut bytes = [0; AREA_BYTES];
    let words = bytes.as_chunks_mut::<4>().0.iter_mut().zip(area.region);
    words.for_each(|(bytes, word)| *bytes = word.to_le_bytes());
    bytes
}

fn to_area(bytes: &[u8; AREA_BYTES]) -> kvm_xsave {
    let mut area = kvm_xsave::default();
    let words = area.region.iter_mut().zip(bytes.as_chunks::<4>().0);
    words.for_each(|(word, bytes)| *word = u32::from_le_bytes(*bytes));
    area
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_move_between_layouts_and_lengths_must_fit() {
        let (amd, intel) = (Layout([(2, (0x240, 256)), (9, (0x980, 8))].into()), Layout([(9, (0xa80, 8))].into()));
        let mut state = FxState::fninit();
        state.set_xmm(3, 7);
        state.later.insert(9, vec![5; 8]);
        let area = intel.put_together(&state).unwrap();
        assert_eq!(to_bytes(&to_area(&area)), area);
        assert_eq!((area[0xa80], area[HEADER], area[HEADER + 1]), (5, 3, 2));
        assert_eq!(intel.take_apart(&area, u64::MAX), state);
        assert!(intel.take_apart(&area, 3).later.is_empty(), "what the guest cannot use is not its state");
        assert_eq!(amd.take_apart(&amd.put_together(&state).unwrap(), u64::MAX), state);
        let mut reset = state.clone();
        reset.later.insert(2, vec![0; 256]);
        assert_eq!(amd.take_apart(&amd.put_together(&reset).unwrap(), u64::MAX), state, "zeros are as after reset");
        state.later.insert(2, vec![0; 256]);
        let error = intel.put_together(&state).unwrap_err().to_string();
        assert!(error.contains("256 bytes of component 2") && error.contains("none"), "{error}");
        state.later.insert(2, vec![0; 255]);
        assert!(amd.put_together(&state).unwrap_err().to_string().contains("this host has 256 bytes"));
    }
}

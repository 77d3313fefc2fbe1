//! Calls of KVM that kvm-ioctls has no method for on x86.

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_device_attr,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

fn answer(code: std::os::raw::c_int) -> Result<(), errno::Error> {
    if code < 0 { Err(errno::Error::last()) } else { Ok(()) }
}

/// Protects the pages of a slot again whose bit is set, from its first page on (KVM API 4.117).
pub fn clear_dirty_log(vm: &VmFd, slot: u32, bitmap: &mut [u64]) -> Result<(), errno::Error> {
    let num_pages = u32::try_from(bitmap.len() * 64).map_err(|_| errno::Error::new(libc::EINVAL))?;
    let dirty_bitmap = bitmap.as_mut_ptr().cast();
    let bits = kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap };
    let log = kvm_clear_dirty_log { slot, num_pages, first_page: 0, __bindgen_anon_1: bits };
    // SAFETY: the descriptor is a VM's, and the bitmap has a bit for each of the pages that the kernel reads.
    answer(unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &log) })
}

fn tsc_offset_at(place: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(place) as u64,
    }
}

/// What the guest's TSC is ahead of the host's, after scaling (Linux `virt/kvm/devices/vcpu.rst`, 4.1).
pub fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, errno::Error> {
    let mut offset = 0;
    let attribute = tsc_offset_at(&mut offset);
    // SAFETY: the descriptor is a vCPU's; the kernel writes the eight bytes that the attribute points at.
    answer(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) })?;
    Ok(offset)
}

/// Sets what [`tsc_offset`] reads. No other vCPU's is touched, and none is "synchronised" with it.
pub fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), errno::Error> {
    let attribute = tsc_offset_at(&mut offset);
    // SAFETY: the descriptor is a vCPU's; the kernel reads the eight bytes that the attribute points at.
    answer(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) })
}
